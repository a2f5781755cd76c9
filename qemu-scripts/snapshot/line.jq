# One run: bytes that N whole copies take, that the paper's rule takes, and that vmar takes. Of the snapshot "second" the pages, of
# "first" the bytes: it is the one for which the stores had nothing.
(.first.pages) as $p
| (["free", "cache-clean"] | map($p[.] // {pages: 0, zero: 0} | .pages - .zero) | add) as $once
| ($p.disk // {pages: 0, zero: 0} | (.pages - .zero) * 4096) as $disk
| (.first.about.stream_bytes + $disk) as $whole
| ($once + ([$p | to_entries[] | select(.key != "disk") | .value.zero] | add)) as $idle
| .stores as $n
| ($whole * $n) as $native
| ($once * 4096 + ($whole - $once * 4096) * $n) as $paper
| {
    image, load, memory_mib, qemu, accel, stores,
    kernel: .first.about.kernel,
    pages: $p,
    whole_bytes: $whole, native_bytes: $native, paper_bytes: $paper, vmar_bytes: .first_bytes, again_bytes: .second_bytes,
    # As the paper counts: zero pages are pages like others, and kept once.
    ram_native_bytes: ((.first.memory_bytes + $disk) * $n), ram_paper_bytes: ((.first.memory_bytes + $disk) * $n - $idle * 4096 * ($n - 1)),
    saved_paper: (1 - $paper / $native), saved_vmar: (1 - .first_bytes / $native), saved_again: (1 - .second_bytes / $native),
    stood_ms: [.first.stood_ms, .second.stood_ms], save_s: [.first.seconds, .second.seconds],
    plain_first_s: (.untouched | if . then .seconds else null end),
    plain: (.plain | if . then {save_s: .seconds, bytes: (.bytes + .overlay_bytes), restore_s: .restore.seconds,
        saved: (1 - (.bytes + .overlay_bytes) * $n / $native)} else null end),
    audits
  }
