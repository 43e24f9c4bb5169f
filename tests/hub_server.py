"""A stand-in of the Hugging Face hub on 127.0.0.1: the requests that huggingface_hub makes, and faults on demand."""

import contextlib
import hashlib
import json
import math
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = 1000  # bytes from which on a file is kept apart from git, with a SHA-256
PAGE = 5  # entries of a listing in one answer


class Hub:
    """Repositories and their faults.

    repos: {"owner/name": {branch: {path: bytes}}}. requests: (method, path) of all that came. sent: bytes of each path.
    cut: {path: [bytes, ...]} each next answer with the file ends after so many bytes, while a length was promised.
    corrupt: {path: n} the next n answers have a byte flipped. lost: paths that are listed and not there.
    status: {part of a request: code}. stall: paths whose answers stop half-way until `go_on` is set.
    busy: {path: n} the next n answers with the file are 503.
    ignore_ranges: send files from their beginning always. reset: connections that are cut end with an error.
    """

    def __init__(self, repos):
        self.url = ""  # set when it is served
        self.repos, self.requests, self.sent = repos, [], Counter()
        self.cut, self.corrupt, self.lost, self.status, self.stall = {}, Counter(), set(), {}, set()
        self.stalled, self.go_on, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.ignore_ranges, self.reset, self.busy = False, False, Counter()

    def commit_of(self, repo, revision):
        """The commit that a revision names, and its files; (None, None) if there is none."""
        for branch, files in self.repos[repo].items():
            digest = hashlib.sha1(b"".join(p.encode() + f for p, f in sorted(files.items()))).hexdigest()
            if revision in (branch, digest):
                return digest, files
        return None, None

    def downloads(self):
        """Paths of the files that were asked for, once for each answer with bytes."""
        return [
            path.split("/resolve/")[1].partition("/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextlib.contextmanager
def serving(repos):
    """A running Hub."""
    hub = Hub(repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()


def describe(path, data):
    """A file as the hub lists it."""
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry = {"type": "file", "oid": git, "size": len(data), "path": path}
    if len(data) >= LARGE:
        entry |= {
            "oid": hashlib.sha1(path.encode()).hexdigest(),
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134},
        }
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(self.path)))
        for part, code in self.hub.status.items():
            if part in unquote(self.path):
                return self.answer(code, b"{}")
        path = urlsplit(self.path).path
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.information(found[1], unquote(found[2] or "main"))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self.listing(found[1], unquote(found[2]), unquote(found[3] or ""))
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(found[1], unquote(found[2]), unquote(found[3]))
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            return self.content(found[1], unquote(found[2]), unquote(found[3]))
        return self.answer(404, b"{}")

    def answer(self, code, body, **headers):
        """One whole answer."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def found(self, repo, revision):
        """(commit, files), or None after an answer that says what is missing."""
        if repo not in self.hub.repos:
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        commit, files = self.hub.commit_of(repo, revision)
        if commit is None:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        return commit, files

    def information(self, repo, revision):
        if there := self.found(repo, revision):
            body = {
                "id": repo,
                "sha": there[0],
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [],
            }
            self.answer(200, json.dumps(body).encode())

    def listing(self, repo, revision, folder):
        if not (there := self.found(repo, revision)):
            return
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(there[1]) if path.startswith(prefix)]
        if not paths:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder or "top"}]
        entries += [describe(path, there[1][path]) for path in paths]
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            place = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{place}>; rel="next"'
        self.answer(200, json.dumps(entries[start : start + PAGE]).encode(), **headers)

    def file(self, repo, revision, path):
        if not (there := self.found(repo, revision)):
            return
        commit, files = there
        if path not in files or path in self.hub.lost:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if len(files[path]) < LARGE:
            return self.content(repo, commit, path)
        entry = describe(path, files[path])["lfs"]
        self.answer(
            302,
            b"",
            Location=f"{self.hub.url}/cdn/{repo}/{commit}/{quote(path)}",
            X_Repo_Commit=commit,
            X_Linked_Size=str(entry["size"]),
            X_Linked_ETag=f'"{entry["oid"]}"',
        )

    def content(self, repo, commit, path):
        data = self.hub.commit_of(repo, commit)[1][path]
        with self.hub.lock:
            busy, self.hub.busy[path] = self.hub.busy[path] > 0, self.hub.busy[path] - 1
            if self.hub.corrupt[path] > 0:
                self.hub.corrupt[path] -= 1
                data = bytes([data[0] ^ 1]) + data[1:]
            ends = self.hub.cut.get(path)
            end = ends.pop(0) if ends else math.inf
        if busy:
            return self.answer(503, b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and not self.hub.ignore_ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if path in self.hub.stall:
            self.write(path, body[: len(body) // 2])
            self.hub.stalled.set()
            self.hub.go_on.wait()
            body = body[len(body) // 2 :]
        self.write(path, body[: min(end, len(body))])
        if end < len(body):
            if self.hub.reset:  # A close without farewell.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def write(self, path, body):
        with self.hub.lock:
            self.hub.sent[path] += len(body)
        with contextlib.suppress(OSError):  # The client was killed.
            self.wfile.write(body)
            self.wfile.flush()
