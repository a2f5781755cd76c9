#!/usr/bin/env python3
"""QEMU's own way to keep a VM: migration to a file, packed by zstd. Prints JSON.

usage: plain.py save MONITOR FILE OVERLAY COPY    the VM stands still meanwhile, and its overlay is copied in the same instant
       plain.py restore MONITOR FILE              into a QEMU that was started with -incoming defer; the VM does not run
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import time


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                sys.exit(f"plain.py: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def save(monitor, file, overlay, copy):
    monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": False}])
    monitor.ask("migrate-set-parameters", **{"max-bandwidth": 64 << 30})
    began = time.monotonic()
    monitor.ask("stop")
    monitor.ask("migrate", uri=f"exec:zstd -q -1 -T0 -f -o {shlex.quote(file)}")
    while (said := monitor.ask("query-migrate"))["status"] not in ("completed", "failed"):
        time.sleep(0.005)
    if said["status"] == "failed":
        sys.exit(f"plain.py: {said}")
    subprocess.run(["cp", "--sparse=always", overlay, copy], check=True)
    os.sync()
    seconds = time.monotonic() - began
    monitor.ask("cont")
    print(json.dumps({"seconds": seconds, "bytes": os.stat(file).st_size, "overlay_bytes": os.stat(copy).st_blocks * 512}))


def restore(monitor, file):
    began = time.monotonic()
    monitor.ask("migrate-incoming", uri=f"exec:zstd -q -d -c {shlex.quote(file)}")
    while (status := monitor.ask("query-status")["status"]) == "inmigrate":
        time.sleep(0.005)
    print(json.dumps({"seconds": time.monotonic() - began, "state": status}))


verb, path, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
{"save": save, "restore": restore}[verb](Monitor(path), *arguments)
