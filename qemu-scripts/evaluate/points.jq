# A line for each point of a measurement: what `vmar report` reads (docs/report.md).
def mib: . / 1048576;
def mean: if length == 0 then null else add / length end;
def metric(name):
    if name == "boot" then .mean_s
    elif name == "wait" then .mean_wait_s
    elif name == "app" then .mean_app_s
    elif name == "cache" then .cached_bytes | mib
    elif name == "read" then .read_bytes | mib
    elif name == "limit" then .limit_bytes | mib
    elif name == "cpu" then .server_cpu_s / .vms * 1000
    elif name == "private" then .private_kib / .vms / 1024
    elif name == "guest_boot" then [.vms[].boot_ms] | mean / 1000
    elif name == "guest_cache" then .cache.images_bytes | mib
    elif name == "guest_read" then .disk.read_bytes | mib
    elif name == "guest_cpu" then [.vms[].cpu.vcpu_ms] | mean / 1000
    elif name == "guest_queue" then [.vms[].cpu.runqueue_ms] | mean / 1000
    elif name == "guest_idle" then [.vms[].cpu.idle_ms] | mean / 1000
    elif name == "mean_s" or name == "random_s" or name == "sequential_s" then .[name]
    else error("no metric \(name)") end;
. as $file
| .points[] | select(.figure != "none") | . as $point
| if .metric == "each" then
    $file.result.boot_s | to_entries[] | {figure: $point.figure, x: (.key + 1), scheme: $file.series, value, run: $file.run}
  else
    {figure, x, scheme: $file.series, value: (.metric as $name | $file.result | metric($name)), run: $file.run}
  end
| select(.value != null)
