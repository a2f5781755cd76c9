#!/usr/bin/env bash
# Runs in the guest, through its serial shell: what a move must not harm, and the load that runs meanwhile. All loads have a pace, so
# that they dirty as much in every mode of migration, as long as the guest's processor keeps up.
#
#   setup FILES_MIB LOAD DIRTY_MIB    makes and sums up what is verified, starts the counter and the load
#   verify                            says what is wrong, and fails; or what is worth a note, and does not
#   audit                             the same, then the database's own checks if there is one, then the files again, from the disk
set -Eeuo pipefail
export LC_ALL=C
dir=/run/vmar-migrate
trap 'echo "failed: $BASH_COMMAND"' ERR

fail() {
    echo "$*"
    exit 1
}

# background NAME COMMAND...: as a service, so that it has no terminal. (systemd would expand a $ in the words.) Its process is noted: to
# ask systemd whether it runs takes an emulated guest too long.
background() {
    local name=$1
    shift
    mkdir -p $dir
    echo 'echo $$ >"$1"; shift; exec "$@"' >$dir/start.sh
    systemd-run --quiet --collect --unit="vmar-$name" sh $dir/start.sh $dir/"$name.pid" "$@"
}

# alive NAME
alive() {
    kill -0 "$(cat $dir/"$1.pid")" 2>/dev/null
}

# background_perl NAME PROGRAM [ARGUMENT...]
background_perl() {
    local name=$1
    printf '%s\n' "$2" >"$dir/$name.pl"
    shift 2
    background "$name" perl "$dir/$name.pl" "$@"
}

# ---------------------------------------------------------------------------------------------------------------------
# What must not come to harm

# Files of the image as they are in the page cache, a file that this guest has written to its disk, and one that is only in memory.
make_files() {
    local mib=$1
    mkdir -p $dir /var/tmp/vmar-migrate /dev/shm/vmar-migrate
    head -c 4M /dev/urandom >/var/tmp/vmar-migrate/disk
    head -c 4M /dev/urandom >/dev/shm/vmar-migrate/memory
    {
        echo /var/tmp/vmar-migrate/disk
        echo /dev/shm/vmar-migrate/memory
        find /usr/bin /usr/lib/x86_64-linux-gnu -maxdepth 1 -type f -size -4M -printf '%s %p\n' | sort -k 2 |
            awk -v max="$mib" '{ s += $1 } s <= max * 1048576 { print $2 }'
    } >$dir/files
    xargs -d '\n' sha256sum <$dir/files >$dir/sums
    sync
}

# Counts 20 times a second, in place in a file, and looks at a piece of its own 8 MiB of memory each time: ends if that has changed.
# shellcheck disable=SC2016 # perl's
counter='
    use strict; use Time::HiRes "sleep";
    open(my $random, "<:raw", "/dev/urandom") or die; read($random, my $memory, 8 << 20) == 8 << 20 or die;
    my @sums = map { unpack("%32N*", substr($memory, $_ << 16, 1 << 16)) } 0 .. 127;
    open(my $out, "+>", $ARGV[0]) or die;
    for (my $n = 1; ; $n++) {
        unpack("%32N*", substr($memory, ($n % 128) << 16, 1 << 16)) == $sums[$n % 128] or die "memory has changed";
        seek($out, 0, 0); syswrite($out, sprintf("%12d", $n)); sleep(0.05);
    }'

# What the kernel calls an error or worse.
errors() {
    dmesg --level emerg,alert,crit,err | grep -vE "$late" || true
}

# Some of that is said by a kernel that got no processor for long, on a busy host most of all under emulation: worth a note, no harm.
late='soft lockup|rcu: |rcu_(preempt|sched)|hrtimer: interrupt took'

note_late() {
    dmesg | grep -E "$late" >$dir/lates || true
    wc -l <$dir/lates >$dir/late
}

verify() {
    local before after left=50
    (cd / && sha256sum --quiet --check $dir/sums 2>&1) || fail "files have changed"
    alive counter || fail "the counter is not alive"
    before=$(cat $dir/count)
    while after=$(cat $dir/count) && [ "$after" -eq "$before" ] && [ "$left" -gt 0 ]; do
        left=$((left - 1))
        sleep 0.1
    done
    [ "$after" -gt "$before" ] && [ "$before" -ge "$(cat $dir/count-then)" ] || fail "the counter stands at $after (before: $before)"
    echo "$after" >$dir/count-then
    [ ! -e $dir/load.pid ] || alive load || fail "the load has ended: $(journalctl -qn 3 -u vmar-load -o cat)"
    errors | diff $dir/errors - || fail "the kernel has errors"
    # The first of those that are new.
    before=$(cat $dir/late)
    note_late
    awk -v n="$before" 'NR == n + 1' $dir/lates
}

# What PostgreSQL itself says: all indexes against their tables, all rows, and that the balances of pgbench's TPC-B agree.
audit_db() {
    local said
    said=$(runuser -u postgres -- psql --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 vmar_migrate 2>&1 <<'SQL'
create extension if not exists amcheck;
select count(*) from (select bt_index_check(c.oid, true) from pg_class c join pg_index i on i.indexrelid = c.oid
    join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relpersistence = 'p') x;
select case when a = t and t = b and b = h then 'agree' else 'differ: ' || a || ' ' || t || ' ' || b || ' ' || h end from
    (select (select sum(abalance) from pgbench_accounts) a, (select sum(tbalance) from pgbench_tellers) t,
     (select sum(bbalance) from pgbench_branches) b, (select coalesce(sum(delta), 0) from pgbench_history) h) x;
SQL
    ) || fail "the database: $said"
    [ "${said##*$'\n'}" = agree ] || fail "the database: $said"
}

