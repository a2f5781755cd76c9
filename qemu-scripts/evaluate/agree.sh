#!/usr/bin/env bash
# Whether two evaluations agree: for each point that both have measured, whether their error bars meet.
set -euo pipefail

usage() {
    cat <<EOF
usage: qemu-scripts/evaluate/agree.sh DIR DIR

DIR: what qemu-scripts/evaluate.sh had as --out (its points.jsonl is read). Prints a line for each point: mean ± standard
deviation of both, and whether the bars meet; then how many do. Points that were measured once have no bar and are left out.
The exit status is 1 if less than nine in ten meet: bars of three runs miss the mean of three others now and then.
EOF
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -eq 2 ] || { usage >&2; exit 2; }
for dir in "$@"; do
    [ -s "$dir/points.jsonl" ] || { echo "agree.sh: $dir/points.jsonl is not there: let qemu-scripts/evaluate.sh --out $dir make it" >&2; exit 1; }
done
jq -rn --slurpfile a "$1/points.jsonl" --slurpfile b "$2/points.jsonl" '
    def mean: add / length;
    def deviation: mean as $m | (map((. - $m) * (. - $m)) | add) / (length - 1) | sqrt;
    def points: group_by([.figure, (.x | tostring), .scheme])
        | map(select(length > 1) | {key: "\(.[0].figure) \(.[0].x) \(.[0].scheme)", value: (map(.value) | {mean: mean, sd: deviation})})
        | from_entries;
    def short: . * 1000 | round / 1000;
    ($a | points) as $a | ($b | points) as $b
    | [$a | to_entries[] | . as {key: $key, value: $one} | $b[$key] | values
        | {key: $key, one: $one, two: ., meet: (($one.mean - .mean | fabs) <= $one.sd + .sd)}] as $all
    | ($all[] | "\(if .meet then "meet" else "MISS" end)  \(.key): \(.one.mean | short) ± \(.one.sd | short), \(.two.mean | short) ± \(.two.sd | short)"),
        "\($all | map(select(.meet)) | length) of \($all | length) points agree",
        (if ($all | length) == 0 or ($all | map(select(.meet)) | length) * 10 < ($all | length) * 9 then halt_error(1) else empty end)' || exit 1
