#!/usr/bin/env bash
# What vmar does with real images, measured: speed of `image add` beside sha1sum, statistics against a brute-force count,
# every byte through `vmar serve`, and the page cache after three whole images were read. Not part of tests/run.sh, because
# it needs images: `images/build.sh` makes some.
#
#   tests/real-images.sh DIR [NAME...]     DIR holds NAME.raw; default: web db cache python
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath "${1:?usage: tests/real-images.sh DIR [NAME...]}")
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(web db cache python)

target=${CARGO_TARGET_DIR:-target}/release
cargo build --release --quiet --locked --bin vmar --examples
vmar=$(realpath "${VMAR_BIN:-$target/vmar}")
work=$(mktemp -d "${TMPDIR:-/var/tmp}/vmar-real.XXXXXX")
server=
trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT
fail() { echo "tests/real-images.sh: $*" >&2; exit 1; }
now() { date +%s.%N; }

add=() raws=()
for name in "${names[@]}"; do
  raw=$dir/$name.raw
  [ -e "$raw" ] || fail "$raw is not there: build it with images/build.sh $name"
  add+=("$name=$raw") raws+=("$raw")
done

echo "== image add, beside sha1sum of the same non-hole bytes (page cache warm, median of 3, alternating)"
tar -S -C "$dir" -cf "$work/data.tar" "${names[@]/%/.raw}"
cat "$work/data.tar" "${raws[@]}" >/dev/null
bytes=$(stat -c %s "$work/data.tar")
for _ in 1 2 3; do
  a=$(now); sha1sum "$work/data.tar" >/dev/null; b=$(now)
  rm -rf "${work:?}/lib"; "$vmar" library init "$work/lib" --policy paper
  c=$(now); "$vmar" --library "$work/lib" image add "${add[@]}" 2>"$work/add.log" >&2 || fail "$(tail -n 1 "$work/add.log")"; d=$(now)
  echo "$a $b $c $d" >>"$work/times"
done
awk -v n="$bytes" '{ s[NR] = n / ($2 - $1) / 1048576; v[NR] = n / ($4 - $3) / 1048576; r[NR] = v[NR] / s[NR] }
  function median(x) { asort_(x); return x[2] }
  function asort_(x,  i, j, t) { for (i = 1; i < 3; i++) for (j = i + 1; j <= 3; j++) if (x[j] < x[i]) { t = x[i]; x[i] = x[j]; x[j] = t } }
  END { printf "%.0f MiB: sha1sum %.0f MiB/s, vmar image add %.0f MiB/s (all of it: hashing, comparing, map), ratio %.2f\n", n / 1048576, median(s), median(v), median(r) }' "$work/times"
rm "$work/data.tar"
export VMAR_LIBRARY=$work/lib

echo "== stats, beside a brute-force count of the bytes"
"$vmar" stats
"$vmar" stats --json | jq -S 'del(.images[].map_bytes)' >"$work/ours"
"$target/examples/brute_force" "${add[@]}" | jq -S 'del(.images[].map_bytes)' >"$work/theirs"
# Shares are quotients of the same integers; JSON printers may differ in the last digit.
round='(.duplicated_ge2, .shared_ge2_images, .shared_gt3_images) |= (. * 1e12 | round)'
diff <(jq "$round" "$work/ours") <(jq "$round" "$work/theirs") || fail "stats and the brute-force count differ"
echo "the same: $(jq -c '{nonzero_blocks, unique_blocks, clusters}' "$work/ours")"
for name in "${names[@]}"; do
  "$vmar" map show "$name" | grep -A4 'search depth' | sed "s/^/$name: /"
done

# compare IMAGE RAW
compare() {
  rm -f "$work/sock"
  "$vmar" serve --image "$1" --read-only --socket-path "$work/sock" &
  server=$!
  for _ in $(seq 100); do [ -S "$work/sock" ] && break; sleep 0.05; done
  "$target/examples/compare" "$work/sock" "$2" || fail "image $1 does not read right"
  kill "$server"; wait "$server" || fail "vmar serve ended with an error"
}

echo "== page cache after three whole images were read through vmar (fincore)"
three=("${names[@]:0:3}")
sync
for raw in "${raws[@]}"; do dd if="$raw" iflag=nocache count=0 status=none; done
for name in "${three[@]}"; do compare "$name" "$dir/$name.raw"; done
pages=$(fincore --bytes --noheadings --output PAGES "${raws[@]}" | awk '{ s += $1 } END { print s }')
rm -rf "${work:?}/three"; "$vmar" library init "$work/three" --policy paper
only=()
for name in "${three[@]}"; do only+=("$name=$dir/$name.raw"); done
unique=$("$target/examples/brute_force" "${only[@]}" | jq .unique_blocks)
awk -v p="$pages" -v u="$unique" -v n="${three[*]}" 'BEGIN {
  printf "%s: %d pages (%.1f MiB) cached, unique content %d blocks (%.1f MiB), ratio %.3f\n", n, p, p / 256, u, u / 256, p / u
  exit p > 1.1 * u }' || fail "more than 1.1 x the unique content is cached"

echo "== every byte of every image, the last one also added as qcow2"
for name in "${names[@]}"; do compare "$name" "$dir/$name.raw"; done
last=${names[-1]}
qemu-img convert -f raw -O qcow2 "$dir/$last.raw" "$work/last.qcow2"
"$vmar" image add "as-qcow2=$work/last.qcow2" 2>/dev/null
compare as-qcow2 "$dir/$last.raw"
echo "== all right"
