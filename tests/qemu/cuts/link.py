"""The link between the two proxies, which is cut, or has one of them killed, at a given place of its traffic."""

import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass

# Messages of src/migrate/wire.rs: a type (1 byte), a length (4), a body.
HEADER_BYTES = 5
FRAME, ACK, READY, COMMIT, DONE = 3, 4, 8, 9, 10
# What gives the VM away: READY, COMMIT and DONE in this order, of five bytes each, and nothing else after READY.
HANDSHAKE = (READY, COMMIT, DONE)
HANDSHAKE_BYTES = 3 * HEADER_BYTES
# Frames that the sender has under way at most, with two workers (src/migrate/send.rs).
PARTS = 8
# Without a byte from the sender for so long, with its VM stopped, the stream is over; with all those frames under way it waits.
QUIET_S = 0.25
STALL_S = 0.03
# The sender has a record for so long after it has heard that the receiver is ready.
RECORD_S = 10


@dataclass
class Cut:
    """Where the link is cut, and how."""

    # 'whole': nowhere; 'bytes': when `at` bytes have passed, both ways; 'tail': the last `at` bytes of the sender's stream do not
    # pass, or as many of them as it sends without an answer; 'handshake': when `at` bytes of the handshake have passed; 'record':
    # when the sender's record says that it has moved.
    kind: str
    at: int = 0
    # 'shut': both ways at once; 'reset': the same by RST; 'forward', 'back': this way a pause before the other; 'freeze': nothing
    # passes, and it is reset after a pause. 'sender', 'receiver': this one is killed after a pause, and the link stays.
    style: str = "shut"
    pause_s: float = 0.0

    def told(self, withheld):
        """In words; with how many bytes of the stream's end did not pass."""
        where = {
            "whole": "nowhere",
            "bytes": f"after {self.at} bytes",
            "tail": f"{withheld} bytes before the end of the stream",
            "handshake": f"after {self.at} bytes of the handshake",
            "record": "as soon as it was written down",
        }
        return f"{where[self.kind]}, {self.style}" + (f" {self.pause_s * 1000:.0f} ms" if self.pause_s else "")


class Way:
    """One direction. Knows where messages begin."""

    def __init__(self, source, to):
        self.source, self.to = source, to
        self.open = True
        self.header = bytearray()
        self.left = 0
        # Bytes of the last message that were seen.
        self.seen = 0
        self.whole = True
        self.frames = 0
        self.acks = 0

    def pieces(self, data):
        """Bytes of one message each, with its type."""
        at = 0
        while at < len(data):
            if self.whole:
                self.seen, self.whole = 0, False
                self.header.clear()
            if len(self.header) < HEADER_BYTES:
                piece = data[at : at + HEADER_BYTES - len(self.header)]
                self.header += piece
                kind = self.header[0]
                if len(self.header) == HEADER_BYTES:
                    self.left = int.from_bytes(self.header[1:], "little")
                    self.frames += kind == FRAME
                    self.acks += kind == ACK
            else:
                piece = data[at : at + self.left]
                self.left -= len(piece)
                kind = self.header[0]
            self.seen += len(piece)
            self.whole = len(self.header) == HEADER_BYTES and self.left == 0
            at += len(piece)
            yield kind, piece


