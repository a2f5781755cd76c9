#!/usr/bin/env python3
"""Stands between vmar and an S3 server, and does to requests what a file says.

usage: s3_proxy.py PORT SERVER-PORT MODE-FILE LOG-FILE

The first line of MODE-FILE, read for each request:
  pass             nothing
  status CODE      answers with that
  status CODE N    the next N requests get it, then pass
  cut N            of the next N requests half an answer comes, or half a body is read, and the connection ends; then pass
  silent           the request is read and never answered
  gone             the connection ends before anything is read: a server whose machine refuses, but for the port
  old              pass, with all objects listed as of 2001
Each request is a line in LOG-FILE: method, path, status (or what was done to it), seconds.
"""

import http.client
import http.server
import re
import socket
import sys
import threading
import time

PORT, SERVER, MODE, LOG = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
lock = threading.Lock()


def mode():
    """What to do with this request. One that counts is counted down."""
    with lock:
        with open(MODE) as file:
            words = file.readline().split() or ["pass"]
        if words[0] in ("status", "cut") and words[-1].isdigit() and len(words) == {"status": 3, "cut": 2}[words[0]]:
            left = int(words[-1]) - 1
            with open(MODE, "w") as file:
                file.write(" ".join(words[:-1] + [str(left)]) if left else "pass")
        return words


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def note(self, what):
        with lock, open(LOG, "a") as file:
            file.write(f"{self.command} {self.path} {what} {time.monotonic() - self.began:.3f}\n")

    def end(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle_any(self):
        self.began = time.monotonic()
        do = mode()
        length = int(self.headers.get("content-length") or 0)
        if do[0] == "gone" or (do[0] == "cut" and length):
            if do[0] == "cut":
                self.rfile.read(length // 2)
            self.note(do[0])
            return self.end()
        body = self.rfile.read(length)
        if do[0] == "silent":
            self.note("silent")
            time.sleep(600)
            return self.end()
        if do[0] == "status":
            self.note(do[1])
            return self.answer(int(do[1]), {}, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
        server = http.client.HTTPConnection("127.0.0.1", SERVER)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            server.putheader(name, value)
        server.endheaders(body)
        got = server.getresponse()
        data, headers = got.read(), dict(got.getheaders())
        if do[0] == "old":
            data = re.sub(rb"<LastModified>[^<]*<", b"<LastModified>2001-01-01T00:00:00.000Z<", data)
        self.note(do[0] if do[0] == "cut" else got.status)
        self.answer(got.status, headers, data, cut=do[0] == "cut")

    def answer(self, status, headers, data, cut=False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        # Of HEAD the length is that of what GET would bring.
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.end()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        # vmar was killed, or has given up.
        pass


Server(("127.0.0.1", PORT), Handler).serve_forever()
