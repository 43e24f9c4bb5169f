"""`make mine`: a folder of texts becomes data, a model and a sample, and what goes wrong is one line."""

import gzip
import io
import json
import os
import random
import shlex
import subprocess
import sys

import pytest

from helpers import ROOT, TINY, clean_environment, launch, run_command

sys.path.insert(0, str(ROOT / "tools"))
import mine  # noqa: E402
import train_gpt as tg  # noqa: E402
from runs import UserError  # noqa: E402
from text import shell_quoted  # noqa: E402

TOOL = ROOT / "tools" / "mine.py"
WORDS = ["der", "die", "das", "Haus", "Straße", "läuft", "über", "eine", "Brücke", "und", "你好", "世界", "def"]


def write_texts(folder, size=30_000):
    """A folder with a blank in its name: a text, a packed one, code, and what is no text."""
    chance = random.Random(5)
    text = ""
    while len(text.encode()) < size:
        text += " ".join(chance.choice(WORDS) for _ in range(12)) + ".\n\n"
    folder.mkdir(parents=True)
    (folder / "eins.TXT").write_text(text)
    (folder / "zwei.md.gz").write_bytes(gzip.compress(text[: size // 3][::-1].encode(), mtime=0))
    (folder / "drei.py").write_text(text[: size // 3])
    (folder / "bild.txt").write_bytes(b"\x89PNG\0\0")
    return folder


def settings(tmp_path, **changes):
    """A model that trains in seconds; the run's folder lies in tmp_path."""
    values = {name: value for name, value in TINY.items() if name not in ("VOCAB_SIZE", "DATA_PATH", "RUN_ID")}
    return {**values, "ARTIFACT_DIR": str(tmp_path / "a run"), **changes}


def test_a_folder_of_texts_becomes_a_model_and_a_sample(tmp_path):
    texts = write_texts(tmp_path / "meine Texte")
    arguments = [texts, "--name", "german", "--out", tmp_path / "the data", "--suffix", "py"]
    done = launch(TOOL, settings(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "the data" / "manifest.json").read_text())
    assert set(manifest["taken"]) == {".txt", ".md.gz", ".py"} and manifest["left_out"] == {"binary files": 1}
    assert manifest["splits"]["val"]["documents"] > 3
    summary = json.loads((tmp_path / "a run" / "summary.json").read_text())
    assert summary["steps"] == TINY["ITERATIONS"] and summary["preset"] == "baseline"
    shown = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [next(word for word in words if word.endswith(".py")) for words in shown] == [
        "data/prepare.py",
        "train_gpt.py",
        "tools/generate.py",
    ]
    assert shown[2][2] == str(tmp_path / "a run") and shown[0][2] == str(texts)
    prompt, sample = shown[2][3], done.stdout.rpartition("\n$ ")[2].partition("\n")[2]
    assert prompt and prompt.split()[0] in sample
    pasted = subprocess.run(
        [
            "bash",
            "-c",
            next(line[2:] for line in done.stdout.splitlines() if line.startswith("$ ") and "generate.py" in line),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert pasted.returncode == 0 and prompt.split()[0] in pasted.stdout


def test_changed_texts_are_prepared_again(tmp_path):
    texts = write_texts(tmp_path / "meine Texte")
    arguments = [texts, "--out", tmp_path / "the data", "--suffix", "py"]
    first = launch(TOOL, settings(tmp_path), *arguments)
    assert first.returncode == 0, first.stderr
    (texts / "vier.txt").write_text("ein neuer Text\n\n" * 500)
    again = launch(TOOL, settings(tmp_path, ARTIFACT_DIR=str(tmp_path / "b")), *arguments, "--prompt", "das Haus")
    assert again.returncode == 0, again.stderr
    assert "have changed" in again.stdout
    assert again.stdout.rpartition("\n$ ")[2].partition("\n")[2].startswith("das Haus")
    last = launch(TOOL, settings(tmp_path, ARTIFACT_DIR=str(tmp_path / "c"), ITERATIONS="no"), *arguments)
    assert last.returncode == 2 and "already prepared" in last.stdout and "error: ITERATIONS" in last.stderr
    assert "generate.py" not in last.stdout


def refused(done, *fragments):
    """Exit code 2, and one line on stderr."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return all(fragment in lines[0] for fragment in fragments)


def test_what_goes_wrong_is_one_line(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "a.txt").write_text("a few words\n" * 20)
    (tmp_path / "empty").mkdir()
    assert refused(launch(TOOL, {}, small), "small: about 240 bytes of text, and a model needs 20,000 or more")
    assert refused(launch(TOOL, {}, tmp_path / "empty"), "empty: the folder holds no file of .txt, .md")
    assert refused(launch(TOOL, {}, tmp_path / "missing"), "missing: no such file or folder")
    assert refused(launch(TOOL, {}, ""), "TEXTS: is needed")
    assert refused(launch(TOOL, {}, small, "--name", "a b"), "--name", "a b", "letters, digits")
    assert refused(launch(TOOL, {}, small, "--minutes", "0"), "--minutes", "from 0.1 to")
    assert refused(launch(TOOL, {}, small, "--suffix", "a b"), "a b: must be the ending of a name")


def test_make_passes_names_with_blanks_and_asks_for_texts(tmp_path):
    environment = clean_environment({"MAKEFLAGS": ""})
    done = run_command(["make", "-C", ROOT, "mine"], env=environment)
    assert done.returncode == 2 and "error: TEXTS: is needed" in done.stderr
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    script.chmod(0o755)
    words = ["-o", "venv", f"PY={script}", "TEXTS=my 'own' texts", "NAME=german", "MINUTES=2", "ARGS=--suffix .py"]
    done = run_command(["make", "-C", ROOT, "--no-print-directory", *words, "mine"], env=environment)
    assert done.stdout == "[tools/mine.py][my 'own' texts][--name][german][--minutes][2][--suffix][.py]", done.stderr


@pytest.mark.parametrize(
    ("path", "name"), [("/a/My Texts", "My-Texts"), ("book.txt.gz", "book"), ("/a/中文/", "中文"), ("/a/..", "texts")]
)
def test_the_name_of_the_data_comes_from_the_texts(path, name):
    assert mine.name_of(path) == name
    assert mine.check_name(name) == name


def test_texts_that_repeat_themselves_are_trained_on_with_a_warning(tmp_path):
    """A licence above each file: its windows are in both splits, which a run refuses unless it is told."""
    licence = " ".join(f"{word} {number}" for number in range(60) for word in WORDS[:3])
    (tmp_path / "texts").mkdir()
    for number in range(60):
        own = " ".join(random.Random(number).choice(WORDS) for _ in range(90))
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{licence}\n\n{own}")
    out = tmp_path / "data"
    arguments = [tmp_path / "texts", "--name", "same", "--out", out]
    done = launch(TOOL, settings(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    share = mine.shared_share(json.loads((out / "manifest.json").read_text()))
    assert share > mine.SHARED_SHARE == tg.Config.allow_shared_windows
    assert f"{share:.0%} of the validation text's passages are in the training text too" in done.stdout
    assert " ALLOW_SHARED_WINDOWS=1 " in done.stdout
    strict = launch(TOOL, settings(tmp_path, ARTIFACT_DIR=str(tmp_path / "b"), ALLOW_SHARED_WINDOWS="0.05"), *arguments)
    assert strict.returncode == 2 and "error: ALLOW_SHARED_WINDOWS=0.05" in strict.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_printed_word_can_be_pasted_on_every_terminal(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    for word in ("a/中文 'ü'\n", "Größe", "plain", "\udcff"):
        shown = shell_quoted(word)
        shown.encode(encoding)
        done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True)
        assert done.stdout == os.fsencode(word)
    assert shell_quoted("中文") == ("'中文'" if encoding == "utf-8" else r"$'\xe4\xb8\xad\xe6\x96\x87'")


def test_small_and_large_texts_get_fitting_options(tmp_path):
    options = mine.argparse.Namespace(texts=str(tmp_path / "a.txt"), suffix=[])
    for size, expected in (
        (25_000, ["--val-fraction", "0.1", "--max-document-bytes", "125"]),
        (2_000_000, ["--val-fraction", "0.05", "--max-document-bytes", "10000"]),
        (40_000_000, ["--val-fraction", "0.01"]),
    ):
        with open(tmp_path / "a.txt", "wb") as file:
            file.truncate(size)
        found = mine.prepare_arguments(options, tmp_path / "out")
        assert found == [options.texts, "--out", str(tmp_path / "out"), "--vocab-size", "auto", *expected]
    os.truncate(tmp_path / "a.txt", 100)
    with pytest.raises(UserError, match="about 100 bytes"):
        mine.prepare_arguments(options, tmp_path / "out")
