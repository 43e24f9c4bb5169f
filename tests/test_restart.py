"""Preparations that are killed: at whatever moment, the next run goes on and writes what an undisturbed one writes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from helpers import HANG_SECONDS, wait_until

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import prepare  # noqa: E402
import shards  # noqa: E402
import tokenizer  # noqa: E402
from test_prepare import command as command  # noqa: E402
from test_prepare import contents, refused, story, write_jsonl  # noqa: E402

OPTIONS = ("--vocab-size", 300, "--val-fraction", 0.2, "--shard-tokens", 4000, "--workers", 1, "--caseops", "--quiet")


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """A killed process loses nothing that it has written; only a power failure does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A .jsonl file of 30 stories, one of which is dropped and one empty, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("texts")
    stories = [story(seed).title() for seed in range(30)]
    source = write_jsonl(folder / "stories.jsonl", [*stories[:10], "", "half a pair \ud800", *stories[10:]])
    code = run(source, folder / "out")
    assert code == 0
    return source, contents(folder / "out")


def run(source, out, *more):
    return prepare.main([str(item) for item in (source, "--out", out, *OPTIONS, *more)])


def killed(source, out, patch, *more):
    """Whether a forked process that prepares after `patch()` is killed by what it patches; 0 or 2 if not."""
    sys.stdout.flush()
    here = os.getpid()
    child = os.fork()
    if not child:
        processes.follow_parent(here, signal.SIGTERM)
        patch()
        os._exit(run(source, out, *more))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def dies(function, call, *, after=False):
    """The function, but that its `call`th call kills this process."""
    calls = []

    def dying(*arguments, **more):
        calls.append(arguments)
        result = function(*arguments, **more) if after or len(calls) != call else None
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


def patching(owner, name, call, **more):
    return lambda: setattr(owner, name, dies(getattr(owner, name), call, **more))


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (os, "replace")])
def test_killed_at_every_moment_that_lasts(texts, tmp_path, owner, name, capfd):
    """At every file that is made to last and every renaming, those at the end too."""
    source, expected = texts
    for call in range(1, 1000):
        out = tmp_path / str(call)
        if not killed(source, out, patching(owner, name, call)):
            break
        assert run(source, out) == 0 and contents(out) == expected
        assert not (out / prepare.UNFINISHED).exists()
    assert contents(out) == expected and call > (30 if name == "fsync" else 15)


MOMENTS = {
    "survey": (prepare, "text_hash", 15),
    "sample written": (prepare, "write_file", 1),
    "survey written": (prepare, "write_file", 2),
    "tokenizer": (prepare, "train_tokenizer", 1),
    "tokenizer written": (prepare, "write_file", 3),
    "first document": (tokenizer.Codec, "encode_segment", 1),
    "first shard": (shards.Shards, "add", 5),
    "middle": (shards.Shards, "add", 20),
    "end": (shards.Shards, "finish", 1),
    "compressors": (prepare, "reference_compressors", 1),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_killed_in_each_stage(texts, tmp_path, moment, after, monkeypatch):
    """No stage that was finished is done again, and of the documents at most those of a shard."""
    (source, expected), out = texts, tmp_path / "out"
    assert killed(source, out, patching(*MOMENTS[moment], after=after))
    assert contents(out) == {}
    kept, encoded = out / prepare.UNFINISHED, []
    encode = tokenizer.Codec.encode_segment
    monkeypatch.setattr(tokenizer.Codec, "encode_segment", lambda *each: encoded.append(each) or encode(*each))
    for file, name in (("survey.json", "survey"), ("tokenizer.json", "train_tokenizer")):
        if (kept / file).exists():
            monkeypatch.setattr(prepare, name, None)
    done = 0
    if (kept / "state.json").exists():
        state = json.loads((kept / "state.json").read_bytes())
        done = state["documents"]
        lost = sum(path.stat().st_size for path in kept.glob("fineweb_*_0*.bin"))
        lost -= sum(
            1024 + 2 * shard["tokens"]
            for side in state["writers"].values()
            for writer in side
            for shard in writer["shards"]
        )
        assert lost <= 2 * 2 * 4000 + 3 * 1024 + 2 * 4000  # A training shard, and the validation text beside it.
    assert run(source, out) == 0 and contents(out) == expected
    assert len(encoded) == 32 - done - (done <= 10)  # Document 10 is the empty one, which is not encoded.
    assert done >= (15 if moment in ("middle", "end", "compressors") else 0)


def test_killed_again_and_again(texts, tmp_path):
    (source, expected), out = texts, tmp_path / "out"
    kills = 0
    while killed(source, out, patching(os, "fsync", 9)):
        kills += 1
    assert contents(out) == expected and kills > 3


def kill_midway(source, out, *more):
    assert killed(source, out, patching(shards.Shards, "add", 20), *more)
    assert (out / prepare.UNFINISHED / "state.json").exists()


def test_other_options_do_not_go_on(texts, tmp_path, command):
    (source, expected), out = texts, tmp_path / "out"
    kill_midway(source, out)
    before = {path: path.read_bytes() for path in (out / prepare.UNFINISHED).iterdir()}
    assert refused(
        command(source, "--out", out, *OPTIONS, "--seed", 1),
        "an unfinished preparation of other data",
        "seed 0 there, 1 asked",
        "--force",
    )
    assert before == {path: path.read_bytes() for path in (out / prepare.UNFINISHED).iterdir()}
    assert run(source, out, "--seed", 1, "--force") == 0 and contents(out) != expected
    assert json.loads((out / "manifest.json").read_bytes())["options"]["seed"] == 1


def test_changed_sources_do_not_go_on(texts, tmp_path, command):
    data, expected = texts[0].read_bytes(), texts[1]
    source, out = tmp_path / "stories.jsonl", tmp_path / "out"
    source.write_bytes(data)
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    kill_midway(source, out)
    os.utime(source, ns=(1, 1))
    assert refused(command(source, "--out", out, *OPTIONS), "unfinished", "other or changed sources")
    source.write_bytes(data[:20] + data[20:30].swapcase() + data[30:])  # Unseen by its size and time.
    os.utime(source, ns=times)
    assert refused(command(source, "--out", out, *OPTIONS), "the text changed while it was being read")
    assert not list(out.iterdir())
    source.write_bytes(data)
    assert run(source, out) == 0
    assert {**contents(out), "manifest.json": b""} == {**expected, "manifest.json": b""}


def test_force_begins_anew_and_what_it_began_goes_on_without_it(texts, tmp_path, monkeypatch):
    (source, expected), out = texts, tmp_path / "out"
    assert run(source, out, "--seed", 1) == 0
    kill_midway(source, out, "--force")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "survey", None)
        assert run(source, out) == 0  # Without asking again whether the other data may be replaced.
    assert contents(out) == expected
    kill_midway(source, out, "--force")
    read, surveys = prepare.survey, []
    monkeypatch.setattr(prepare, "survey", lambda *both: surveys.append(both) or read(*both))
    assert run(source, out, "--force") == 0 and len(surveys) == 1 and contents(out) == expected


