"""tools/serve.py: the page, what its requests give, and whom it answers."""

import http.client
import json
import math
import signal
import socket
import subprocess
import sys
import threading

import pytest

import browser
import serve
from helpers import RECORD_LIKE, ROOT, TINY, clean_environment, config
from test_generate import caseops_tokenizer
from test_golf import load, write_run

TEXT = "the river café 😀\n\tof the\n"


@pytest.fixture(scope="module")
def player(tmp_path_factory, data):
    folder = write_run(
        tmp_path_factory.mktemp("serve") / "run", config(RECORD_LIKE), (data / "tokenizer.model").read_bytes()
    )
    return serve.Player(load(folder)[0], "<b>run</b>")


@pytest.fixture(scope="module")
def server(player):
    with serve.Server(player, 0) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server, path, body=None, method=None, **headers):
    """A request and its answer: (status, headers, content)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers = {"Content-Type": "application/json", **headers}
        body = body if isinstance(body, (bytes, str)) else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


# -------------------------------------------------------------------------------------------------------- what it gives


def test_the_page_is_whole_and_may_load_nothing(server):
    status, headers, content = ask(server, "/")
    policy, page = headers["Content-Security-Policy"], content.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and len(content) > 5000
    assert policy.startswith("default-src 'none'; ") and "connect-src 'self'" in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and "NONCE" not in page
    assert "http:" not in page and "https:" not in page and "//cdn" not in page and "@import" not in page
    assert ask(server, "/")[1]["Content-Security-Policy"] != policy
    assert ask(server, "/", method="HEAD")[2] == b""


def test_the_model_is_named(server, player):
    about = json.loads(ask(server, "/about")[2])
    assert about["name"] == "<b>run</b>" and about["vocabulary"] == 384 and about["context"] == 32
    assert about["parameters"] == sum(p.numel() for p in player.model.gpt.parameters())


def test_a_texts_tokens_have_their_probabilities_and_add_up(server, player):
    result = json.loads(ask(server, "/score", dict(text=TEXT))[2])
    rows = result["tokens"]
    assert [row["token"] for row in rows] == player.model.tokenizer.encode(TEXT)[1:]
    assert "".join(row["text"] for row in rows) == TEXT
    assert sum(row["bytes"] for row in rows) == result["bytes"] == len(TEXT.encode())
    assert result["bits"] == pytest.approx(sum(row["bits"] for row in rows))
    assert result["bpb"] == pytest.approx(player.model.score(TEXT), abs=1e-9)
    for row in rows:
        assert 0 < row["p"] <= 1 and row["bits"] == pytest.approx(-math.log2(row["p"]))
    long = json.loads(ask(server, "/score", dict(text="the river of " * 100))[2])  # longer than the context
    assert long["bytes"] == 1300 and len(long["tokens"]) > 32
    assert json.loads(ask(server, "/score", dict(text=""))[2]) == dict(tokens=[], bits=0.0, bytes=0, bpb=None)


def test_case_operators_are_shown_as_marks(tmp_path):
    folder = write_run(tmp_path / "run", config(TINY), caseops_tokenizer())
    result = serve.Player(load(folder)[0], "run").score(dict(text="The HTTP"))
    assert "".join(row["text"] for row in result["tokens"]) == "⇧the ⇪http" and result["bytes"] == 8


def test_a_text_is_streamed_in_pieces(server, player):
    options = dict(text="the river", tokens=12, temperature=1.5, top_k=0, seed=3)
    status, headers, content = ask(server, "/generate", options)
    assert status == 200 and headers["Transfer-Encoding"] == "chunked"
    expected = player.model.generate("the river", tokens=12, temperature=1.5, top_k=0, seed=3)
    assert content.decode() == expected != "the river"


def post(server, body):
    """A request for a text, in bytes."""
    lines = ["POST /generate HTTP/1.1", f"Host: localhost:{server.server_address[1]}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def test_the_first_piece_comes_before_the_last_is_sampled(server, player, monkeypatch):
    """The model waits for the test between two pieces."""
    go = threading.Event()

    def pieces(prompt, **_):
        yield "first"
        assert go.wait(60)
        yield "last"

    monkeypatch.setattr(player.model, "stream", pieces)
    with socket.create_connection(server.server_address) as connection:
        body = b'{"text": ""}'
        connection.sendall(post(server, body))
        said = b""
        while b"first" not in said:
            said += connection.recv(4096)
        assert b"last" not in said
        go.set()
        while not said.endswith(b"0\r\n\r\n"):
            said += connection.recv(4096)
        assert b"\r\n4\r\nlast\r\n" in said


def test_two_browsers_take_turns(server, player, monkeypatch):
    """A second text is written, and another is scored, while the first one goes on."""
    stream, go = player.model.stream, threading.Event()

    def pieces(prompt, **options):
        yield "first"
        if prompt == "waits":
            while not go.wait(0.01):  # each round is a token, between which others have their turn
                yield "."
        yield from stream(prompt, **options)

    monkeypatch.setattr(player.model, "stream", pieces)
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(post(server, b'{"text": "waits"}'))
        said = b""
        while b"first" not in said:
            said += connection.recv(4096)
        assert ask(server, "/generate", dict(text="the river", tokens=3))[2].startswith(b"firstthe river")
        assert ask(server, "/score", dict(text="the river"))[0] == 200
        go.set()
        while not said.endswith(b"0\r\n\r\n"):
            said += connection.recv(4096)


def test_a_browser_that_leaves_frees_the_model(server, player):
    body = json.dumps(dict(text="the", tokens=2000, temperature=2, top_k=0)).encode()
    connection = socket.create_connection(server.server_address)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost:{server.server_address[1]}\r\nContent-Type: application/json\r\n"
    )
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    connection.recv(64)
    connection.close()
    assert ask(server, "/score", dict(text="the river"))[0] == 200  # it waits for its turn


# ----------------------------------------------------------------------------------------------------- whom it answers


def test_only_this_machine_reaches_it(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "headers, status",
    [
        (dict(Host="evil.example"), 421),
        (dict(Host="evil.example:{port}"), 421),
        (dict(Host="127.0.0.1:1"), 421),
        (dict(Host="127.0.0.1:{port}.evil.example"), 421),
        (dict(Host=""), 421),
        (dict(Origin="http://evil.example"), 403),
        (dict(Origin="null"), 403),
        (dict(Origin="https://127.0.0.1:{port}"), 403),
        (dict(Origin="http://127.0.0.1:{port}"), 200),
        (dict(Origin="http://localhost:{port}", Host="localhost:{port}"), 200),
    ],
)
@pytest.mark.parametrize("path", ["/about", "/score"])
def test_other_sites_get_no_answer(path, headers, status, server):
    port = server.server_address[1]
    headers = {name: value.format(port=port) for name, value in headers.items()}
    body = dict(text="the") if path == "/score" else None
    found, _, content = ask(server, path, body, **headers)
    assert found == status and (status == 200 or b"token" not in content)


@pytest.mark.parametrize(
    "path, body, headers, status, words",
    [
        ("/elsewhere", None, {}, 404, "no such page"),
        ("/../train_gpt.py", None, {}, 404, "no such page"),
        ("/score", b"{", {}, 400, "must be JSON"),
        ("/score", b"[" * 100_000, {}, 400, "must be JSON"),
        ("/score", b"[]", {}, 400, "must be a JSON object"),
        ("/score", {"text": 5}, {}, 413, "text"),
        ("/score", {"text": "x" * 20_001}, {}, 413, "20000"),
        ("/score", b'{"text": "\\ud800"}', {}, 400, "UTF-8"),
        ("/score", b"x" * (serve.BODY_LIMIT + 1), {}, 413, "bytes"),
        ("/score", {"text": "x"}, {"Content_Type": "text/plain"}, 415, "application/json"),
        ("/score", b"{}", {"Content_Length": "-1"}, 411, "Content-Length"),
        ("/score", b"{}", {"Content_Length": "9" * 40}, 413, "bytes"),
        ("/generate", {"temperature": -1}, {}, 400, "temperature: must be a number from 0 to 100"),
        ("/generate", b'{"temperature": NaN}', {}, 400, "temperature"),
        ("/generate", {"temperature": "1"}, {}, 400, "temperature"),
        ("/generate", {"top_k": 385}, {}, 400, "top_k: must be a number from 0 to 384"),
        ("/generate", {"top_k": True}, {}, 400, "top_k"),
        ("/generate", {"tokens": 2001}, {}, 400, "tokens: must be a number from 1 to 2000"),
        ("/generate", {"seed": 1.5}, {}, 400, "seed"),
        ("/generate", {"seed": 10**30}, {}, 400, "seed"),
    ],
)
def test_what_it_refuses(path, body, headers, status, words, server):
    try:
        found, _, content = ask(server, path, body, **headers)
    except ConnectionError:  # it closed the connection before all of a large body was sent
        assert status == 413
        return
    assert found == status and words in content.decode()


def test_other_methods_are_refused(server):
    assert ask(server, "/score", method="PUT")[0] == 501


@pytest.mark.slow
def test_the_command_says_where_it_is_and_ends_by_ctrl_c(tmp_path, data):
    folder = write_run(tmp_path / "run", config(TINY), (data / "tokenizer.model").read_bytes())
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(folder), "--port", "0", "--device", "cpu"]
    values = clean_environment(dict(CPU_THREADS=1, OMP_NUM_THREADS=1))
    started = subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = started.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and line.endswith("/  (Ctrl-C ends it)\n")
        taken = subprocess.run(
            [*command[:4], line.split(":")[2].split("/")[0]], env=values, capture_output=True, text=True
        )
        assert taken.returncode == 2 and taken.stderr.startswith("error: --port ") and not taken.stdout
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 0 and not errors
    finally:
        started.kill()


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_in_a_browser(width, dark, server, player):
    with browser.Browser() as page:
        page.open(f"http://127.0.0.1:{server.server_address[1]}/", width, dark=dark)
        page.wait("document.title === '<b>run</b>'")
        by_id = "document.getElementById('{}')"
        for name, value in (("prompt", "the river"), ("tokens", "9"), ("text", TEXT)):
            page.run(f"{by_id.format(name)}.value = {json.dumps(value)}")
        slide = "{0}.value = '{1}'; {0}.dispatchEvent(new Event('input'))"
        page.run(slide.format(by_id.format("temperature"), "0"))
        page.run(slide.format(by_id.format("top-k"), "0"))
        assert page.run("document.getElementById('top-k-value').textContent") == "all"
        page.run("document.getElementById('go').click()")
        page.run("document.getElementById('score').click()")
        expected = player.model.generate("the river", tokens=9, temperature=0)
        page.wait(f"document.getElementById('written').textContent === {json.dumps(expected)}")
        page.wait("document.getElementById('total').textContent !== ''")
        total = page.run("document.getElementById('total').textContent")
        assert total.startswith(f"{player.model.score(TEXT):.4f} bits per byte: ")
        colours = page.run(
            "[...document.querySelectorAll('.token')].map(token => getComputedStyle(token).backgroundColor)"
        )
        assert len(colours) == len(player.model.tokenizer.encode(TEXT)) - 1 and len(set(colours)) > 3
        page.run("document.querySelector('.token').focus()")
        tip = page.run("document.getElementById('tip').textContent")
        assert "probability" in tip and "bits" in tip and "token " in tip
        box = page.run("JSON.stringify(document.getElementById('tip').getBoundingClientRect())")
        assert json.loads(box)["left"] >= 0 and json.loads(box)["right"] <= width
        assert page.run("document.documentElement.scrollWidth") <= width  # nothing sticks out
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (int(background.split("(")[1].split(",")[0]) < 80) == dark
        assert not page.problems and page.picture().startswith(b"\x89PNG")
        tips = page.run("[...document.querySelectorAll('.token')].map(token => token.dataset.tip)")
        assert sum(tip.startswith("part of a character  token ") for tip in tips) >= 3  # of the four bytes of 😀
        page.run("document.getElementById('text').value = 'a'.repeat(20001)")
        page.run("document.getElementById('score').click()")
        page.wait("document.getElementById('read-error').textContent.startsWith('text: must be')")
        assert page.run("document.getElementById('total').textContent") == ""  # not that of another text
        page.run("document.getElementById('tokens').value = '99999'")
        page.run("document.getElementById('go').click()")
        page.wait("document.getElementById('write-error').textContent.startsWith('tokens: must be')")
