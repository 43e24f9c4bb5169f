"""Sources on the hub and readers: what arrives is whole or refused, goes on after any break, and splits as promised."""

# ruff: noqa: F811
import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hub
import hub_server
import prepare
import processes
import published
import readers
import shards
import sources
import train_gpt as tg
from errors import PrepareError
from helpers import HANG_SECONDS, TINY, audit_of, config, examples, single_run, wait_until
from test_prepare import contents, documents_of, options, refused, story, write_jsonl

REPO, CASEOPS = published.VARIANTS["sp1024"].repo, published.VARIANTS["sp8192-caseops"].repo
VOCAB_SIZE = 512
CASE_NAME = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
NASTY = [
    "Ünïcödé Ωmega ПРИВЕТ мир",
    "漢字かな交じり文 한국어",
    "עברית العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🇦🇶 \U0010ffff",
    "a\0b\x01\x1b[0m\x7f\x85\u2028",
    "\r\n\t \u3000\u200b\ufeff",
    "\ue001\ue002 McDonald's \ue004\ue004 HTTP",
    "▁▁ ▁x",
]


# ---------------------------------------------------------------------------------------------------------- stand-in


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No test of this file opens a connection to anywhere else."""
    connect = socket.socket.connect

    def checked(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture
def serve(monkeypatch):
    """Start a stand-in of the hub with some repositories; huggingface_hub in this process talks to it alone."""
    with contextlib.ExitStack() as stack:

        def start(repos):
            served = stack.enter_context(hub_server.serving(repos))
            endpoint(monkeypatch, served.url)
            return served

        yield start
        huggingface_hub.utils.close_session()


def endpoint(monkeypatch, url):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # So that a broken transfer leaves a part of a file.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    no_waiting = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(hub, "time", no_waiting)
    monkeypatch.setattr(huggingface_hub.file_download, "time", no_waiting)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", no_waiting)


def shard(values):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(values)
    return header.tobytes() + np.asarray(values, "<u2").tobytes()


def layout(folder, name, manifest):
    """A preparation as the challenge publishes it: shards of equal length, which part documents. (files, entry)"""
    files, counts = {}, {}
    for kind, split, parts in (("train", "train", 4), ("val", "val", 2), ("val_bytes", "val", 2)):
        listed = manifest["splits"][split].get("sidecars" if kind == "val_bytes" else "shards", [])
        if listed:
            stream = np.concatenate([shards.read_shard(folder / item["file"]) for item in listed])
            for number, part in enumerate(np.array_split(stream, parts)):
                files[f"datasets/datasets/{name}/fineweb_{kind}_{number:06d}.bin"] = shard(part)
    for split in ("train", "val"):
        found = manifest["splits"][split]
        counts |= {
            f"docs_{split}": found["documents"],
            f"tokens_{split}": found["tokens"],
            f"files_{split}": {"train": 4, "val": 2}[split],
        }
    counts |= {f"{key}_total": counts[f"{key}_train"] + counts[f"{key}_val"] for key in ("docs", "files", "tokens")}
    model = f"tokenizers/{name.removeprefix('fineweb10B_')}_bpe.model"
    files[f"datasets/{model}"] = (folder / "tokenizer.model").read_bytes()
    entry = {
        "name": name,
        "tokenizer_name": f"{name}_bpe",
        "vocab_size": VOCAB_SIZE,
        "path": f"datasets/{name}",
        "train_glob": f"datasets/{name}/fineweb_train_*.bin",
        "val_glob": f"datasets/{name}/fineweb_val_*.bin",
        "stats": counts,
    }
    tokenizer = {
        "name": f"{name}_bpe",
        "kind": "sentencepiece_bpe",
        "vocab_size": VOCAB_SIZE,
        "bos_id": 1,
        "eos_id": 2,
        "model_path": model,
        "vocab_path": model.replace(".model", ".vocab"),
    }
    return files, entry, tokenizer


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Files of a repository with a plain and a CaseOps export, and the manifests of the preparations behind them."""
    folder = tmp_path_factory.mktemp("exports")
    texts = NASTY + [story(seed).capitalize() for seed in range(90)]
    source, files, made, datasets, tokenizers = write_jsonl(folder / "texts.jsonl", texts), {}, {}, [], []
    for name, with_caseops in (("fineweb10B_sp1024", False), (CASE_NAME, True)):
        out = folder / name
        made[name], _ = prepare.prepare(
            options(source, out=out, vocab_size=VOCAB_SIZE, caseops=with_caseops, val_fraction=0.3)
        )
        more, entry, tokenizer = layout(out, name, made[name])
        files |= more
        datasets.append(entry)
        tokenizers.append(tokenizer)
    listed = {"version": "10B", "datasets": datasets, "tokenizers": tokenizers}
    files["datasets/manifest.json"] = json.dumps(listed).encode()
    return files, made


