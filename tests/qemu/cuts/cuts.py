"""Moves a VM from place to place over a link that is cut, and looks where it is alive. Started by tests/qemu/cuts.sh."""

import argparse
import glob
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, deque

from link import HANDSHAKE_BYTES, PARTS, Cut, Link
from places import PATIENCE_S, Failure, Gone, Place, spawn, text, wait_for

SAMPLE_S = 0.02
LAST_BYTES = 200_000
SLOT_BYTES = 4096
# Numbers that the guest has to count on after each move.
GOES_ON = 3
STYLES = ("shut", "reset", "forward", "back", "freeze")
# A cut that comes too late, as the migration was shorter than the last whole one, is tried again so often.
TRIES = 6


class Ticks:
    """What the guest counts, wherever it runs: every number once, in order, with the checksum of all before."""

    def __init__(self, slots):
        self.number, self.sum, self.passes = 0, "0", (0, 0)
        self.last = deque(maxlen=slots)
        self.end = None
        self.rest = b""

    def follow(self, place):
        """From now on it runs there; a line may have been begun elsewhere."""
        self.file, self.offset = place.ticks, 0

    def read(self):
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).replace(b"\r", b"").split(b"\n")
        for line in lines:
            self.line(line.decode(errors="replace").split())
        return self.number

    def line(self, words):
        if words[:1] == ["VMAR-TICK"] and len(words) == 5:
            number, expected = self.number + 1, hashlib.md5(f"{self.number + 1} {self.sum}\n".encode()).hexdigest()
            if words[1:3] != [str(number), expected]:
                raise Failure(f"the guest said {' '.join(words)}, {number} {expected} was next ({self.file})")
            self.number, self.sum, self.passes = number, expected, (int(words[3]), int(words[4]))
            self.last.append((number, expected))
        elif words[:1] == ["VMAR-END"] and len(words) == 6 and words[2] == self.sum:
            self.end = int(words[5])
        elif words:
            raise Failure(f"the guest said: {' '.join(words)} ({self.file})")


class Watch(threading.Thread):
    """Asks both QEMUs all the time. Once a destination runs nothing stops it: both run if the source still does when it is asked
    after it."""

    def __init__(self, here, there):
        super().__init__(daemon=True)
        self.here, self.there = here, there
        self.samples, self.both = 0, []
        self.over = threading.Event()
        self.error = None

    def run(self):
        try:
            while not self.over.wait(SAMPLE_S):
                there = self.there.monitor.status()
                here = self.here.monitor.status()
                self.samples += 1
                if here == there == "running":
                    self.both.append(time.time())
        except Failure as e:
            self.error = e

    def end(self):
        self.over.set()
        self.join()
        if self.error:
            raise self.error


def record(directory):
    """The state that a proxy has written down, if any."""
    found = glob.glob(os.path.join(directory, "*.json"))
    if len(found) > 1:
        raise Failure(f"more than one record in {directory}")
    return json.loads(text(found[0]))["state"] if found else None


