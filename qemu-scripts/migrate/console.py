#!/usr/bin/env python3
"""Runs a bash script in a guest, through a root shell on one of its serial ports (systemd.debug_shell=).

usage: console.py SOCKET SECONDS [ARGUMENT...] <SCRIPT

SOCKET is QEMU's end of the port. Script and output travel as base64: the terminal echoes, and would change some characters.
Prints what the script prints and ends as it ends; 124 when it has not ended after SECONDS.
"""

import base64
import os
import shlex
import socket
import sys
import time


def main():
    path, limit, arguments = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    # Two scripts of one guest never share a file, nor does an answer that comes late belong to the next one.
    name = "%x" % time.time_ns()
    file = f"/run/vmar-{name}"
    # In lines that fit into a terminal's.
    script = base64.encodebytes(sys.stdin.buffer.read()).decode()
    words = " ".join(shlex.quote(a) for a in arguments)
    # The echo of these lines has the pieces of the markers, never the markers.
    text = (
        f"\nbase64 -d >{file} <<'VMAR'\n{script}VMAR\n"
        f"bash {file} {words} >{file}.out 2>&1 </dev/null; s=$?\n"
        f"printf 'VMAR-%s-{name}\\n' BEGIN; base64 {file}.out; printf 'VMAR-%s-{name} %s\\n' END $s; rm -f {file} {file}.out\n"
    )
    begin, end = f"VMAR-BEGIN-{name}".encode(), f"VMAR-END-{name} ".encode()
    port = socket.socket(socket.AF_UNIX)
    port.connect(path)
    port.settimeout(1)
    port.sendall(text.encode())
    got, until = b"", time.monotonic() + limit
    while not (end in got and b"\n" in got[got.index(end):]):
        if time.monotonic() > until:
            sys.stderr.write(f"the guest's shell has not answered after {limit:.0f} s: {got[-200:]!r}\n")
            sys.exit(124)
        try:
            data = port.recv(65536)
        except socket.timeout:
            continue
        if not data:
            sys.stderr.write("the guest's serial port has closed\n")
            sys.exit(125)
        got += data
    output = got[got.index(begin) + len(begin):got.index(end)]
    os.write(1, base64.b64decode(output))
    sys.exit(int(got[got.index(end) + len(end):].split()[0]))


main()
