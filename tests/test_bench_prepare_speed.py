"""bench/prepare_speed.py: it measures every mode and prints a ratio and a peak for each; its text is as it says."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

import processes
from helpers import run_command

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "prepare_speed.py"
SPEC = importlib.util.spec_from_file_location("prepare_speed", SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_a_small_run_prints_every_figure(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--megabytes",
        "0.4",
        "--large",
        "0.3",
        "--line",
        "0",
        "--vocab-size",
        "400",
        "--repeats",
        "1",
        "--packages",
        "networkx",
    ]
    done = run_command(command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    head, *lines = done.stdout.splitlines()
    assert head.startswith("0.4 MB, 400 pieces, median of 1; ") and "sentencepiece 0." in head
    figure = r" +-?[\d.]+"
    for mode, name in itertools.product(("plain", "--caseops"), ("SentencePiece", "1 worker", "2 workers")):
        row = rf"{mode} +{name}{figure} MB/s for a core{figure} MB/s{figure} times SentencePiece for a core"
        assert re.fullmatch(row, lines.pop(0))
    for workers in (1, 2):
        assert re.fullmatch(rf"peak memory{figure} MB of text, workers: {workers}{figure} MiB", lines.pop(0))
    assert re.fullmatch(rf"peak memory{figure} MB of text, workers: 2{figure} MiB +\(\d+ s in all\)", lines.pop(0))
    assert not lines


def test_long_lines_are_as_long_as_asked(tmp_path, monkeypatch):
    seen = []

    def peak(path, folder, workers, *more):
        with zstandard.open(path, "rt") as file:
            seen.append([json.loads(line)["text"] for line in file])
        return 5 << 20, "dropped: 2 documents" if len(seen) == 4 else "train: 9 documents"

    monkeypatch.setattr(bench, "peak_memory", peak)
    monkeypatch.setattr(bench, "originals", lambda packages: ["a few words " * 10])
    small = (tmp_path / "small.jsonl.zst", bench.write_texts(tmp_path / "small.jsonl.zst", iter(["text"])))
    options = argparse.Namespace(vocab_size=400, large=0, line=0.2, packages=[])
    lines = list(bench.memory_lines(options, small, tmp_path))[2:]
    for line, texts, (name, unit) in zip(lines, seen[2:], bench.LINES.items(), strict=True):
        written = json.dumps(texts[0], ensure_ascii=False).encode()
        assert {text[: len(unit)] for text in texts[:2]} == {unit} and 0.19e6 < len(written) <= 0.2e6 + 2
        assert f"of 0.2 MB, {name}, workers: 2      5 MiB" in line
    assert [line.endswith("(dropped)") for line in lines] == [False, True, False, False]
    assert sum(line.endswith("(none dropped)") for line in lines) == 3


def test_the_text_is_the_corpus_and_then_new_words(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "originals", lambda packages: ["one two three four five " * 40, "six " * 200])
    texts = list(bench.documents([], 10_000))
    assert sum(map(len, texts)) >= 10_000 > sum(map(len, texts[:-1]))
    assert texts[:2] == bench.originals(()) and texts == list(bench.documents([], 10_000))
    for text, original in zip(texts[2:], itertools.cycle(texts[:2]), strict=False):
        changed = [(a, b) for a, b in zip(text.split(" "), original.split(" "), strict=True) if a != b]
        assert len(changed) <= len(original.split(" ")) // bench.SHUFFLED
        assert all(sorted(a) == sorted(b) for a, b in changed)
    assert bench.write_texts(tmp_path / "t.jsonl.zst", iter(texts)) == sum(map(len, texts))
    with zstandard.open(tmp_path / "t.jsonl.zst", "rt") as file:
        assert [json.loads(line)["text"] for line in file] == texts


def test_memory_and_time_of_child_processes_count():
    script = "import time; held = bytearray(64 << 20); print(flush=True); time.sleep(1800)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    process = processes.start([sys.executable, "-c", command], supervised=False, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert 64 << 20 < bench.tree_memory(process.pid) < 200 << 20
    finally:
        os.killpg(process.pid, 9)
        process.communicate()
    busy = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    processor, clock = bench.timed(lambda: subprocess.run([sys.executable, "-c", busy]))
    assert processor > 0.2 and clock > 0.1
    processor, clock = bench.timed(lambda: time.sleep(0.05))
    assert clock >= 0.05


def test_a_failing_command_ends_the_benchmark(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        bench.peak_memory(tmp_path / "missing.jsonl", tmp_path, 1)
