#!/usr/bin/env bash
# Makes the corpus: real Debian images that differ as those of a data centre do, for measurements. README.md beside this
# file says more.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# What images/build.sh makes of each, and which of them become another image by being used.
# shellcheck disable=SC2054 # the commas are part of the words
corpus=(
    web=web,release=bookworm
    db=db,release=bookworm
    cache=cache,release=bookworm
    python=python,release=bookworm
    mail=mail,release=bookworm,kernel=6.12
    java=java,release=bookworm
    monitor=monitor,release=bookworm
    web13=web,release=trixie
    db13=db,release=trixie,use=db
    php13=php,release=trixie,fs=xfs
    ruby13=ruby,release=trixie
    node13=node,release=trixie,kernel=backports
    mariadb13=mariadb,release=trixie,fs=xfs
    python13=python,release=trixie
)
captured=(db13-used=db13)
# An application stack in two versions of the database and two of Java and its server's libraries, each with each: what the
# VMAR paper did with two other products. Versions are the newest, and the oldest that the archive still has.
java_newest=openjdk-17-jre-headless:newest+libtomcat10-java:newest
java_older=openjdk-17-jre-headless:older+libtomcat10-java:older
apps=(
    "app1=app,release=bookworm,pin=postgresql-15:newest+$java_newest"
    "app2=app,release=bookworm,pin=postgresql-15:newest+$java_older"
    "app3=app,release=bookworm,kernel=older,pin=postgresql-15:older+$java_newest"
    "app4=app,release=bookworm,kernel=older,pin=postgresql-15:older+$java_older"
)

usage() {
    cat <<EOF
usage: images/corpus.sh --out DIR [--apps] [--no-captured] [--drop-caches] [--list] [NAME...]

Builds the images of the corpus (all, or those named) in DIR, then those that are captured after use, and prints a table.
What is there stays, so a run that was interrupted goes on where it was.

  --out DIR       where images and caches go: about 0.7 GiB an image, and 2 GiB of caches
  --apps          the four images with an application stack belong to the corpus, too: 1.2 GiB each
  --no-captured   leave out the captured ones: they boot a VM for some minutes and need the vmar binary (VMAR_BIN, else
                  cargo builds it) and QEMU
  --drop-caches   remove the base systems and packages that were kept, when all is built
  --list          print what the corpus has, and stop

VMAR_ACCEL=kvm|tcg chooses the accelerator. Must run as root: it installs the packages that it needs.
EOF
}

die() {
    printf 'images/corpus.sh: %s\n' "$*" >&2
    exit 1
}

out='' drop='' capture=1 names=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a directory}; shift ;;
        --apps) corpus+=("${apps[@]}") ;;
        --no-captured) capture='' ;;
        --drop-caches) drop=1 ;;
        --list)
            printf '%s\n' "${corpus[@]}" "${captured[@]/%/ (captured after use)}"
            [[ " ${corpus[*]}" = *" app1="* ]] || printf '%s\n' "${apps[@]/%/ (with --apps)}"
            exit 0
            ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; exit 2 ;;
        *) names+=("$1") ;;
    esac
    shift
done
[ -n "$out" ] || { usage >&2; exit 2; }
[ "$(id -u)" -eq 0 ] || die "must run as root: it mounts file systems and installs packages in them"

# wanted NAME: whether it was asked for, or for what is captured from it.
wanted() {
    local name=$1 pair
    [ ${#names[@]} -gt 0 ] || return 0
    printf '%s\n' "${names[@]}" | grep -qxF -- "$name" && return 0
    for pair in "${captured[@]}"; do
        if [ "${pair#*=}" = "$name" ] && printf '%s\n' "${names[@]}" | grep -qxF -- "${pair%%=*}"; then
            return 0
        fi
    done
    return 1
}

for name in "${names[@]}"; do
    printf '%s\n' "${corpus[@]}" "${captured[@]}" | grep -q "^$name=" ||
        die "the corpus has no $name; there are: $(printf '%s ' "${corpus[@]%%=*}" "${captured[@]%%=*}")and, with --apps, ${apps[*]%%=*}"
done

specs=() all=()
for spec in "${corpus[@]}"; do
    wanted "${spec%%=*}" || continue
    specs+=("$spec")
    all+=("${spec%%=*}")
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
"$here/build.sh" --out "$out" "${specs[@]}"

for pair in "${captured[@]}"; do
    name=${pair%%=*}
    [ -n "$capture" ] && wanted "$name" || continue
    all+=("$name")
    if [ -e "$out/$name.raw" ]; then
        echo "$name: there already ($out/$name.raw)"
        continue
    fi
    mkdir -p "$out/log/$name"
    "$here/../qemu-scripts/capture.sh" --images "$out" --name "${pair#*=}" --as "$name" --workdir "$out/log/$name"
done
[ -z "$drop" ] || rm -rf "$out/cache"

# field FILE KEY: what NAME.info says, if it is there.
field() {
    local value
    value=$(sed -n "s/^$2=//p" "$1" 2>/dev/null || true)
    echo "${value:--}"
}

echo
format='%-12s %-9s %-9s %-28s %-5s %8s %9s %s\n'
# shellcheck disable=SC2059
printf "$format" image role release kernel fs MiB build-s captured-from
for name in "${all[@]}"; do
    info=$out/$name.info
    # shellcheck disable=SC2059
    printf "$format" "$name" "$(field "$info" role)" "$(field "$info" release)" "$(field "$info" kernel)" \
        "$(field "$info" fs)" "$(du -m "$out/$name.raw" | cut -f1)" "$(field "$info" build_seconds)" \
        "$(field "$info" captured_from)"
done
echo "${#all[@]} images in $out; the directory takes $(du -sm "$out" | cut -f1) MiB"
