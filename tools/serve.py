"""A page in the browser, on this machine alone, that plays with a run's model.

    python tools/serve.py logs/RUN

It writes text as it is sampled, and shows how probable the model finds each token of a text of yours. The page needs
nothing from the net. Ctrl-C ends it.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import json
import math
import secrets
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402

import caseops  # noqa: E402
import generate  # noqa: E402
import train_gpt as tg  # noqa: E402
from golf import Model  # noqa: E402
from runs import Parser, UserError, command_line, number_type  # noqa: E402

ADDRESS = "127.0.0.1"
PAGE = ROOT / "tools" / "serve.html"
BODY_LIMIT = 1 << 18  # bytes of a request
TEXT_LIMIT = 20_000  # characters of a text
TOKENS_LIMIT = 2000  # sampled for a request
CASE_MARKS = {ord(symbol): "⇪" if name == "ALLCAPS" else "⇧" for name, symbol in caseops.OPERATORS.items()}
WAIT_SECONDS = 20  # for a browser that sends or takes nothing


class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def field(request: dict[str, Any], name: str, kind: type, low: float, high: float, default: float) -> Any:
    """A number of a request within its limits. Errors: Refused."""
    value = request.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
        raise Refused(400, f"{name}: must be a number from {low:g} to {high:g}")
    return kind(value)


def text_of(request: dict[str, Any]) -> str:
    """The text of a request. Errors: Refused."""
    text = request.get("text", "")
    if not isinstance(text, str) or len(text) > TEXT_LIMIT:
        raise Refused(413, f"text: must be a text of at most {TEXT_LIMIT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, "text: has a character without bytes in UTF-8") from None
    return text


class Player:
    """What the page asks of the model. One request computes at a time; written texts take turns by the token."""

    def __init__(self, model: Model, name: str):
        self.model, self.name = model, name
        self.turn = threading.Lock()

    def about(self) -> dict[str, Any]:
        """What the page says of the model."""
        parameters = sum(p.numel() for p in self.model.gpt.parameters())
        c = self.model.config
        return dict(
            name=self.name,
            parameters=parameters,
            vocabulary=c.vocab_size,
            context=c.eval_context,
            text_limit=TEXT_LIMIT,
            tokens_limit=TOKENS_LIMIT,
        )

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Each token of a text with its probability, and the bits per byte of the whole text."""
        tokenizer, text = self.model.tokenizer, text_of(request)
        ids = tokenizer.encode(text)
        with self.turn:
            nats = self.model.losses(ids)
        counts = tokenizer.target_bytes(np.array(ids))
        score = tg.Score(float(nats.sum()), len(nats), int(counts.sum()))
        shown = self.pieces(ids[1:])
        rows = [
            dict(token=token, text=piece, p=math.exp(-n), bits=n / math.log(2), bytes=int(count))
            for token, piece, n, count in zip(ids[1:], shown, nats.tolist(), counts.tolist(), strict=True)
        ]
        bits = score.nats / math.log(2)
        return dict(tokens=rows, bits=bits, bytes=score.bytes, bpb=score.bpb if score.bytes else None)

    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token; the bytes of a character that several tokens share stand at the last one."""
        tokenizer, found = self.model.tokenizer, []
        held = b""
        for place, token in enumerate(tokens):
            piece = held + tokenizer.pieces[token]
            if place == 0:
                piece = piece.removeprefix(b" ")
            text = piece.decode("utf-8", "ignore")
            held = piece[len(text.encode()) :][:4] if place + 1 < len(tokens) else b""
            found.append(text.translate(CASE_MARKS) if tokenizer.caseops else text)
        return found

    def generate(self, request: dict[str, Any]) -> Iterator[str]:
        """The pieces of a text that follows the request's. Errors: Refused, before the first piece."""
        sampling = dict(
            tokens=field(request, "tokens", int, 1, TOKENS_LIMIT, 200),
            temperature=field(request, "temperature", float, 0, 100, 0.8),
            top_k=field(request, "top_k", int, 0, self.model.config.vocab_size, 40),
            seed=field(request, "seed", int, 0, 2**53, 0),
        )
        return self.model.stream(text_of(request), **sampling)

    def next_of(self, pieces: Iterator[str]) -> str | None:
        """The next piece of a text, or None at its end. Between two pieces it is the turn of others."""
        with self.turn:
            return next(pieces, None)