audit() {
    verify
    if [ "$(cat $dir/load)" = db ]; then audit_db; fi
    sync
    echo 3 >/proc/sys/vm/drop_caches
    verify
}

# ---------------------------------------------------------------------------------------------------------------------
# Loads

# A process that writes over a buffer of 64 MiB, so many MiB a second: pages of one half that nothing can compress and one that is
# all the same, no two of them alike.
stress='
    use strict; use Time::HiRes qw(time sleep);
    my ($rate, $pages) = ($ARGV[0] * 256, 64 * 256);
    open(my $random, "<:raw", "/dev/urandom") or die; read($random, my $pool, 1 << 20) == 1 << 20 or die;
    my $buffer = "\0" x ($pages << 12); my $same = "vmar" x 512; my $began = time;
    for (my $n = 0; ; $n++) {
        substr($buffer, ($n % $pages) << 12, 4096) = substr($pool, int(rand((1 << 20) - 2048)), 2048) . $same;
        if ($n % 64 == 0) { my $wait = $began + $n / $rate - time; sleep($wait) if $wait > 0; $began -= $wait if $wait < -1; }
    }'

# What a player has in memory: 25 frames a second of 640 x 360 (YUV 4:2:0) in a ring of 64 MiB. The picture, 4 bits of noise in each
# byte, moves up by a line a frame, and each frame has 2 bits of noise of its own over it, so that no page comes twice.
video='
    use strict; use Time::HiRes qw(time sleep);
    my ($line, $size, $most) = (640, 640 * 360 * 3 / 2, 1 << 20); my $frames = int((64 << 20) / $size);
    open(my $random, "<:raw", "/dev/urandom") or die; read($random, my $pool, $most) == $most or die;
    my $noise = $pool & ("\x03" x $most); $pool =~ tr/\x00-\xff/\x60-\x6f/;
    my $picture = substr($pool, 0, $size); my $ring = "\0" x ($frames * $size); my $began = time;
    for (my $n = 0; ; $n++) {
        $picture = substr($picture, $line) . substr($pool, int(rand($most - $line)), $line);
        substr($ring, ($n % $frames) * $size, $size) = $picture ^ substr($noise, int(rand($most - $size)), $size);
        my $wait = $began + $n / 25 - time; sleep($wait) if $wait > 0; $began -= $wait if $wait < -1;
    }'

# nginx serves 200 files of 4 to 200 KiB to a client on the same machine, 20 a second, in turns; both write logs.
load_web() {
    local n
    systemctl --quiet is-active nginx || fail "load web: no nginx runs in this image: take one that has it, such as web"
    mkdir -p /var/www/html/vmar
    for n in $(seq 200); do
        head -c $((n * 1000 + 3000)) /dev/urandom | base64 >/var/www/html/vmar/"$n"
    done
    sync
    background load sh -c 'while :; do curl --silent --fail --output /dev/null --rate 20/s "http://127.0.0.1/vmar/[1-200]" || exit 1; done'
}

# PostgreSQL and its pgbench at scale 3 (45 MB), one client, 10 transactions of the TPC-B kind a second.
load_db() {
    local cluster bin
    cluster=$(cd /etc/postgresql 2>/dev/null && echo */main) || fail "load db: no PostgreSQL in this image: take one that has it, such as db"
    bin=/usr/lib/postgresql/${cluster%/main}/bin
    systemctl start "postgresql@${cluster/\//-}"
    runuser -u postgres -- createdb vmar_migrate
    runuser -u postgres -- "$bin/pgbench" --initialize --quiet --scale=3 vmar_migrate >$dir/pgbench.log 2>&1 ||
        fail "load db: $(tail -n 1 $dir/pgbench.log)"
    background load runuser -u postgres -- "$bin/pgbench" --no-vacuum --client=1 --rate=10 --time=1000000 vmar_migrate
}

# C in 60 files, compiled again and again. What the compiler reads is in the page cache, what it writes is on its way to the disk.
load_build() {
    local n m
    command -v gcc >/dev/null && command -v make >/dev/null || fail "load build: no compiler in this image: take one that has it, such as build"
    mkdir -p /var/tmp/vmar-build
    cd /var/tmp/vmar-build
    for n in $(seq 60); do
        printf '#include <%s.h>\n' math stdio stdlib string >"$n.c"
        for m in $(seq 40); do
            printf 'double f%s_%s(double x) { char b[64]; snprintf(b, 64, "%%f", sin(x * %s) + %s); return atof(b) * strlen(b); }\n' "$n" "$m" "$n" "$m"
        done >>"$n.c"
    done
    printf 'all.a: $(patsubst %%.c,%%.o,$(wildcard *.c))\n\tar rcs $@ $^\nCFLAGS = -O1 -g\n' >Makefile
    background load sh -c 'cd /var/tmp/vmar-build && while :; do make --silent || exit 1; rm -f *.o all.a; done'
    # Until it has compiled for a while.
    sleep 60
}

setup() {
    local mib=$1 load=$2 dirty=$3
    mkdir -p $dir
    echo "$load" >$dir/load
    # What ends on its own soon after a boot is over.
    systemctl --quiet stop apt-daily.timer apt-daily-upgrade.timer man-db.timer 2>/dev/null || true
    make_files "$mib"
    background_perl counter "$counter" $dir/count
    case $load in
        idle) ;;
        stress) background_perl load "$stress" "$dirty" ;;
        video) background_perl load "$video" ;;
        web) load_web ;;
        db) load_db ;;
        build) load_build ;;
        *) fail "no load $load" ;;
    esac
    errors >$dir/errors
    note_late
    until [ -s $dir/count ] && { [ "$load" = idle ] || [ -s $dir/load.pid ]; }; do sleep 0.2; done
    sleep 2
    echo 0 >$dir/count-then
    verify
}

"$@"