class Link(threading.Thread):
    """Listens at `port`; takes one sender to the receiver at `far`."""

    def __init__(self, far, cut, stopped, recorded, kill):
        """`stopped()`: the source's VM does not run. `recorded()`: the sender has written down that it has moved. `kill(who)`: ends
        a proxy."""
        super().__init__(daemon=True)
        self.far, self.plan, self.stopped, self.recorded, self.kill = far, cut, stopped, recorded, kill
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(60)
        self.port = self.listener.getsockname()[1]
        self.passed = 0
        self.handshake = 0
        # The cut was made; how many bytes passed of a message that was cut off; how many of the end of the stream did not.
        self.done = cut.kind == "whole"
        self.mid = 0
        self.withheld = 0
        self.cut_at_s = 0.0
        self.held = deque()
        self.held_bytes = 0
        self.error = None

    def run(self):
        self.sockets = [self.listener]
        try:
            near, _ = self.listener.accept()
            self.sockets.append(near)
            far = socket.create_connection(self.far, timeout=60)
            self.sockets.append(far)
            for s in (near, far):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                s.settimeout(60)
            self.forward, self.back = Way(near, far), Way(far, near)
            self.pump()
        except OSError as e:
            # One that has ended closes its socket, also in the middle of what it is sent.
            self.error = e
        finally:
            for s in self.sockets:
                s.close()

    def pump(self):
        heard = time.monotonic()
        while self.forward.open or self.back.open:
            ways = [w for w in (self.forward, self.back) if w.open]
            readable, _, _ = select.select([w.source for w in ways], [], [], 0.02)
            holds = self.plan.kind == "tail" and not self.done and self.stopped()
            for way in ways:
                if way.source not in readable:
                    continue
                data = self.read(way)
                if way is self.forward and data:
                    heard = time.monotonic()
                if not data:
                    self.release()
                    way.open = False
                    way.to.shutdown(socket.SHUT_WR)
                elif holds and way is self.forward:
                    self.hold(data)
                elif not self.take(way, data):
                    return
            # It may wait for answers to what is held here.
            waits = self.held and self.forward.frames - self.back.acks >= PARTS
            if waits and time.monotonic() - heard > STALL_S:
                self.release(PARTS // 2)
                heard = time.monotonic()
            elif holds and time.monotonic() - heard > QUIET_S and not self.cut(self.forward):
                return

    def read(self, way):
        try:
            return way.source.recv(65536)
        except ConnectionResetError:
            return b""

    def take(self, way, data):
        """Passes what may pass. False: the link is no more."""
        for kind, piece in way.pieces(data):
            count = len(piece)
            if not self.done:
                if self.plan.kind == "bytes":
                    count = min(count, self.plan.at - self.passed)
                elif self.plan.kind == "handshake" and kind in HANDSHAKE:
                    count = min(count, self.plan.at - self.handshake)
            self.send(way, kind, piece[:count])
            if not self.done and self.reached(way, kind):
                self.mid = 0 if way.whole and count == len(piece) else way.seen - len(piece) + count
                if not self.cut(way):
                    return False
                self.send(way, kind, piece[count:])
        return True

    def reached(self, way, kind):
        """All has passed that is to pass."""
        if self.plan.kind == "bytes":
            return self.passed >= self.plan.at
        if self.plan.kind == "handshake":
            return kind in HANDSHAKE and self.handshake >= self.plan.at
        if self.plan.kind != "record" or kind != READY or not way.whole:
            return False
        end = time.monotonic() + RECORD_S
        # Without a pause: what comes after it comes at once.
        while not (recorded := self.recorded()) and time.monotonic() < end:
            pass
        return recorded

    def send(self, way, kind, piece):
        if piece:
            way.to.sendall(piece)
            self.passed += len(piece)
            self.handshake += len(piece) if kind in HANDSHAKE else 0

    def hold(self, data):
        """The last bytes of the stream stay here until it is known that they are the last."""
        for kind, piece in self.forward.pieces(data):
            self.held.append((kind, piece, self.forward.whole))
            self.held_bytes += len(piece)
        while self.held and self.held_bytes > self.plan.at:
            kind, piece, whole = self.held.popleft()
            count = min(len(piece), self.held_bytes - self.plan.at)
            self.send(self.forward, kind, piece[:count])
            self.held_bytes -= count
            if count < len(piece):
                self.held.appendleft((kind, piece[count:], whole))

    def release(self, messages=None):
        """What is held passes, or so many messages of it."""
        while self.held and messages != 0:
            kind, piece, whole = self.held.popleft()
            self.send(self.forward, kind, piece)
            self.held_bytes -= len(piece)
            if messages and whole:
                messages -= 1

    def cut(self, way):
        """Does what was planned. False: the link is no more."""
        self.done = True
        self.withheld = self.held_bytes
        self.cut_at_s = time.monotonic()
        style, near, far = self.plan.style, self.forward.source, self.back.source
        if style in ("sender", "receiver"):
            time.sleep(self.plan.pause_s)
            self.kill(style)
            self.release()
            return True
        self.held.clear()
        if style in ("forward", "back"):
            # The one side sees the end, and is still heard by the other.
            first, other = (self.forward, self.back) if style == "forward" else (self.back, self.forward)
            first.to.shutdown(socket.SHUT_WR)
            self.drain(other, time.monotonic() + self.plan.pause_s)
        if style == "freeze":
            time.sleep(self.plan.pause_s)
        for s in (near, far):
            if style in ("reset", "freeze"):
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            s.close()
        return False

    def drain(self, way, until):
        while way.open and (left := until - time.monotonic()) > 0:
            if select.select([way.source], [], [], left)[0]:
                data = self.read(way)
                if not data:
                    return
                for kind, piece in way.pieces(data):
                    self.send(way, kind, piece)
