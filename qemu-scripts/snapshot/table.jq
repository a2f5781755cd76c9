# Runs as a table for people.
def mb: . / 1e6 * 10 | round / 10 | tostring;
def pc: . * 1000 | round / 10 | "\(.)%";
def s: . * 100 | round / 100 | tostring;
def median: sort | .[length / 2 | floor];
"", "| guest | N whole copies, MB | PARS, MB | vmar, MB | again, MB | saved: PARS | vmar | again | of all RAM: PARS | vmar | stands still, ms | save, s | restore, s |",
"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
(.[] | "| \(.image), \(.load), \(.memory_mib) MiB | \(.native_bytes | mb) | \(.paper_bytes | mb) | \(.vmar_bytes | mb) | \(.again_bytes | mb) | \(.saved_paper | pc) | \(.saved_vmar | pc) | \(.saved_again | pc) | \(1 - .ram_paper_bytes / .ram_native_bytes | pc) | \(1 - .vmar_bytes / .ram_native_bytes | pc) | \(.stood_ms | map(round | tostring) | join(", ")) | \(.save_s | map(s) | join(", ")) | \([.audits[] | select(.disk_s) | .disk_s + .memory_s] | if length > 0 then median | s else "-" end) |"),
(.[] | select(.plain) | "QEMU to a file, zstd -1: saved in \(.plain_first_s // 0 | s) s before and \(.plain.save_s | s) s after vmar (stands still), loaded in \(.plain.restore_s | s) s, \(.plain.bytes * .stores | . / 1e6 * 10 | round / 10) MB for \(.stores) copies, \(.plain.saved | pc) saved"),
(.[] | .audits[] | "\(.what): \(.state)\(if .state != .expected then ", BUT \(.expected) WAS EXPECTED" else "" end)\(if .lost_pages > 0 then ", \(.lost_pages) pages lost" else "" end)")
