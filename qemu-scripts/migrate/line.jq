# One line of points.jsonl, for people.
def mb: . / 1e5 | round / 10;
"round \(.round), \(.mode)\(if .leg then " (\(.leg))" else "" end), \(.from) to \(.to): "
+ if .state == "completed" then
    "\(.link | .there + .back | mb) MB, \(.total_ms / 100 | round / 10) s, downtime \(.downtime_ms) ms (still for \(.blackout_ms) ms)"
    else "\(.state): \(.error)" end
+ if .send then
    ", pages " + (.send.pages | "zero \(.zero) kept \(.kept) base \(.base) template \(.template) repeated \(.intra) sent \(.literal)")
    else "" end
+ if .exact == null or .state != "completed" then "" elif .exact then ", exact" else ", NOT THE SAME STREAM" end
+ if .wrong then ", WRONG: \(.wrong)" elif .state == "completed" then ", verified" else ", the guest goes on where it was" end
+ if .note then " (the guest notes: \(.note))" else "" end
