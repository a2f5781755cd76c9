#!/usr/bin/env python3
"""One live migration from QEMU to QEMU, through proxies or not, and what it took.

usage: move.py SPEC

SPEC is JSON:
  source, destination  QMP sockets of the two QEMUs; the destination was started with -incoming defer
  capabilities         names, switched on at both ends; others of CAPABILITIES are switched off
  parameters           of migrate-set-parameters, set at both ends
  incoming, migrate    where the destination listens, and where the source goes (URIs of QEMU)
  taps                 commands that run from before the proxies until the end: [[word, ...], ...]
  receive, send        commands of the two proxies, or null
  logs                 directory for what these say
  limit                seconds after which the migration is cancelled

Prints one line of JSON: state (QEMU's: completed, failed, cancelled; or error) and error, and then source_runs; of the source's query-migrate total_ms,
downtime_ms, setup_ms and ram; by the host's clock, from the command on, wall_ms (until the VM runs at the destination) and
blackout_ms (between the two QEMUs' STOP and RESUME: longer than downtime_ms, which ends when the source has sent all);
ready_ms (from the sender's start until it takes QEMU's stream); cpu_ms of the proxies; send (what the sender printed).
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
CAPABILITIES = ("return-path", "xbzrle", "multifd")


class Failed(Exception):
    pass


class Monitor:
    """A QMP client that keeps the events with their times."""

    def __init__(self, name, path):
        self.name, self.events, self.lines, self.rest = name, {}, [], b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.take(30)
        self.lines.pop(0)
        self.ask("qmp_capabilities")

    def take(self, timeout):
        """Reads what has come; waits for a line no longer than this. An event is noted, anything else goes to lines."""
        until = time.monotonic() + timeout
        while not self.lines:
            left = until - time.monotonic()
            if left < 0 or not select.select([self.socket], [], [], left)[0]:
                return
            data = self.socket.recv(65536)
            if not data:
                raise Failed(f"{self.name}: its monitor has closed")
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "event" in said:
                    at = said["timestamp"]
                    # The last one counts: a migration that fails late stops the VM and runs it again.
                    self.events[said["event"]] = at["seconds"] + at["microseconds"] / 1e6
                else:
                    self.lines.append(said)

    def ask(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.take(60)
        if not self.lines:
            raise Failed(f"{self.name}: {command}: no answer")
        answer = self.lines.pop(0)
        if "error" in answer:
            raise Failed(f"{self.name}: {command}: {answer['error']['desc']}")
        return answer["return"]

    def configure(self, spec):
        # A QEMU that has been a destination still has what it was told then.
        capabilities = [{"capability": name, "state": name in spec["capabilities"]} for name in CAPABILITIES]
        self.ask("migrate-set-capabilities", capabilities=capabilities)
        self.ask("migrate-set-parameters", **spec["parameters"])


class Helper:
    """A process of this move. It ends with this script, whatever ends this script."""

    def __init__(self, name, command, logs):
        self.name, self.log = name, os.path.join(logs, name + ".log")
        libc = ctypes.CDLL(None)
        with open(self.log, "wb") as err, open(os.path.join(logs, name + ".out"), "wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        self.status, self.cpu_ms = None, None

    def ended(self):
        if self.status is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.process.returncode = self.status
                self.cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000)
        return self.status is not None

    def says(self, word, seconds):
        """Waits until it has said this."""
        until = time.monotonic() + seconds
        while True:
            with open(self.log, encoding="utf-8", errors="replace") as log:
                if word in log.read():
                    return
            if self.ended() or time.monotonic() > until:
                raise Failed(f"{self.name}: {self.last()}")
            time.sleep(0.02)

    def last(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            lines = log.read().strip().splitlines()
        return lines[-1] if lines else "has not said anything"

    def wait(self, seconds):
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.stop()
                raise Failed(f"{self.name} has not ended after {seconds} s: {self.last()}")
            time.sleep(0.02)

    def stop(self):
        if not self.ended():
            self.process.kill()
            while not self.ended():
                time.sleep(0.02)


def run(spec, source, destination, helpers, result):
    destination.configure(spec)
    destination.ask("migrate-incoming", uri=spec["incoming"])
    for number, tap in enumerate(spec["taps"]):
        helpers[f"tap{number}"] = Helper(f"tap{number}", tap, spec["logs"])
    if spec["receive"]:
        helpers["receive"] = Helper("receive", spec["receive"], spec["logs"])
        helpers["receive"].says("waits for a sender", 60)
        began = time.monotonic()
        helpers["send"] = Helper("send", spec["send"], spec["logs"])
        helpers["send"].says("ready for VM", 600)
        result["ready_ms"] = round((time.monotonic() - began) * 1000)
    source.configure(spec)
    source.events.clear()
    destination.events.clear()
    began, cancelled = time.time(), False
    source.ask("migrate", uri=spec["migrate"])
    while True:
        said = source.ask("query-migrate")
        if said.get("status") in ("completed", "failed", "cancelled"):
            break
        if not cancelled and time.time() - began > spec["limit"]:
            source.ask("migrate_cancel")
            cancelled = True
        destination.take(0.05)
    result["state"] = said["status"]
    if said["status"] != "completed":
        result["error"] = f"no end after {spec['limit']} s" if cancelled else said.get("error-desc", "QEMU does not say why")
        for name in ("send", "receive"):
            if name in helpers:
                helpers[name].wait(60)
                result["error"] += f"; {name}: {helpers[name].last()}"
        return
    until = time.monotonic() + 60
    while "RESUME" not in destination.events:
        if time.monotonic() > until:
            raise Failed("the VM does not run at the destination")
        destination.take(0.05)
    resumed = destination.events["RESUME"]
    result.update(total_ms=said["total-time"], downtime_ms=said["downtime"], setup_ms=said["setup-time"], ram=said["ram"],
                  wall_ms=round((resumed - began) * 1000), blackout_ms=round((resumed - source.events["STOP"]) * 1000))
    if spec["receive"]:
        for name in ("send", "receive"):
            helpers[name].wait(120)
            if helpers[name].status != 0:
                raise Failed(f"{name}: {helpers[name].last()}")
        with open(os.path.join(spec["logs"], "send.out"), encoding="utf-8") as out:
            result["send"] = json.load(out)
        result["cpu_ms"] = {name: helpers[name].cpu_ms for name in ("send", "receive")}


def give_up(source):
    """Whatever went wrong: the source is to be ready for another migration. Whether its VM runs."""
    until = time.monotonic() + 30
    while source.ask("query-migrate").get("status", "none") not in ("none", "completed", "failed", "cancelled"):
        if time.monotonic() > until:
            raise Failed("the source's migration does not end")
        source.ask("migrate_cancel")
        time.sleep(0.1)
    return source.ask("query-status")["running"]


def main():
    spec, helpers = json.loads(sys.argv[1]), {}
    names = ("error", "total_ms", "downtime_ms", "setup_ms", "ram", "wall_ms", "blackout_ms", "ready_ms", "cpu_ms", "send")
    result = {"state": "error"} | dict.fromkeys(names)
    source, destination = Monitor("source", spec["source"]), Monitor("destination", spec["destination"])
    try:
        run(spec, source, destination, helpers, result)
    except (Failed, OSError, ValueError, KeyError) as why:
        result["state"], result["error"] = "error", str(why) if isinstance(why, Failed) else f"{type(why).__name__}: {why}"
        result["error"] += "".join(f"; {name}: {helpers[name].last()}" for name in ("send", "receive") if name in helpers)
    for helper in helpers.values():
        helper.stop()
    if result["state"] != "completed":
        result["source_runs"] = give_up(source)
    print(json.dumps(result))


main()