class Handler(BaseHTTPRequestHandler):
    """Answers the page's requests, and those of no other site."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "golf", ""
    timeout = WAIT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the address alone."""

    def check_origin(self) -> None:
        """A site of elsewhere can let its name point to this machine, or post here. Errors: Refused."""
        port = self.server.server_address[1]
        allowed = {f"{host}:{port}" for host in (ADDRESS, "localhost")}
        if self.headers.get_all("Host", []) not in [[host] for host in allowed]:
            raise Refused(421, f"this page is at http://{ADDRESS}:{port}/ alone")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in allowed}:
            raise Refused(403, "requests of other sites are refused")

    def read_request(self) -> dict[str, Any]:
        """The JSON object of a request. Errors: Refused."""
        if self.headers.get_content_type() != "application/json":  # a form of another site cannot send this type
            raise Refused(415, "a request must be of type application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "a request must say its Content-Length")
        if len(length) > 9 or int(length) > BODY_LIMIT:
            raise Refused(413, f"a request has at most {BODY_LIMIT} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "a request must be JSON") from None
        if not isinstance(request, dict):
            raise Refused(400, "a request must be a JSON object")
        return request

    def send(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        """A whole response."""
        self.send_head(status, kind, **{"Content-Length": str(len(content))}, **headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_head(self, status: int, kind: str, **headers: str) -> None:
        """A response up to its body."""
        self.send_response(status)
        fixed = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        fixed["Cross-Origin-Resource-Policy"] = "same-origin"
        for name, value in {"Content-Type": kind, **fixed, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, routes: dict[str, Any]) -> None:
        """Answers a request by its path."""
        try:
            self.check_origin()
            route = routes.get(self.path.split("?")[0])
            if route is None:
                raise Refused(404, "there is no such page")
            route()
        except Refused as error:
            self.close_connection = True  # what it sent may not have been read
            self.send(error.status, error.reason.encode(), "text/plain; charset=utf-8", Connection="close")
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser went away

    def do_GET(self) -> None:
        """The page, and what it says of the model."""
        self.answer({"/": self.page, "/about": lambda: self.send_json(self.server.player.about())})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """The text to score, or to go on with."""
        routes = {
            "/score": lambda: self.send_json(self.server.player.score(self.read_request())),
            "/generate": self.stream,
        }
        self.answer(routes)

    def send_json(self, value: Any) -> None:
        """A JSON value."""
        self.send(200, tg.to_json(value).encode(), "application/json")

    def page(self) -> None:
        """The page: only its own script runs, and it can reach nothing but this server."""
        nonce = secrets.token_urlsafe(16)
        allowed = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        allowed += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        content = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
        self.send(200, content, "text/html; charset=utf-8", **{"Content-Security-Policy": allowed})

    def stream(self) -> None:
        """A text, in a chunk for each piece of it."""
        player = self.server.player
        pieces = player.generate(self.read_request())
        self.send_head(200, "text/plain; charset=utf-8", **{"Transfer-Encoding": "chunked", "X-Accel-Buffering": "no"})
        while (piece := player.next_of(pieces)) is not None and not self.server.ending.is_set():
            if content := piece.encode():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    """The server of a model's page, on this machine's own address."""

    daemon_threads = True

    def __init__(self, player: Player, port: int):
        self.player, self.ending = player, threading.Event()
        super().__init__((ADDRESS, port), Handler)


def main(arguments: list[str]) -> int:
    """Serves the page until it is interrupted. Returns the exit code."""
    parser = Parser(prog="serve.py", description=__doc__)
    add = parser.add_argument
    add("artifact", type=Path, metavar="RUN", help=f"a run's folder, or its {tg.CONTAINER_FILE}")
    add("--port", type=number_type(int, 0, 65535), default=8016, metavar="N", help="0: any (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: that of the run's folder)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (default: auto)")
    options = parser.parse_args(arguments)
    player = Player(generate.load(options), options.artifact.resolve().name)
    try:
        server = Server(player, options.port)
    except OSError as error:
        raise UserError(f"--port {options.port}: cannot be used ({error.strerror}); 0 takes any") from None
    print(f"http://{ADDRESS}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.ending.set()
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