def test_what_another_program_began_is_begun_anew(texts, tmp_path):
    (source, expected), out = texts, tmp_path / "out"
    kill_midway(source, out)
    path = out / prepare.UNFINISHED / "survey.json"
    kept = json.loads(path.read_bytes())
    kept["program"]["sentencepiece"], kept["survey"]["threshold"] = "0.1.0", 1 << 63
    path.write_text(json.dumps(kept))
    assert run(source, out) == 0 and contents(out) == expected


@pytest.mark.parametrize(
    "name", ["fineweb_train_000000.bin", "fineweb_val_bytes_000000.bin", "validation", "state.json"]
)
@pytest.mark.parametrize("lost", [0, 1, None])
def test_files_that_a_disk_has_lost_are_made_again(texts, tmp_path, name, lost):
    (source, expected), out = texts, tmp_path / "out"
    kill_midway(source, out)
    path = out / prepare.UNFINISHED / name
    if lost is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:lost])
    assert run(source, out) == 0 and contents(out) == expected


def test_a_damaged_source_keeps_what_is_finished(texts, tmp_path, command):
    """As one that can't be read for a while does: the same command goes on once it is mended."""
    data, expected = texts[0].read_bytes(), texts[1]
    source, out = tmp_path / "stories.jsonl", tmp_path / "out"
    source.write_bytes(data)
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    kill_midway(source, out)
    source.write_bytes(data[:-9].ljust(len(data)))
    os.utime(source, ns=times)
    assert refused(command(source, "--out", out, *OPTIONS), "not JSON", "what is finished is kept in")
    source.write_bytes(data)
    os.utime(source, ns=times)
    assert run(source, out) == 0
    assert {**contents(out), "manifest.json": b""} == {**expected, "manifest.json": b""}


# ---------------------------------------------------------------------------------------------------- real processes


def start(*arguments):
    return processes.start(
        [sys.executable, str(DATA / "prepare.py"), *map(str, arguments)],
        supervised=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 12 MB, and what an undisturbed run with one worker makes of it."""
    folder = tmp_path_factory.mktemp("large")
    lines = "".join(json.dumps({"text": story(seed, 400)}) + "\n" for seed in range(100))
    source = folder / "large.jsonl"
    source.write_text(lines.replace("}\n", ' ,"id":0}\n') * 50)
    assert prepare.main([str(item) for item in (source, "--out", folder / "out", *LARGE, "--workers", 1)]) == 0
    return source, contents(folder / "out")


LARGE = ("--vocab-size", 320, "--shard-tokens", 500_000, "--quiet")


def wait_for_shards(process, out):
    """Until a run has finished a shard."""
    wait_until((out / prepare.UNFINISHED / "state.json").exists, process)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_with_workers(large, tmp_path, number, code, command):
    (source, expected), out = large, tmp_path / "new" / "out"
    process = start(source, "--out", out, *LARGE, "--workers", 2)
    wait_for_shards(process, out)
    assert refused(command(source, "--out", out), f"--out {out}: another run of this program is writing there")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # As Ctrl-C does: the workers get it too.
    else:
        process.send_signal(number)
    printed, err = process.communicate(
        timeout=HANG_SECONDS
    )  # Returns when the workers, which hold its pipes too, have ended.
    kept = f"what is finished is kept in {out / prepare.UNFINISHED}, and the same command goes on from there"
    assert (process.returncode, printed) == (code, "")
    assert number == signal.SIGKILL or err == f"prepare.py: error: interrupted; {kept}\n"
    assert contents(out) == {}
    code, _, err = command(source, "--out", out, *LARGE[:-1], "--workers", 2)
    assert code == 0 and contents(out) == expected and not (out / prepare.UNFINISHED).exists()
    assert re.search(r"^going on after \d+ of 5000 documents$", err, re.M) and "training" not in err


def test_interrupted_before_anything_is_finished(tmp_path, large):
    out = tmp_path / "new" / "out"
    process = start(large[0], "--out", out, *LARGE)
    wait_until(out.exists, process)
    process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, printed) == (143, "")
    assert err == "prepare.py: error: interrupted; nothing is left of it\n" and not (tmp_path / "new").exists()
