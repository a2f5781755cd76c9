# The moves as a table, in Markdown that can be read as it is. Input: the lines of points.jsonl, slurped; --argjson setup: run.json.
# Medians of the moves that came to their end and were verified.

def median: sort | if length == 0 then null elif length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
def places($n): if . == null then "" else . * pow(10; $n) | round | tostring
    | if $n == 0 then . else (if length <= $n then "0" * ($n + 1 - length) + . else . end) | .[:-$n] + "." + .[-$n:] end end;
def pad($n): . + " " * ([$n - length, 0] | max);
def ratio($a; $b): if $a == null or $b == null or $b == 0 then "" else $a / $b | places(if . < 0.1 then 3 else 2 end) end;

# What each mode took, in the order of the first moves.
def rows:
    reduce .[] as $p ([]; ($p | .mode + if .leg then ", " + .leg else "" end) as $name
        | (map(.name) | index([$name])) as $i
        | if $i == null then . + [{$name, moves: [$p]}] else .[$i].moves += [$p] end)
    | map((.moves | map(select(.state == "completed" and .verified))) as $good | {
        name, moves: (.moves | length), verified: ($good | length),
        bytes: ($good | map(.link.there + .link.back) | median), seconds: ($good | map(.total_ms / 1000) | median),
        wall: ($good | map(.wall_ms / 1000) | median), downtime: ($good | map(.downtime_ms) | median),
        blackout: ($good | map(.blackout_ms) | median), ready: ($good | map((.ready_ms // empty) / 1000) | median),
        pages: ($good | map(.send.pages // empty) | if length == 0 then null else
            [["zero", "kept", "base", "template", "intra", "literal"][] as $class | map(.[$class]) | median] end),
        cpu: ($good | map(.cpu_ms // empty) | if length == 0 then null else
            {send: (map(.send / 1000) | median), receive: (map(.receive / 1000) | median)} end)});

def cells($default; $multifd):
    [.name, "\(.verified)/\(.moves)", (if .bytes then .bytes / 1e6 | places(1) else "" end), ratio(.bytes; $default.bytes), ratio(.bytes; $multifd.bytes),
        (.seconds | places(1)), ratio(.seconds; $default.seconds), ratio(.seconds; $multifd.seconds), (.wall | places(1)),
        (.downtime | places(0)), (.blackout | places(0)), (.ready | places(1))]
    + (.pages as $p | if $p == null then [range(6) | ""] else ($p | add) as $all | $p | map(. * 100 / $all | places(1)) end)
    + if .cpu then [(.cpu.send | places(1)), (.cpu.receive | places(1))] else ["", ""] end;

rows as $rows
| ($rows | map(select(.name == "default"))[0]) as $default
| ($rows | map(select(.name == "multifd-zstd"))[0]) as $multifd
| [["mode", "verified", "MB", "÷ default", "÷ multifd", "s", "÷ default", "÷ multifd", "runs after s", "downtime ms", "still ms", "ready s",
    "zero %", "kept %", "base %", "template %", "repeated %", "sent %", "send CPU s", "receive CPU s"]]
    + [$rows[] | cells($default; $multifd)]
| [transpose[] | (map(length) | max) as $width | map(pad($width))] | transpose
| "\($setup.image), \($setup.memory_mib) MiB, \($setup.smp) processor(s), load \($setup.load), QEMU \($setup.qemu | unique | join(" to ")) (\($setup.accel)) on \($setup.processors) processors, link \($setup.rate)",
    (if $setup.template then "Template of \($setup.template.images | join(", ")): \($setup.template.pages) pages that \($setup.template.share) of them have" else empty end),
    "",
    (.[0] | "| " + join(" | ") + " |"), (.[0] | "|" + (map("-" * (length + 2)) | join("|")) + "|"), (.[1:][] | "| " + join(" | ") + " |"),
    "",
    "MB: on the link, both ways. s, downtime: as the source QEMU says. By the host's clock: runs after, until the VM runs at the destination;",
    "still, between its last moment at the source and its first there; ready, from the sender's start until it takes QEMU's stream, before all",
    "others. Pages: how they travelled, of all that QEMU sent, all rounds."