class Attempt:
    """One migration, cut or not."""

    def __init__(self, rig, here, there, cut):
        self.rig, self.here, self.there, self.cut = rig, here, there, cut
        self.proxies = {}
        self.began = time.time()
        self.watch = Watch(here, there)

    def path(self, name):
        return self.there.path(name)

    def killed(self, who):
        return self.cut.style == who and self.link.done and self.cut.kind != "whole"

    def spawn(self, who, *command):
        command = [self.rig.vmar, "migrate", *command, "--records", self.path(f"{who}.records")]
        self.proxies[who] = spawn(command, self.path(f"{who}.out"), self.path(f"{who}.log"))
        return self.proxies[who]

    def log(self, who):
        return text(self.path(f"{who}.log"))

    def says(self, who, pattern):
        """What it says, or that it has ended without."""
        return re.search(pattern, self.log(who)) or self.proxies[who].poll() is not None

    def run(self):
        """Until both proxies have ended."""
        here, there = self.here, self.there
        self.spawn(
            "receiver", "receive", "--library", there.library, "--listen", "127.0.0.1:0", "--destination", there.path("in.sock"),
            "--qmp", there.path("other.sock"),
        )  # fmt: skip
        address = wait_for("the receiver listens", lambda: self.says("receiver", r"waits for a sender at (\S+):(\d+)"))
        if address is True:
            raise Failure(f"the receiver does not listen: {self.log('receiver')}")
        self.link = Link(
            (address[1], int(address[2])), self.cut, lambda: not here.monitor.runs,
            lambda: record(self.path("sender.records")) == "moved", lambda who: self.proxies[who].kill(),
        )  # fmt: skip
        self.link.start()
        self.spawn(
            "sender", "send", "--library", here.library, "--image", "guest", "--vm", "guest", "--source", self.path("out.sock"),
            "--link", f"127.0.0.1:{self.link.port}", "--workers", str(PARTS // 4), "--json",
        )  # fmt: skip
        self.watch.start()
        wait_for("the sender is ready", lambda: self.says("sender", "ready for VM"))
        if self.proxies["sender"].poll() is None:
            here.monitor.ask("migrate-set-parameters", **{"max-bandwidth": 4_000_000_000, "downtime-limit": 300})
            on = {"capability": "return-path", "state": True}
            here.monitor.ask("migrate-set-capabilities", capabilities=[on])
            here.monitor.ask("migrate", uri=f"unix:{self.path('out.sock')}")
        for who, process in self.proxies.items():
            try:
                process.wait(2 * PATIENCE_S)
            except subprocess.TimeoutExpired as e:
                link = f"{self.link.passed} bytes passed, {self.link.forward.frames} frames, {self.link.back.acks} acknowledged"
                raise Failure(f"the {who} does not end ({link}): {self.log(who)}") from e
        self.link.join(PATIENCE_S)
        if self.link.is_alive():
            raise Failure("the link does not end")

    def settled(self):
        """Somebody runs the VM, or it was given away and nobody will."""
        return "running" in (self.here.monitor.status(), self.there.monitor.status()) or (
            record(self.path("sender.records")) == "moved" and self.source_ended()
        )

    def source_ended(self):
        return self.here.monitor.ask("query-migrate").get("status") in ("completed", "failed", "cancelled", None)

    def conclude(self):
        """Where it is, after all; what the logs say to do was done. True, and what it was called, if it has moved."""
        source, destination = self.here.monitor.status(), self.there.monitor.status()
        if source == destination == "running":
            raise Failure("it runs at both")
        if source == "running":
            return False, self.stayed()
        if destination == "running":
            return True, self.moved("" if self.killed("sender") else "confirmed")
        return self.doubt(source)

    def expect(self, **wanted):
        """What both sides have written down and how they ended must be what is seen."""
        seen = {
            "sent": record(self.path("sender.records")),
            "received": record(self.path("receiver.records")),
            "sender": None if self.killed("sender") else self.proxies["sender"].returncode,
            "receiver": None if self.killed("receiver") else self.proxies["receiver"].returncode,
            "migration": self.here.monitor.ask("query-migrate").get("status"),
        }
        for name, values in wanted.items():
            if seen[name] not in values:
                raise Failure(f"{name} is {seen[name]}, not {' or '.join(map(str, values))}: {seen}")

    def in_doubt(self):
        return "whose it is is not known" in self.log("receiver")

    def stayed(self):
        if self.in_doubt() and self.mend() != "quit":
            raise Failure("it runs at the source, and by what the receiver says to do it would run at both")
        # One that was killed may have written down what it could not do.
        sent = ("stayed", "begun") + (("moved",) if self.killed("sender") else ())
        ended = {"sender": (None, 1), "receiver": (None, 1), "migration": ("failed", None)}
        self.expect(sent=sent, received=(None, "begun"), **ended)
        return "stayed: quit" if self.in_doubt() else "stayed"

    def moved(self, how):
        ended = {"sender": (None, 0, 1), "receiver": (None, 0), "migration": ("completed",)}
        self.expect(sent=("moved",), received=("arrived",), **ended)
        if not self.killed("receiver") and "has arrived and runs" not in text(self.path("receiver.out")):
            raise Failure("the receiver does not say that it runs")
        if not how:
            return "moved"
        confirmed = json.loads(text(self.path("sender.out")))["confirmed"]
        if confirmed != (self.proxies["sender"].returncode == 0) or confirmed == self.disowned():
            raise Failure("the sender's words and its exit status differ")
        return "moved" if confirmed else "moved: not confirmed"

    def disowned(self):
        """The sender says that it does not know whether it runs, and what is to be done then."""
        words = r"it belongs to the receiver, .*if it does not run there, say 'cont' to its QEMU there"
        return bool(re.search(words, self.log("sender"), re.S))

    def mend(self):
        """What is to be done by what the receiver has said: the source's QEMU, and the file that it names, are looked at. The sender has
        ended: before, what it has written down may change."""
        words = r"""if QEMU runs the VM there, '(\w+)' here; if not, and (\S+\.sent\.json) there has "(\w+)", say '(\w+)'"""
        named = re.search(words, self.log("receiver"), re.S)
        if not named:
            raise Failure(f"the receiver does not say what to do: {self.log('receiver')}")
        if self.here.monitor.status() == "running":
            return named[1]
        path = os.path.join(self.path("sender.records"), named[2])
        state = json.loads(text(path))["state"] if os.path.exists(path) else None
        return named[4] if state == named[3] else None

    def doubt(self, source):
        """It runs at neither."""
        if self.in_doubt():
            what = self.mend()
        elif self.killed("receiver") and self.disowned():
            what = "cont"
        else:
            raise Failure(f"it runs at neither ({source}), and nobody says what to do")
        if what != "cont":
            raise Failure(f"it runs at neither ({source}), and what the receiver says to do is {what}")
        ended = {"sender": (None, 1), "receiver": (None, 1), "migration": ("completed",)}
        self.expect(sent=("moved",), received=("begun", "arrived"), **ended)
        self.there.monitor.ask("cont")
        wait_for("it runs after 'cont'", lambda: self.there.monitor.status() == "running")
        return True, "doubt: cont"

    def check_never_both(self):
        """By the samples, and by what each QEMU says of itself."""
        if self.watch.both:
            raise Failure(f"it ran at both in {len(self.watch.both)} of {self.watch.samples} samples")
        for began, ended in self.there.monitor.ran:
            for before, after in self.here.monitor.ran:
                if began < (after or float("inf")) and before < (ended or float("inf")):
                    source, destination = f"at the source {before} to {after}", f"at the destination {began} to {ended}"
                    raise Failure(f"it ran at both: {source}, {destination}")

    def pause_ms(self):
        """How long it ran nowhere, if it did not run all the time."""
        ran = sorted(self.here.monitor.ran + self.there.monitor.ran)
        return [(b[0] - a[1]) * 1000 for a, b in zip(ran, ran[1:]) if b[0] > self.began]


class Rig:
    """All of it."""

    def __init__(self, options):
        self.options = options
        self.work, self.vmar, self.overlay = options.work, options.vmar, options.overlay
        self.libraries = options.libraries
        self.kernel, self.initrd, self.words = options.kernel, options.initrd, options.append
        self.accel, self.reconnect, self.memory_mib = options.accel, options.reconnect, options.memory
        self.random = random.Random(options.seed)
        self.ticks = Ticks(options.slots)
        self.places, self.count = [], 0
        self.samples = 0
        self.pauses, self.took = [], []
        self.outcomes, self.styles, self.mids = Counter(), Counter(), 0

    def place(self, incoming=True):
        place = Place(self, self.count, incoming)
        self.count += 1
        self.places.append(place)
        return place

    def plan(self):
        """Cuts, and which share of the link's bytes passes before those at random."""
        draw, kill = self.random, self.options.kill
        plan = [("bytes", draw.random()) for _ in range(self.options.cuts)]
        # Half of those that are aimed come while the VM is given away: each byte of that in turn.
        for n in range(self.options.last):
            at = (n // 2 * 7 + 5) % (HANDSHAKE_BYTES + 1)
            late = ("record", 0) if kill and n % 4 == 0 else ("handshake", at)
            plan.append(late if n % 2 == 0 else ("tail", draw.randint(1, LAST_BYTES)))
        draw.shuffle(plan)
        for n, (kind, at) in enumerate(plan):
            style = ("sender", "receiver")[n % 2] if kill else draw.choice(STYLES)
            pause = draw.choice((0, draw.uniform(0, 0.03))) if kill else draw.uniform(0.02, 0.3)
            if kind == "record":
                style, pause = "sender", 0
            yield kind, at, style, pause if kill or style in ("forward", "back", "freeze") else 0

    def run(self):
        here = self.place(incoming=False)
        wait_for("QEMU starts", here.start)
        here.monitor.ask("cont")
        self.ticks.follow(here)
        self.here, self.next = here, self.place()
        wait_for("the guest counts", lambda: self.counts(GOES_ON), 600, 0.2)
        self.total = self.attempt(Cut("whole"))[0].link.passed
        print(f"a whole migration: {self.total} bytes on the link, {self.took.pop():.1f} s with all checks", flush=True)
        self.outcomes.clear()
        self.pauses.clear()
        for n, (kind, at, style, pause) in enumerate(self.plan(), 1):
            for _ in range(TRIES):
                place = max(1, int(at * self.total)) if kind == "bytes" else at
                attempt, outcome = self.attempt(Cut(kind, place, style, pause))
                if attempt.link.done:
                    break
                self.total = attempt.link.passed
            else:
                raise Failure(f"no cut in {TRIES} migrations")
            self.outcomes[kind, outcome] += 1
            self.styles[style, outcome] += 1
            self.mids += attempt.link.mid > 0
            mid = f", {attempt.link.mid} bytes into a message" if attempt.link.mid else ""
            nowhere = "".join(f", ran nowhere for {ms:.0f} ms" for ms in attempt.pause_ms())
            told = attempt.cut.told(attempt.link.withheld)
            print(f"{n:4} {told}{mid}: {outcome}{nowhere} ({self.took[-1]:.1f} s)", flush=True)

    def counts(self, number):
        if self.here.ended():
            raise Failure(f"QEMU ended: {self.here.last('qemu.log')}")
        return self.ticks.read() >= number

    def attempt(self, cut):
        began = time.monotonic()
        here, there = self.here, self.next
        wait_for("the destination's QEMU starts", there.start)
        attempt = Attempt(self, here, there, cut)
        try:
            attempt.run()
            self.next = self.place()
            moved, outcome = self.settle(attempt)
        except Gone as e:
            raise Failure("the source's QEMU has ended") from e
        finally:
            attempt.watch.over.set()
        self.samples += attempt.watch.samples
        self.pauses += attempt.pause_ms()
        loser = here if moved else there
        said = os.path.getsize(loser.ticks)
        if said != (self.ticks_at_source if moved else 0):
            raise Failure(f"the guest says something where it does not run ({loser.ticks})")
        loser.end()
        if outcome != "moved" or cut.kind != "whole":
            self.keep_logs(there)
        self.places.remove(loser)
        self.took.append(time.monotonic() - began)
        return attempt, outcome

    def settle(self, attempt):
        """Both QEMUs are looked at for a while, and until it is clear what became of the VM."""
        end = time.monotonic() + self.options.settle
        wait_for("it is clear where it is", attempt.settled, step_s=SAMPLE_S)
        moved, outcome = attempt.conclude()
        if moved:
            self.ticks.read()
            self.ticks_at_source = self.ticks.offset
            self.here = attempt.there
            self.ticks.follow(self.here)
        number = self.ticks.read()
        wait_for("the guest counts on", lambda: self.counts(number + GOES_ON), step_s=SAMPLE_S)
        while time.monotonic() < end or not self.next.start():
            self.next.start()
            time.sleep(SAMPLE_S)
        attempt.watch.end()
        attempt.check_never_both()
        statuses = [p.monitor.status() for p in (attempt.here, attempt.there)]
        if statuses[moved] != "running" or statuses[not moved] == "running":
            raise Failure(f"it did not stay so: source {statuses[0]}, destination {statuses[1]}")
        return moved, outcome

    def keep_logs(self, place):
        """Of the proxies, for who wants to know more."""
        for name in os.listdir(place.dir):
            if name.startswith(("sender.", "receiver.")) and name.endswith((".log", ".out")):
                with open(os.path.join(self.work, "proxies.log"), "a", encoding="utf-8") as file:
                    file.write(f"{place.number} {name}: {text(place.path(name))}\n")

    def finish(self):
        """The guest ends; its disk holds what it counted."""
        self.here.say("stop")
        wait_for("the guest ends", self.here.ended, 2 * PATIENCE_S, 0.1)
        self.ticks.read()
        if self.ticks.end != 0 or self.ticks.rest:
            raise Failure(f"the guest ended with {self.ticks.end} messages of its kernel: {self.here.ticks}")
        for place in self.places:
            place.end()
        raw = os.path.join(self.work, "after.raw")
        subprocess.run(["qemu-img", "check", "-q", self.overlay], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.overlay, raw], check=True)
        with open(raw, "rb") as file:
            for number, checksum in self.ticks.last:
                file.seek((self.options.first + number % self.options.slots) * SLOT_BYTES)
                if file.read(SLOT_BYTES).rstrip(b"\0") != f"VMAR-TICK {number} {checksum}\n".encode():
                    raise Failure(f"number {number} is not on the disk")

    def table(self, rows, counted):
        columns = ("stayed", "stayed: quit", "moved", "moved: not confirmed", "doubt: cont")
        print(f"{'':22}" + "".join(f"{c:>22}" for c in columns))
        for name, key in rows:
            cells = [counted[key, c] for c in columns]
            if any(cells):
                print(f"{name:22}" + "".join(f"{n:22}" for n in cells))
        print()

    def report(self):
        kinds = {"bytes": "random bytes", "tail": "the stream's end", "handshake": "the handshake", "record": "the record"}
        print()
        self.table([(told, kind) for kind, told in kinds.items()], self.outcomes)
        self.table([(style, style) for style in (*STYLES, "sender", "receiver")], self.styles)
        pauses = sorted(self.pauses) or [0]
        done, what = sum(self.outcomes.values()), "kills" if self.options.kill else "cuts"
        memory, base = self.ticks.passes
        print(
            f"{done} {what}, {self.mids} in the middle of a message: {self.samples} samples of both QEMUs, it ran at both in 0.\n"
            f"{self.ticks.number} numbers told, the last {len(self.ticks.last)} found on the disk; memory checked {memory} times,"
            f" the base image {base} times, all as they should be.\n"
            f"Where it did not run all the time: nowhere for {statistics.median(pauses):.0f} ms in the median,"
            f" {pauses[-1]:.0f} at most. {statistics.mean(self.took):.1f} s each, {max(self.took):.1f} at most."
        )


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("work", "vmar", "overlay", "kernel", "initrd", "append", "accel", "reconnect"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("cuts", "last", "seed", "slots", "first", "memory"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--settle", type=float, required=True)
    parser.add_argument("--libraries", nargs=2, required=True)
    parser.add_argument("--kill", action="store_true")
    return parser.parse_args()


def main():
    rig = Rig(arguments())
    try:
        rig.run()
        rig.finish()
        rig.report()
    except (Failure, subprocess.CalledProcessError) as e:
        print(f"tests/qemu/cuts.sh: {e}", file=sys.stderr)
        return 1
    finally:
        for place in rig.places:
            place.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
