# What is measured: part of qemu-scripts/evaluate.sh. All of it once, then the repetitions, figure by figure: whatever ends it
# leaves every figure, and the first ones with their error bars.
# shellcheck shell=bash disable=SC2154 # its variables
# shellcheck disable=SC2046 # names of traces are words without blanks

list_jobs() {
    local every=("${boots[@]}")
    list_runs 1 1
    list_runs 2 "$runs"
    boots=("${every[@]}")
}

# list_runs FIRST LAST
list_runs() { # the guests, which take longest, last
    local run what parts=(number_of_vms overhead)
    [ -n "$quick" ] || parts+=(applications arrival_rate beyond_the_paper available_memory)
    [ -z "$guests" ] || parts+=(real_guests)
    for what in "${parts[@]}"; do
        for ((run = $1; run <= $2; run++)); do
            rotate "$run" "${every[@]}"
            "$what" "$run"
        done
    done
}

# rotate RUN NAME...: each run begins with another image, so that the first four of all runs are as mixed as all are.
rotate() {
    local run=$1 first
    shift
    first=$(((run - 1) * 5 % $#))
    boots=("${@:first + 1}" "${@:1:first}")
}

# storm_job KEY SCHEME RUN POINTS OPTION...: by this scheme, with what all replayed storms have in common.
storm_job() {
    local key=$1 scheme=$2 run=$3 points=$4
    shift 4
    job "r$run-$key-$scheme" "$scheme" "$run" "$points" replay "$scheme" --compute "$compute" --seed "$run" "$@"
}

limits() {
    local run=$1 n counts=(1 4 8 12 ${#boots[@]} 24)
    [ -z "$quick" ] || counts=(1 12)
    for n in "${counts[@]}"; do
        job "r$run-limit-$n" limit "$run" "12b:limit:$n,12c:limit:$n" replay vmar --limit --vms "$n" $(paths "${boots[@]}")
    done
}

# Figure 12; its point of 12 VMs is also one of 13.
number_of_vms() {
    local run=$1 n scheme more counts=(1 4 8 12 24) most=12
    [ -z "$quick" ] || counts=(1 12)
    limits "$run"
    for n in "${counts[@]}"; do
        for scheme in "${schemes[@]}"; do
            more="12a:boot:$n,12w:wait:$n,12b:cache:$n,12c:read:$n,cpu:cpu:$n,private:private:$n"
            [ "$n" != 1 ] || more+=",prefetch:boot:1"
            [ "$n" != 12 ] || more+=",13a:boot:$interval,13b:cache:$interval,13c:read:$interval,rates:boot:calibrated,prefetch:boot:12,prefetch-cache:cache:12"
            [ "$n" != "$most" ] || more+=",copy:boot:boot-among-$n"
            storm_job "vms-$n" "$scheme" "$run" "$more" --poisson --interval "$interval" --rate "$replay_rate" --vms "$n" \
                $(paths "${boots[@]}")
        done
    done
    storm_job "vms-$most" vmar-paper "$run" "12a:boot:$most,12w:wait:$most,12b:cache:$most,12c:read:$most" --poisson --interval "$interval" \
        --rate "$replay_rate" --vms "$most" $(paths "${boots[@]}")
    job "r$run-copy" pre-copy "$run" "copy:mean_s:copy-of-one-image" copy_image "$replay_rate" "${boots[1]}"
}

# Figure 13: the paper's 5 seconds, too.
arrival_rate() {
    local run=$1 scheme gap
    for gap in 5 "$(times 0.2)"; do
        for scheme in "${schemes[@]}"; do
            storm_job "gap-$gap" "$scheme" "$run" "13a:boot:$gap,13b:cache:$gap,13c:read:$gap" --poisson --interval "$gap" \
                --rate "$replay_rate" --vms 12 $(paths "${boots[@]}")
        done
    done
}

# times FACTOR: so many times the interval of the boots, in tenths of a second.
times() {
    jq -n --argjson interval "$interval" --argjson factor "$1" '$interval * $factor * 10 | round / 10'
}

# Figure 14: every image twice, so that what was read is asked for again.
available_memory() {
    local run=$1 scheme mib
    for mib in 384 768 2048; do
        for scheme in "${schemes[@]}"; do
            storm_job "memory-$mib" "$scheme" "$run" "14a:boot:$mib,14c:read:$mib" --poisson --interval "$interval" \
                --rate "$replay_rate" --memory $((mib << 20)) --vms $((2 * ${#boots[@]})) $(paths "${boots[@]}")
        done
    done
}

# Figures 15 to 17: the four application images among others, which only boot; as many VMs as the paper's 30, and one comes in the
# time of a hot boot, unless that is what is looked at.
applications() {
    local run=$1 scheme n gap mib mixed=() i points
    [ ${#apps[@]} -gt 0 ] || return 0
    for ((i = 0; i < 26; i++)); do
        # The applications are every third VM at first; nobody loads one twice.
        [ $((i % 2)) -eq 1 ] || [ $((i / 2)) -ge ${#apps[@]} ] || mixed+=("${apps[i / 2]}")
        mixed+=("${boots[i % ${#boots[@]}]}")
    done
    local few=${#apps[@]} all=${#mixed[@]} own
    own=$(times 2)
    for scheme in "${schemes[@]}"; do
        storm_job "apps-$few" "$scheme" "$run" "15a:app:$few,15b:cache:$few,15c:read:$few" --poisson --interval "$own" \
            --rate "$replay_rate" --vms "$few" $(paths "${apps[@]}")
        storm_job "apps-12" "$scheme" "$run" "15a:app:12,15b:cache:12,15c:read:12" --poisson --interval "$own" \
            --rate "$replay_rate" --vms 12 $(paths "${mixed[@]}")
    done
    for gap in "$own" "$interval" "$(times 0.2)"; do
        points="16a:app:$gap,16b:cache:$gap,16c:read:$gap"
        [ "$gap" != "$own" ] || points+=",15a:app:$all,15b:cache:$all,15c:read:$all,17a:app:not-limited,17b:read:not-limited"
        for scheme in "${schemes[@]}"; do
            # What the raw file on a disk that is not slowed does, it does at any rate.
            [ "$scheme" != pre-copy ] || [ "$gap" = "$own" ] || continue
            storm_job "apps-$all-gap-$gap" "$scheme" "$run" "$points" --poisson --interval "$gap" --rate "$replay_rate" \
                --vms "$all" $(paths "${mixed[@]}")
        done
    done
    for scheme in on-demand vmar; do
        storm_job "apps-$all-memory-768" "$scheme" "$run" "17a:app:768,17b:read:768" --poisson --interval "$own" \
            --rate "$replay_rate" --memory $((768 << 20)) --vms "$all" $(paths "${mixed[@]}")
    done
}

# Figure 18, several short rounds in turn, always of the same image.
overhead() {
    local run=$1 scheme round sweep image=${every[1]} rounds=(1 2)
    [ -z "$quick" ] || rounds=(1)
    for round in "${rounds[@]}"; do
        for sweep in random sequential; do
            for scheme in pre-copy vmar on-demand; do
                job "r$run-sweep-$sweep-$round-$scheme" "$scheme" "$run" "18:mean_s:$sweep" replay "$scheme" --seed "$round" \
                    --sweep "$sweep" --image "$image"
            done
        done
        [ -n "$guests" ] && [ -z "$quick" ] || continue
        for scheme in pre-copy vmar on-demand; do
            job "r$run-sweep-guest-$round-$scheme" "$scheme" "$run" "18-guest:random_s:random,18-guest:sequential_s:sequential" \
                sweep_guest "$scheme" --seed "$round" --image "$image"
        done
    done
}

# Emulated or not: their processor time is told apart.
real_guests() {
    local run=$1 n scheme counts=(1 4 12)
    [ -z "$quick" ] || counts=(2)
    for n in "${counts[@]}"; do
        [ "$n" -le ${#boots[@]} ] || continue
        for scheme in on-demand vmar; do
            job "r$run-guests-$n-$scheme" "$scheme" "$run" \
                "guests-boot:guest_boot:$n,guests-cache:guest_cache:$n,guests-read:guest_read:$n,guests-cpu:guest_cpu:$n,guests-queue:guest_queue:$n,guests-idle:guest_idle:$n" \
                guest "$scheme" --poisson --interval "$guest_interval" --seed "$run" "${boots[@]:0:n}"
        done
    done
}

beyond_the_paper() {
    local run=$1 scheme
    # Other rates of the storage.
    for scheme in on-demand vmar; do
        storm_job "rate-20" "$scheme" "$run" "rates:boot:20-MB/s" --poisson --interval "$interval" --rate 20000000 --vms 12 \
            $(paths "${boots[@]}")
        storm_job "rate-none" "$scheme" "$run" "rates:boot:not-slowed" --poisson --interval "$interval" --vms 12 \
            $(paths "${boots[@]}")
    done
    # A hundred VMs.
    for scheme in on-demand vmar; do
        storm_job "hundred" "$scheme" "$run" "12a:boot:100,12w:wait:100,12b:cache:100,12c:read:100,cpu:cpu:100,private:private:100" \
            --poisson --interval "$interval" --rate "$replay_rate" --vms 100 $(paths "${boots[@]}")
    done
    # One after the other: each image is new to a host that the ones before have warmed.
    for scheme in on-demand vmar; do
        storm_job "one-by-one" "$scheme" "$run" "warm:each:0" --one-by-one --rate "$replay_rate" --vms ${#boots[@]} \
            $(paths "${boots[@]}")
    done
    # Prefetch: the VM's own trace, and that of one other image for all.
    job "r$run-prefetch-own-1" vmar+own-trace "$run" "prefetch:boot:1" replay vmar --compute "$compute" --seed "$run" \
        --rate "$replay_rate" --vms 1 --prefetch $(paths "${boots[@]}")
    job "r$run-prefetch-own-12" vmar+own-trace "$run" "prefetch:boot:12,prefetch-cache:cache:12" replay vmar \
        --compute "$compute" --seed "$run" --poisson --interval "$interval" --rate "$replay_rate" --vms 12 --prefetch \
        $(paths "${boots[@]}")
    job "r$run-prefetch-other-1" vmar+trace-of-another "$run" "prefetch:boot:1" replay vmar --compute "$compute" --seed "$run" \
        --rate "$replay_rate" --vms 1 "--serve=--prefetch=$traces/${boots[2]}.trace" $(paths "${boots[@]}")
    job "r$run-prefetch-other-12" vmar+trace-of-another "$run" "prefetch:boot:12,prefetch-cache:cache:12" replay vmar \
        --compute "$compute" --seed "$run" --poisson --interval "$interval" --rate "$replay_rate" --vms 12 \
        "--serve=--prefetch=$traces/${boots[2]}.trace" $(paths "${boots[@]}")
}