@pytest.fixture
def published_repos(exports, monkeypatch):
    """Repositories to serve, in which a test may change files. The variants' vocabularies are those of the test."""
    monkeypatch.setattr(
        published,
        "VARIANTS",
        {"sp1024": published.Variant(REPO, VOCAB_SIZE), "sp8192-caseops": published.Variant(CASEOPS, VOCAB_SIZE, True)},
    )
    return {REPO: {"main": dict(exports[0])}, CASEOPS: {"main": dict(exports[0])}}


def train_file(number, name="fineweb10B_sp1024"):
    return f"datasets/datasets/{name}/fineweb_train_{number:06d}.bin"


def with_manifest(repos, change):
    """Change the published manifest."""
    files = repos[REPO]["main"]
    manifest = json.loads(files["datasets/manifest.json"])
    change(manifest)
    files["datasets/manifest.json"] = json.dumps(manifest).encode()


# ---------------------------------------------------------------------------------------------- published export


@pytest.mark.parametrize("source, name", [("sp1024", "fineweb10B_sp1024"), ("sp8192-caseops", CASE_NAME)])
def test_an_export_becomes_data_that_training_reads(tmp_path, serve, published_repos, exports, command, source, name):
    served, out, expected = serve(published_repos), tmp_path / "out", exports[1][name]
    code, printed, _ = command(source, "--out", out)
    assert code == 0 and f"VOCAB_SIZE={VOCAB_SIZE}" in printed
    manifest = json.loads((out / "manifest.json").read_text())
    # What was counted from the published tokens is what the preparation counted from the texts.
    for split in ("train", "val"):
        for key in ("tokens", "documents", "bytes"):
            assert manifest["splits"][split][key] == expected["splits"][split][key], (split, key)
        for item in manifest["splits"][split]["shards"]:
            assert shards.read_shard(out / item["file"]).size == item["tokens"]
    assert manifest["splits"]["val"]["bytes"] == expected["splits"]["val"]["bytes"] > 3000
    stats = manifest["source"][0]["stats"]
    assert [stats[f"tokens_{split}"] for split in ("train", "val")] == [
        manifest["splits"][split]["tokens"] for split in ("train", "val")
    ]
    assert set(contents(out)) == {"manifest.json", *prepare.manifest_files(manifest)}
    assert (set(manifest["splits"]["val"]) >= {"sidecars"}) == ("caseops" in source)
    assert manifest["audit"] == audit_of(out)
    # The script counts the same bytes, else its evaluator refuses the manifest.
    evaluator = tg.Evaluator(config(TINY, DATA_PATH=out, VOCAB_SIZE=VOCAB_SIZE), single_run())
    assert evaluator.bytes == expected["splits"]["val"]["bytes"] and len(evaluator.tokens) == stats["tokens_val"]
    # The second call asks the hub nothing, a lost shard is fetched alone.
    asked = len(served.requests)
    assert command(source, "--out", out)[1].startswith("already prepared") and len(served.requests) == asked
    (out / "fineweb_train_000001.bin").unlink()
    before = len(served.downloads())
    assert command(source, "--out", out)[0] == 0
    assert served.downloads()[before:] == ["datasets/manifest.json", train_file(1, name)]
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_first_shards_and_more_of_them_later(tmp_path, serve, published_repos, command):
    served, out = serve(published_repos), tmp_path / "out"
    assert command("sp1024", "--train-shards", 2, "--out", out)[0] == 0
    assert sorted(path.name for path in out.glob("fineweb_train_*")) == [f"fineweb_train_{n:06d}.bin" for n in (0, 1)]
    first = json.loads((out / "manifest.json").read_text())
    # The main branch moves on meanwhile; what is added must fit what is there.
    old = dict(published_repos[REPO]["main"])
    published_repos[REPO] |= {"before": old, "main": {**old, train_file(0): shard([1, 5, 6])}}
    before = len(served.downloads())
    assert command("sp1024", "--train-shards", 3, "--out", out)[0] == 0
    assert served.downloads()[before:] == ["datasets/manifest.json", train_file(2)]
    second = json.loads((out / "manifest.json").read_text())
    assert second["splits"]["train"]["shards"][:2] == first["splits"]["train"]["shards"]
    assert len(second["splits"]["train"]["shards"]) == 3 and second["splits"]["val"] == first["splits"]["val"]
    assert len(first["audit"]["sha256"]) + 1 == len(second["audit"]["sha256"]) and second["audit"] == audit_of(out)
    assert refused(command("sp1024", "--train-shards", 1, "--out", out), "train_shards 3 there, 1 asked", "--force")
    assert refused(command("sp1024", "--train-shards", 5, "--out", out), "--train-shards 5", "has 4")
    assert refused(command("sp1024", "--revision", "before", "--out", out), "revision None there, before asked")
    assert json.loads((out / "manifest.json").read_text()) == second


