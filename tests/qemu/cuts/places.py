"""Where a VM runs or may come to: a vmar that serves its disk, a QEMU, and QEMU's monitor."""

import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time

# How long anything may take that should take no time, on a busy machine.
PATIENCE_S = 120


class Failure(Exception):
    """What was to be shown is not so."""


def wait_for(what, ready, seconds=PATIENCE_S, step_s=0.01):
    """Until `ready()` is something."""
    end = time.monotonic() + seconds
    while not (got := ready()):
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(step_s)
    return got


def text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def spawn(command, out, err):
    """A process that does not outlive this one."""
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        guarded = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        return subprocess.Popen(guarded, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


class Gone(Exception):
    """QEMU has ended."""


class Monitor:
    """QMP. Keeps by QEMU's own clock when the VM ran; a start is told before it, a stop after it."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.answers = queue.Queue()
        self.lock = threading.Lock()
        self.ran = []
        self.runs = False
        threading.Thread(target=self.listen, daemon=True).start()
        self.ask("qmp_capabilities")

    def listen(self):
        try:
            for line in self.socket.makefile("r", encoding="utf-8"):
                message = json.loads(line)
                if "event" in message:
                    self.note(message)
                elif "QMP" not in message:
                    self.answers.put(message)
        except OSError:
            pass
        self.answers.put(None)

    def note(self, message):
        at = message["timestamp"]["seconds"] + message["timestamp"]["microseconds"] / 1e6
        if message["event"] == "RESUME":
            self.ran.append([at, None])
            self.runs = True
        if message["event"] == "STOP" and self.ran:
            self.ran[-1][1] = at
            self.runs = False

    def ask(self, command, **arguments):
        with self.lock:
            try:
                self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                answer = self.answers.get(timeout=PATIENCE_S)
            except OSError as e:
                raise Gone() from e
            except queue.Empty as e:
                raise Failure(f"QEMU does not answer {command}") from e
        if answer is None:
            self.answers.put(None)
            raise Gone()
        if "error" in answer:
            raise Failure(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def status(self):
        try:
            return self.ask("query-status")["status"]
        except Gone:
            return "gone"


class Place:
    """A host's part of a VM: `vmar serve` and QEMU in a folder of their own."""

    def __init__(self, rig, number, incoming):
        self.rig, self.number, self.incoming = rig, number, incoming
        self.dir = os.path.join(rig.work, f"p{number}")
        # Each of two hosts has its own library, by turns.
        self.library = rig.libraries[number % 2]
        os.makedirs(os.path.join(self.dir, "state"))
        self.qemu = self.monitor = None
        self.ticks = self.path("ticks.log")
        more = ["--incoming"] if incoming else []
        self.server = spawn(
            [rig.vmar, "serve", "--library", rig.libraries[0], "--image", "guest", "--overlay", rig.overlay]
            + ["--socket-path", self.path("blk.sock"), "--state-dir", self.path("state"), *more],
            self.path("serve.out"),
            self.path("serve.log"),
        )

    def path(self, name):
        return os.path.join(self.dir, name)

    def start(self):
        """Goes on with the start, without waiting. True when QEMU is there."""
        if self.monitor:
            return True
        if not self.qemu:
            if self.server.poll() is not None:
                raise Failure(f"vmar serve ended: {self.last('serve.log')}")
            if os.path.exists(self.path("blk.sock")):
                self.qemu = spawn(self.command(), self.path("qemu.out"), self.path("qemu.log"))
            return False
        if self.qemu.poll() is not None:
            raise Failure(f"QEMU ended: {self.last('qemu.log')}")
        wanted = ["qmp.sock", "other.sock"] + (["in.sock"] if self.incoming else [])
        if all(os.path.exists(self.path(name)) for name in wanted):
            self.monitor = Monitor(self.path("qmp.sock"))
        return self.monitor is not None

    def command(self):
        rig, megabytes = self.rig, self.rig.memory_mib
        disk = f"socket,id=disk0,path={self.path('blk.sock')},{rig.reconnect}"
        console = f"socket,id=console,path={self.path('console.sock')},server=on,wait=off,logfile={self.path('console.log')}"
        command = ["qemu-system-x86_64", "-name", f"vmar-cuts-{self.number}", "-nodefaults", "-display", "none"]
        command += ["-no-reboot", "-machine", "q35,memory-backend=ram0", "-m", f"{megabytes}M", "-smp", "1", "-S"]
        command += ["-object", f"memory-backend-memfd,id=ram0,size={megabytes}M,share=on", "-accel", rig.accel]
        command += ["-chardev", disk, "-device", "vhost-user-blk-pci,chardev=disk0"]
        command += ["-kernel", rig.kernel, "-initrd", rig.initrd, "-append", rig.words]
        command += ["-chardev", console, "-serial", "chardev:console", "-serial", f"file:{self.ticks}"]
        # One monitor is the receiver's.
        for name in ("qmp.sock", "other.sock"):
            command += ["-qmp", f"unix:{self.path(name)},server=on,wait=off"]
        return command + (["-incoming", f"unix:{self.path('in.sock')}"] if self.incoming else [])

    def last(self, name):
        return (text(self.path(name)).strip().splitlines() or ["(nothing)"])[-1]

    def say(self, word):
        """To the guest, by its console."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(self.path("console.sock"))
            s.sendall(word.encode() + b"\n")

    def ended(self):
        """The guest has switched itself off."""
        return self.qemu.poll() is not None

    def end(self):
        """QEMU without a word; then the server, which should have nothing to say."""
        if self.qemu:
            self.qemu.kill()
            self.qemu.wait()
        self.server.send_signal(signal.SIGTERM)
        try:
            status = self.server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as e:
            self.server.kill()
            raise Failure(f"vmar serve does not end (log: {self.path('serve.log')})") from e
        said = re.findall(r".*(?:ERROR|WARN|panicked).*", text(self.path("serve.log")))
        if status != 0 or said:
            raise Failure(f"vmar serve ended with {status}: {' / '.join(said)} (log: {self.path('serve.log')})")

    def kill(self):
        """Whatever is left of it."""
        for process in (self.qemu, self.server):
            if process and process.poll() is None:
                process.kill()
                process.wait()
