"""A dataset hub on loopback that speaks what huggingface_hub asks for, and fails on purpose.

A file is asked for by HEAD (size, content hash, commit) and GET at
/datasets/OWNER/NAME/resolve/REVISION/FILE. Both redirect to a signed address on another host, as the real hub
does for large files; here that is "localhost".
"""

import hashlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "0000"
SECRET = "a-signature-nobody-may-see"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, once. after: bytes of the body that are still sent."""

    kind: str  # status | cut | reset | stall | slow | wrong | no_ranges
    after: int = 0
    status: int = 503
    headers: dict = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """files: name -> bytes. faults["HEAD" | "GET", name]: a list, one is used up by each such request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes], hashes: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.hashes = files, hashes
        self.faults: dict[tuple[str, str], list[Fault]] = {}
        self.asked: list[tuple[str, str, int]] = []  # method, file, first byte
        self.tokens: list[tuple[str, str | None]] = []  # host that was asked, Authorization
        self.at_once = self.most_at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def fetched(self) -> list[str]:
        return [name for method, name, _ in self.asked if method == "GET"]

    def handle_error(self, request, client_address):
        pass  # a client that goes away is part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method: str) -> None:
        hub, host = self.server, self.headers["Host"].split(":")[0]
        resolve = re.fullmatch(
            r"/datasets/kjj0/(fineweb10+B-gpt2)/resolve/(main|[0-9a-f]{40})/([\w.]+)", self.path
        )
        signed = re.fullmatch(rf"/signed/([\w.]+)\?Signature={SECRET}", self.path)
        hub.tokens.append((host, self.headers["Authorization"]))
        if not (resolve or signed):
            return self.short(404, {"X-Error-Code": "RepoNotFound"})
        name = resolve[3] if resolve else signed[1]
        if name not in hub.files:
            return self.short(404, {"X-Error-Code": "EntryNotFound"})
        if method == "GET" and resolve:
            return self.short(302, self.facts(name))
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        with hub.lock:
            hub.asked.append((method, name, first))
            faults = hub.faults.get((method, name))
            fault = faults.pop(0) if faults else Fault("none")
        if fault.kind == "status":
            return self.short(fault.status, fault.headers)
        if method == "HEAD":
            return self.short(302, self.facts(name))
        with hub.lock:
            hub.at_once += 1
            hub.most_at_once = max(hub.most_at_once, hub.at_once)
        try:
            self.body(name, first, fault)
        finally:
            with hub.lock:
                hub.at_once -= 1

    def facts(self, name: str) -> dict[str, str]:
        content = self.server.files[name]
        etag = hashlib.sha256(content).hexdigest() if self.server.hashes else f"{len(content):x}-plain"
        return {
            "Location": f"http://localhost:{self.server.server_port}/signed/{name}?Signature={SECRET}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{etag}"',
        }

    def short(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(key, value)
        self.end_headers()

    def body(self, name: str, first: int, fault: Fault) -> None:
        content = self.server.files[name]
        if fault.kind == "wrong":
            content = content[: fault.after] + bytes(255 - b for b in content[fault.after :])
        if fault.kind == "no_ranges":
            first = 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if fault.kind not in ("cut", "reset", "stall", "slow"):
            self.wfile.write(content[first:])
            return
        self.wfile.write(content[first : first + fault.after])
        if fault.kind == "slow":
            for at in range(first + fault.after, len(content), 2**16):
                if self.server.closing.wait(0.02):
                    break
                self.wfile.write(content[at : at + 2**16])
            return
        time.sleep(0.05)  # what was sent arrives first
        if fault.kind == "stall":
            self.server.closing.wait(30)
        if fault.kind == "reset":  # the other side reads "connection reset"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        if fault.kind == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.connection.close()