@pytest.mark.parametrize("fault", ["cut", "reset", "ignored ranges"])
def test_a_broken_transfer_goes_on(tmp_path, serve, published_repos, command, fault):
    served, out, path = serve(published_repos), tmp_path / "out", train_file(1)
    served.cut[path], served.reset, served.ignore_ranges = [1600, 900, 700], fault == "reset", fault == "ignored ranges"
    result = command("sp1024", "--out", out)
    assert result[0] == 0, result[2]
    data = published_repos[REPO]["main"][path]
    assert (out / "fineweb_train_000001.bin").read_bytes() == data
    assert served.downloads().count(path) == 4
    # Whole blocks of 500 bytes were kept; a server that knows no ranges sends all again.
    assert served.sent[path] < len(data) + 3 * 600 if fault == "cut" else served.sent[path] > 0
    assert not list(out.glob("**/*.part"))


def test_a_transfer_that_fails_for_good_is_taken_up_by_the_next_run(tmp_path, serve, published_repos, command):
    served, out, path = serve(published_repos), tmp_path / "out", train_file(3)
    served.cut[path] = [1600] + [0] * 30
    assert refused(command("sp1024", "--out", out), REPO, path, "no connection", "the same command goes on")
    assert not (out / "manifest.json").exists() and not list(out.glob("*.bin"))
    [part] = out.glob(f".download/{Path(path).name}.*.part")  # what was on its way beside it has one too
    held = part.stat().st_size
    complete = {file.name for file in out.glob(".download/*") if file.suffix != ".part"}
    assert held > 0
    served.cut.clear()
    before = dict(served.sent), len(served.downloads())
    assert command("sp1024", "--out", out)[0] == 0
    assert not complete & {Path(name).name for name in served.downloads()[before[1] :]}
    assert served.sent[path] - before[0][path] == len(published_repos[REPO]["main"][path]) - held


def test_wrong_bytes_are_fetched_again_and_then_refused(tmp_path, serve, published_repos, command):
    served, out, path = serve(published_repos), tmp_path / "out", train_file(2)
    served.corrupt[path] = 10**9
    assert refused(command("sp1024", "--out", out), path, "hash", "3 times", "removed")
    assert served.downloads().count(path) == hub.ATTEMPTS
    assert not list(out.glob("**/fineweb_train_000002*")) and not (out / "manifest.json").exists()
    served.corrupt[path], served.busy[path] = 1, 3  # Another time the server is busy, and then right at the second try.
    assert command("sp1024", "--out", out)[0] == 0
    assert (out / "fineweb_train_000002.bin").read_bytes() == published_repos[REPO]["main"][path]


def test_a_small_file_with_wrong_bytes_is_refused_too(tmp_path, serve, published_repos, command):
    served = serve({REPO: {"main": {"datasets/manifest.json": b"{}"}}})
    served.corrupt["datasets/manifest.json"] = 10**9
    assert refused(command("sp1024", "--out", tmp_path / "out"), "datasets/manifest.json", "hash")


