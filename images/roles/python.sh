# A scientific Python service: it imports numpy and solves something before it counts as started.
# shellcheck shell=bash disable=SC2034
role_kernel=older
role_packages="python3 python3-numpy python3-pandas"
# What pandas recommends is plotting and compilers, half a gigabyte of them.
role_apt_options=--no-install-recommends
role_units="vmar-solver.service"

# The library for tables, which the service does not need.
role_app='python3 -c "import pandas; print(pandas.DataFrame({1: [1, 2, 3]}).describe())"'

role_configure() {
    local root=$1
    install -D -m 0755 /dev/stdin "$root/usr/local/bin/vmar-solver" <<'PY'
#!/usr/bin/python3
"""Solves a small linear system, says so, and then waits to be stopped."""
import os
import signal
import socket

import numpy

a = numpy.eye(64) * 64 + numpy.random.default_rng(1).random((64, 64))
x = numpy.linalg.solve(a, a @ numpy.ones(64))
assert numpy.allclose(x, 1)

notify = os.environ.get("NOTIFY_SOCKET")
if notify:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.connect(notify.replace("@", "\0", 1))
        s.send(b"READY=1")
signal.pause()
PY
    install -D -m 0644 /dev/stdin "$root/etc/systemd/system/vmar-solver.service" <<'UNIT'
[Unit]
Description=A service in scientific Python

[Service]
Type=notify
ExecStart=/usr/local/bin/vmar-solver
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
UNIT
    in_image systemctl enable vmar-solver.service
}