BAD_SHARDS = {
    "magic": lambda data: b"\x01" + data[1:],
    "version": lambda data: data[:4] + b"\x02" + data[5:],
    "length": lambda data: data[:-2],
    "cut header": lambda data: data[:1000],
    "odd": lambda data: data + b"\0",
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_published_file_that_is_no_shard(tmp_path, serve, published_repos, command, kind):
    files = published_repos[REPO]["main"]
    files[train_file(0)] = BAD_SHARDS[kind](files[train_file(0)])
    serve(published_repos)
    assert refused(command("sp1024", "--out", tmp_path / "out"), train_file(0), "not a shard")


def swap(path, data):
    def change(repos):
        repos[REPO]["main"][path] = data

    return change


def manifest_change(change):
    return lambda repos: with_manifest(repos, change)


BAD_REPOSITORIES = [
    (swap("datasets/manifest.json", b"<html>"), ["datasets/manifest.json", "not JSON"]),
    (swap("datasets/manifest.json", b"[]"), ["datasets/manifest.json", "not a JSON object"]),
    (lambda repos: repos[REPO]["main"].pop("datasets/manifest.json"), ["no datasets/manifest.json", "404"]),
    (lambda repos: repos[REPO]["main"].pop(train_file(2)), ["fineweb_train_000002.bin", "lacks"]),
    (manifest_change(lambda m: m.pop("datasets")), ["no dataset for sp1024", "none"]),
    (manifest_change(lambda m: m["datasets"].pop(0)), ["no dataset for sp1024", CASE_NAME, str(VOCAB_SIZE)]),
    (manifest_change(lambda m: m["datasets"].append({**m["datasets"][0], "name": "other"})), ["several", "other"]),
    (manifest_change(lambda m: m["tokenizers"].pop(0)), ["tokenizer", "fineweb10B_sp1024_bpe", CASE_NAME]),
    (manifest_change(lambda m: m["datasets"][0]["stats"].update(files_train=5)), ["fineweb_train_000004.bin", "lacks"]),
    (manifest_change(lambda m: m["datasets"][0]["stats"].update(tokens_train=5)), ["tokens_train 5 there"]),
    (manifest_change(lambda m: m["datasets"][0]["stats"].update(docs_val=7)), ["docs_val 7 there"]),
    (manifest_change(lambda m: m["datasets"][0]["stats"].update(tokens_total=8)), ["tokens_total 8 there"]),
    (
        manifest_change(
            lambda m: m["datasets"][0].update(files=[{"path": "x/fineweb_val_000001.bin", "sha256": "0" * 64}])
        ),
        ["fineweb_val_000001.bin", "0" * 64],
    ),
    (swap(train_file(1), shard([1, VOCAB_SIZE + 3, 5])), [train_file(1), f"token id {VOCAB_SIZE + 3}"]),
    (swap("datasets/tokenizers/sp1024_bpe.model", b"x" * 2000), ["sp1024_bpe.model", "not a SentencePiece model"]),
]


@pytest.mark.parametrize("change, fragments", BAD_REPOSITORIES)
def test_what_is_wrong_in_a_repository_is_said(tmp_path, serve, published_repos, command, change, fragments):
    change(published_repos)
    serve(published_repos)
    out = tmp_path / "out"
    assert refused(command("sp1024", "--out", out), *fragments)
    assert not (out / "manifest.json").exists()


def test_sidecars_that_do_not_fit_are_refused(tmp_path, serve, published_repos, command):
    path = f"datasets/datasets/{CASE_NAME}/fineweb_val_bytes_000001.bin"
    files = published_repos[CASEOPS]["main"]
    values = np.frombuffer(files[path][1024:], "<u2").copy()
    values[5] += 1
    files[path] = shard(values)
    serve(published_repos)
    assert refused(command("sp8192-caseops", "--out", tmp_path / "out"), path, "add up to", "bytes of text")
    files[path] = shard(values[:-1])
    assert refused(command("sp8192-caseops", "--out", tmp_path / "out"), path, f"{len(values) - 1} byte counts")


def test_bytes_do_not_depend_on_where_shards_and_chunks_part(exports, monkeypatch):
    files, made = exports
    prefix = f"datasets/datasets/{CASE_NAME}/fineweb_val_"
    stream = np.concatenate([np.frombuffer(files[f"{prefix}{number:06d}.bin"][1024:], "<u2") for number in (0, 1)])
    codec = prepare.Codec(files[f"datasets/tokenizers/{CASE_NAME.removeprefix('fineweb10B_')}_bpe.model"], "", True)
    rows = codec.processor.encode("\ue004\ue001\ue004\ue004\ue004\ue004x")  # ESC in front of ESC, in a row.
    stream = np.concatenate([stream[:300], np.array([1, *rows, 1], np.uint16)])
    whole = codec.token_bytes(stream).sum()
    for chunk in 1, 2, 3, 100:
        monkeypatch.setattr(published, "CHUNK_TOKENS", chunk)
        for parted in 0, 5, 303, 304, 305, 306, 307:
            first, context = published._count(stream[:parted], codec, stream[:0], None, int)
            second, _ = published._count(stream[parted:], codec, context, None, int)
            assert first["bytes"] + second["bytes"] == whole
            assert first["documents"] + second["documents"] == (stream == 1).sum()


def test_a_manifest_without_counts_takes_what_is_there(tmp_path, serve, published_repos, command):
    with_manifest(published_repos, lambda m: [m["datasets"][0].pop(key) for key in ("stats", "path", "val_glob")])
    serve(published_repos)
    assert command("sp1024", "--out", tmp_path / "out")[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [len(manifest["splits"][split]["shards"]) for split in ("train", "val")] == [4, 2]


REFUSALS = [
    ({"--repo": "no/such"}, {}, ["no/such", "no such dataset repository", "401"]),
    ({"--repo": "not a name"}, {}, ["not a name", "OWNER/NAME"]),
    ({"--revision": "nowhere"}, {}, ["--revision nowhere", "404"]),
    ({"--repo-root": "elsewhere"}, {}, ["no elsewhere/manifest.json"]),
    ({}, {"/tree/": 503}, ["503"]),
    ({}, {train_file(1): 403}, [train_file(1), "403"]),
    ({}, {train_file(1): 500}, [train_file(1), "500"]),
    ({}, {train_file(1): 404}, [train_file(1), "404"]),
]


@pytest.mark.parametrize("arguments, status, fragments", REFUSALS)
def test_what_the_hub_refuses(tmp_path, serve, published_repos, command, arguments, status, fragments):
    served = serve(published_repos)
    served.status |= status
    given_options = [item for pair in arguments.items() for item in pair]
    assert refused(command("sp1024", "--out", tmp_path / "out", *given_options), *fragments)


def test_a_listed_file_that_is_gone(tmp_path, serve, published_repos, command):
    serve(published_repos).lost.add(train_file(0))
    assert refused(command("sp1024", "--out", tmp_path / "out"), train_file(0), "404")


def test_no_network_and_offline(tmp_path, monkeypatch, published_repos, command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    endpoint(monkeypatch, url)
    assert refused(command("sp1024", "--out", tmp_path / "out"), url, "no connection")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused(command("sp1024", "--out", tmp_path / "out"), "HF_HUB_OFFLINE")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_full_disks(tmp_path, monkeypatch, serve, published_repos, command):
    serve(published_repos)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        assert refused(command("sp1024", "--out", tmp_path / "out"), "--out", "GB are to be downloaded", "free there")

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hub._Meter, "write", full)
        assert refused(command("sp1024", "--out", tmp_path / "out"), "--out", "No space left on device")
    assert command("sp1024", "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["sp1024", "--vocab-size", "512"], ["--vocab-size 512", "sp1024"]),
        (["sp1024", "--caseops"], ["--caseops", "sp1024"]),
        (["sp1024", "--val-documents", "5"], ["--val-documents 5"]),
        (["sp1024", "builtin"], ["stands alone"]),
        (["builtin", "--train-shards", "5"], ["--train-shards 5", "sp1024"]),
        (["hf:squad"], ["hf:squad", "hf:OWNER/NAME"]),
    ],
)
def test_options_that_do_not_go_together(tmp_path, published_repos, command, arguments, fragments):
    assert refused(command(*arguments, "--out", tmp_path / "out"), *fragments)
    assert not (tmp_path / "out").exists()


PROGRAM = """
import socket, sys
connect = socket.socket.connect
def checked(self, address):
    assert address[0] == "127.0.0.1", address
    return connect(self, address)
socket.socket.connect = checked
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 500
import prepare, published
for name in ("sp1024", "sp8192-caseops"):
    variant = published.VARIANTS[name]
    published.VARIANTS[name] = published.Variant(variant.repo, VOCAB_SIZE, variant.caseops)
sys.exit(prepare.main())
""".replace("VOCAB_SIZE", str(VOCAB_SIZE))


def process(served, *arguments):
    """The program in a process of its own, which finds the stand-in by HF_ENDPOINT."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(prepare.__file__).parent),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return processes.start(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        supervised=False,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_download_goes_on_where_it_was(tmp_path, serve, published_repos, number):
    served, out, path = serve(published_repos), tmp_path / "out", train_file(3)
    served.stall.add(path)
    running = process(served, "sp1024", "--out", out)
    assert served.stalled.wait(HANG_SECONDS)
    parts = out / ".download"
    wait_until(lambda: any(part.stat().st_size for part in parts.glob("fineweb_train_000003*.part")), running)
    running.send_signal(number)
    served.go_on.set()
    _, said = running.communicate(timeout=HANG_SECONDS)
    assert running.returncode == (-9 if number == signal.SIGKILL else 143), said
    assert number == signal.SIGKILL or said.endswith("what was downloaded is kept, and the same command goes on\n")
    assert not list(out.glob("*.bin"))
    complete = {path.name for path in parts.glob("*.bin")}
    # A busy machine may deliver the signal when the rest of the file has come: then all of it is kept.
    held = max(part.stat().st_size for part in parts.glob("fineweb_train_000003*"))
    assert served.answered.wait(HANG_SECONDS)  # the server counts what it sends to the killed one too
    served.stall.clear()
    before = dict(served.sent)
    second = process(served, "sp1024", "--out", out)
    printed, said = second.communicate(timeout=HANG_SECONDS)
    assert second.returncode == 0, said
    files = published_repos[REPO]["main"]
    assert served.sent[path] - before[path] == len(files[path]) - held
    for name in complete:
        place = f"datasets/datasets/fineweb10B_sp1024/{name}"
        assert served.sent[place] == before[place]
    assert all((out / f"fineweb_train_{n:06d}.bin").read_bytes() == files[train_file(n)] for n in range(4))
    assert not parts.exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused(command("sp1024", "--out", tmp_path / "out"), "huggingface_hub", "requirements-data.txt")
    path = write_parquet(tmp_path / "a.parquet", ["text"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refused(command(path, "--out", tmp_path / "out"), "pyarrow", "requirements-data.txt")


# ------------------------------------------------------------------------------------------------ docs_selected.jsonl


def test_first_documents_validate_and_their_copies_do_not_train(tmp_path, command):
    texts = [story(seed) for seed in range(40)]
    texts[3] = texts[1]  # A copy inside the validation part stays there.
    listed = [*texts[:10], *texts[10:20], texts[4], "", *texts[20:], texts[9], texts[30], texts[4]]
    path = write_jsonl(tmp_path / "docs_selected.jsonl", listed)
    code, printed, _ = command(path, "--out", tmp_path / "out", "--val-documents", 10, "--vocab-size", 320)
    assert code == 0 and "left out of training: 3 documents" in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["duplicates_of_validation"] == 3 and manifest["empty_documents"] == 1
    assert documents_of(tmp_path / "out", manifest, "val") == texts[:10]
    training = documents_of(tmp_path / "out", manifest, "train")
    assert training == [*texts[10:], texts[30]] and not set(training) & set(texts[:10])


def test_the_split_by_place_survives_an_interruption(tmp_path, command, monkeypatch):
    texts = [story(seed) for seed in range(40)]
    path = write_jsonl(tmp_path / "docs_selected.jsonl", [*texts, texts[1], texts[2]])
    arguments = [path, "--val-documents", 5, "--vocab-size", 320, "--shard-tokens", 900, "--out"]
    assert command(*arguments, tmp_path / "whole")[0] == 0
    add, added = shards.Shards.add, []

    def full(self, *rest):
        added.append(rest)
        if len(added) == 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "add", full)
        assert refused(command(*arguments, tmp_path / "parted"), "No space left", "goes on from there")
    assert command(*arguments, tmp_path / "parted")[0] == 0
    assert contents(tmp_path / "parted") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "parted" / "manifest.json").read_text())["duplicates_of_validation"] == 2


def test_fifty_thousand_documents_validate_unless_told_otherwise(tmp_path):
    path = write_jsonl(tmp_path / "docs_selected.jsonl", [f"document {number}" for number in range(50_003)])
    made = sources.Sources(options(path, out=tmp_path / "out"))
    assert sum(1 for _ in made) == 50_003 and len(made.known) == 50_000 and made.val_fraction == 0
    path.write_text("\n".join(path.read_text().splitlines()[:50_000]))
    with pytest.raises(PrepareError, match="only 50000 documents"):
        list(made)
    other = write_jsonl(tmp_path / "other.jsonl", ["text"])
    with pytest.raises(PrepareError, match="must come first"):
        sources.Sources(options(other, path, out=tmp_path / "out"))
    with pytest.raises(PrepareError, match="builtin has a split of its own"):
        sources.Sources(options(path, "builtin:numpy", out=tmp_path / "out"))
    assert sources.validation_documents(options(other, path.parent / "other.jsonl", out=tmp_path)) is None
    assert sources.validation_documents(options(other, out=tmp_path, val_documents=7)) == 7


@examples(max_examples=60)
@given(st.lists(st.text(alphabet="ab", max_size=2), min_size=3, max_size=30), st.integers(1, 29))
def test_split_by_place_on_any_list(tmp_path_factory, texts, first):
    path = write_jsonl(tmp_path_factory.getbasetemp() / f"docs_selected.jsonl.{os.getpid()}.jsonl", texts)
    made = sources.Sources(options(path, out=path.parent, val_documents=first))
    if len(texts) <= first:
        with pytest.raises(PrepareError, match="training needs some"):
            list(made)
        return
    kept = [text for text in texts[first:] if not text or text not in texts[:first]]
    for _ in range(2):  # Both passes see the same.
        assert list(made) == texts[:first] + kept
        assert made.duplicates == len(texts) - first - len(kept)
    assert {text for text in texts if sources.text_hash(text.encode(), 0) in made.known} == set(texts[:first])


def test_docs_selected_is_downloaded_once_and_checked(tmp_path, serve, command):
    texts = [story(seed) for seed in range(30)] + [story(2)]
    data = write_jsonl(tmp_path / "docs.jsonl", texts).read_bytes()
    beside = {"num_docs": 31, "docs_sha256": hub_server.hashlib.sha256(data).hexdigest()}
    files = {
        "datasets/docs_selected.jsonl": data,
        "datasets/manifest.json": b"{}",
        "datasets/docs_selected.source_manifest.json": json.dumps(beside).encode(),
    }
    served, out = serve({REPO: {"main": files}}), tmp_path / "out"
    arguments = ["docs_selected", "--val-documents", 5, "--vocab-size", 320, "--downloads", tmp_path / "kept"]
    assert command(*arguments, "--out", out)[0] == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert documents_of(out, manifest, "val") == texts[:5] and manifest["duplicates_of_validation"] == 1
    assert manifest["source"][0]["repo"] == REPO and len(manifest["source"][0]["files"]) == 2
    before = len(served.requests)
    assert command(*arguments, "--out", out)[1].startswith("already prepared") and len(served.requests) == before
    assert command(*arguments, "--out", tmp_path / "again", "--shard-tokens", 900)[0] == 0
    assert len(served.downloads()) == 2
    for change, fragment in ({"num_docs": 32}, "31 documents"), ({"docs_sha256": "0" * 64}, "hash"):
        files["datasets/docs_selected.source_manifest.json"] = json.dumps({**beside, **change}).encode()
        assert refused(command(*arguments, "--out", tmp_path / "third"), "docs_selected.jsonl", fragment)


# ----------------------------------------------------------------------------------------------------- any dataset


def parquet_bytes(folder, texts, **columns):
    return write_parquet(folder / "some.parquet", texts, **columns).read_bytes()


def test_a_dataset_of_the_hub(tmp_path, serve, command):
    texts = [story(seed) for seed in range(30)]
    halves = [parquet_bytes(tmp_path, part) for part in (texts[:15], texts[15:])]
    branches = {
        "main": {"README.md": b"text"},
        hub.CONVERTED: {
            "default/train/0000.parquet": halves[0],
            "default/train/0001.parquet": halves[1],
            "default/test/0000.parquet": halves[1],
            "small/train/0000.parquet": halves[0],
        },
    }
    serve({"some/texts": branches})
    assert command("hf:some/texts", "--out", tmp_path / "out", "--vocab-size", 320)[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted(
        documents_of(tmp_path / "out", manifest, "train") + documents_of(tmp_path / "out", manifest, "val")
    ) == sorted(texts)
    for name, expected in (("hf:some/texts@test", texts[15:]), ("hf:some/texts:small", texts[:15])):
        assert list(sources.Sources(options(name, out=tmp_path / "out"))) == expected
    assert refused(command("hf:some/texts@other", "--out", tmp_path / "two"), "hf:some/texts@other", "default/test")
    assert refused(command("hf:some/texts", "--text-field", "body", "--out", tmp_path / "two"), '"body"', "text")


@pytest.mark.parametrize(
    "paths, source, expected",
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-0.parquet"], "", [0, 1]),
        (["data/train-0.parquet", "data/test-0.parquet"], "@test", [1]),
        (["sample/10BT/000.parquet", "sample/100BT/000.parquet"], ":sample-10BT", [0]),
        (["sample/10BT/000.parquet", "sample/100BT/000.parquet"], ":sample/100BT", [1]),
        (["en/a.jsonl.gz", "de/a.jsonl.gz"], ":de", [1]),
        (["a.jsonl", "b.jsonl.zst", "c.txt"], "", [0, 1]),
        (["train.jsonl", "validation.jsonl"], "@validation", [1]),
        (["data/a.parquet", "train.jsonl"], "", [0]),
        (["a.csv"], "", None),
        (["en/a.parquet"], ":fr", None),
        (["a.parquet"], "@validation", None),
    ],
)
def test_files_of_a_repository_without_conversion(serve, paths, source, expected):
    serve({"some/texts": {"main": dict.fromkeys(paths, b"data")}})
    if expected is None:
        with pytest.raises(PrepareError, match="file fits"):
            hub.text_files(f"hf:some/texts{source}", None)
    else:
        found = [file.path for file in hub.text_files(f"hf:some/texts{source}", None)[1]]
        assert found == [paths[number] for number in expected]


def test_a_conversion_that_is_cut_is_not_taken(serve):
    serve(
        {
            "some/texts": {
                "main": {"data/train-0.parquet": b"all"},
                hub.CONVERTED: {"default/partial-train/0000.parquet": b"some"},
            }
        }
    )
    assert [file.path for file in hub.text_files("hf:some/texts", None)[1]] == ["data/train-0.parquet"]


# ----------------------------------------------------------------------------------------------------------- readers


def write_parquet(path, texts, rows=4, field="text", **columns):
    table = pyarrow.table({field: pyarrow.array(texts, columns.pop("type", pyarrow.string())), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def read(path, field="text", limit=32 << 10):
    return list(sources.read_texts(Path(path), limit, field))


@examples(max_examples=50)
@given(
    st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(NASTY)), max_size=12),
    st.integers(1, 5),
)
def test_every_format_gives_the_texts_back(tmp_path_factory, texts, rows):
    base = tmp_path_factory.getbasetemp() / f"formats-{os.getpid()}"
    base.mkdir(exist_ok=True)
    packed = write_jsonl(base / "a.jsonl", texts).read_bytes()
    (base / "a.jsonl.gz").write_bytes(gzip.compress(packed[:20]) + gzip.compress(packed[20:]))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(base / name) == texts
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert read(write_parquet(base / "a.parquet", texts, rows, type=kind)) == texts


def test_nulls_are_empty_and_other_columns_are_not_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "three"], body=["1", "2", "3"], number=[1, 2, 3])
    assert read(path) == ["one", "", "three"] and read(path, "body") == ["1", "2", "3"]
    with pytest.raises(PrepareError, match='no column "other".*text, body, number'):
        read(path, "other")
    with pytest.raises(PrepareError, match='"number" holds int64'):
        read(path, "number")


PACKED = gzip.compress(b'{"text": "%s"}' % random.Random(0).randbytes(90).hex().encode(), mtime=0)
DAMAGED = {
    "cut": ("a.jsonl.gz", PACKED[:-12]),
    "checksum": ("a.jsonl.gz", PACKED[:-8] + bytes(8)),
    "rubbish behind": ("a.jsonl.gz", PACKED + b"rubbish"),
    "not packed": ("a.jsonl.gz", b'{"text": "not packed"}'),
    "inside": ("a.jsonl.gz", PACKED[:20] + b"\xff" * 20 + PACKED[40:]),
    "nothing": ("a.parquet", b""),
    "not parquet": ("a.parquet", b"PAR1 and something else PAR1"),
}


@pytest.mark.parametrize("name, data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named(tmp_path, command, name, data):
    (tmp_path / name).write_bytes(data)
    kind = "gzip" if name.endswith(".gz") else "parquet"
    assert refused(command(tmp_path / name, "--out", tmp_path / "out"), tmp_path / name, f"damaged {kind} file")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_with_damage_inside(tmp_path, command):
    path = write_parquet(tmp_path / "a.parquet", [story(seed) for seed in range(50)])
    data = bytearray(path.read_bytes())
    data[200:260] = b"\xff" * 60
    path.write_bytes(data)
    assert refused(command(path, "--out", tmp_path / "out"), path, "damaged parquet file")
    path.write_bytes(data[:-200])
    assert refused(command(path, "--out", tmp_path / "out"), path, "damaged parquet file")


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    texts = random.Random(0).randbytes(30_000_000).hex()
    path = write_parquet(tmp_path / "a.parquet", [texts[at : at + 3000] for at in range(0, len(texts), 3000)], 20_000)
    del texts
    tracemalloc.start()  # Sees Python's own strings; Arrow's buffers are counted by Arrow.
    pool = pyarrow.system_memory_pool()  # The one that it is read with.
    before, most, size = pool.bytes_allocated(), 0, 0
    try:
        for text in sources.read_texts(path, 1, "text"):
            size += len(text)
            most = max(most, pool.bytes_allocated() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 60e6 and peak < 3 * readers.BATCH_BYTES and most < 3 * readers.BATCH_BYTES


def test_lines_of_100_megabytes(tmp_path):
    text = "für 字 " * 11_200_000
    line = json.dumps({"text": text}, ensure_ascii=False).encode() + b'\n{"text": "second"}\n'
    assert len(line) > 100e6
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line, 1))
    assert (read(tmp_path / "a.jsonl.gz") == [text, "second"]) is True  # No attempt to show where they differ.
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert ("".join(pieces) == text) is True and max(len(piece.encode()) for piece in pieces) <= 32 << 10
    assert (read(write_parquet(tmp_path / "a.parquet", [text, "second"])) == [text, "second"]) is True


def test_a_line_that_memory_is_not_kept_for_is_refused(tmp_path, monkeypatch):
    """In one line, by its number, as soon as it is too long; a line of just the most is read."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    path, line = tmp_path / "a.jsonl", json.dumps({"text": "x" * 988})
    assert len(line) == 1000
    path.write_text(f"{line}\n{line}\n")
    assert list(sources.read_texts(path, 4096, "text")) == ["x" * 988] * 2
    path.write_text(f"{line}\n" + json.dumps({"text": "x" * 1200}))
    with pytest.raises(PrepareError, match=r"a\.jsonl:2: a line of more than 1,000 bytes"):
        list(sources.read_texts(path, 4096, "text"))
