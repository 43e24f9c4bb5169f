"""Ranks, folders, logs: what a run writes, when, and who writes it."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import train_gpt as tg
from helpers import SCRIPT, TINY, config, single_run, strings, working_folder


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "file"
    tg.write_atomic(target, "first\n")
    assert target.read_text() == "first\n" and oct(target.stat().st_mode)[-3:] == "644"
    tg.write_atomic(target, b"\x00second")
    assert target.read_bytes() == b"\x00second"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        tg.write_atomic(target, "third")
    assert target.read_bytes() == b"\x00second" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_rank_0_alone_writes(tmp_path, capsys):
    for rank in (1, 0):
        run = single_run(rank, 2)
        run.folder = tmp_path
        run.log("a line")
        run.metric(step=1, loss=0.5)
        assert run.is_main is (rank == 0)
        assert (tmp_path / "log.txt").exists() is run.is_main
    assert capsys.readouterr().out == "a line\n"
    assert (tmp_path / "log.txt").read_text() == "a line\n"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}]


def test_lines_are_added_and_evaluation_has_files_of_its_own(tmp_path):
    run = single_run()
    run.folder = tmp_path
    run.log("one")
    run.log("zwei: äöü")
    run.prefix = "eval_"
    run.log("three")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "one\nzwei: äöü\n"
    assert (tmp_path / "eval_log.txt").read_text() == "three\n"


def test_a_line_that_a_kill_cut_off_stays_a_line_of_its_own(tmp_path):
    (tmp_path / "log.txt").write_text("whole\nhal")
    run = single_run()
    run.folder = tmp_path
    run.log("one")
    run.log("two")
    assert (tmp_path / "log.txt").read_text() == "whole\nhal\none\ntwo\n"


def test_one_process_agrees_with_itself():
    run = single_run()
    tensor = torch.tensor([2.0])
    run.all_reduce(tensor)
    run.barrier()
    assert (run.broadcast(0.1), run.broadcast_object({"a": b"b"}), tensor.item()) == (0.1, {"a": b"b"}, 2.0)


def test_stages_add_their_seconds_up():
    run = single_run()
    for _ in range(2):
        with tg.Stage(run, "work"):
            sum(range(10000))
    first = run.seconds["work"]
    with pytest.raises(KeyError), tg.Stage(run, "work"):
        raise KeyError
    assert run.seconds["work"] > first > 0 and set(run.seconds) == {"work"}


def test_memory_and_cores_are_plausible():
    assert 2**20 < single_run().peak_memory() < 2**40
    assert 1 <= tg.available_cores() <= (os.cpu_count() or 1)


def test_start_of_a_single_process(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run = tg.start_run(config(CPU_THREADS=3), {})
    assert (run.rank, run.world, run.local_world, run.device.type, run.is_main) == (0, 1, 1, "cpu", True)
    tg.start_run(config(CPU_THREADS=0), {})
    assert threads == [3, tg.available_cores()]


def test_ranks_share_the_cores(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(tg, "available_cores", lambda: 8)
    monkeypatch.setattr(tg, "join_ranks", lambda *_: None)
    for ranks in (1, 2, 3, 12):
        environment = dict.fromkeys(("RANK", "LOCAL_RANK"), str(ranks - 1))
        environment |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        tg.start_run(config(CPU_THREADS=0), environment)
    assert threads == [8, 4, 2, 1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, with the script's folder on its path, and with these variables alone."""
    variables = dict(PATH=os.environ["PATH"], PYTHONPATH=str(SCRIPT.parent), **environment)
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=True)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs GNU's C library")
@pytest.mark.parametrize("variable, kept", [("X", True), ("MALLOC_ARENA_MAX", False)])
def test_freed_memory_is_kept(variable, kept):
    """Tensors of 48 MiB, 12,288 pages each, are made again and again, until the heap has settled.

    Without the call, all pages are new each time.
    """
    made = python(
        "-c",
        "import os, resource, torch, train_gpt as t\n"
        "t.start_run(t.Config(), dict(os.environ))\n"
        "for _ in range(30):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(12 << 20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)",
        **{variable: "1"},
    )
    assert (int(made.stdout) < 100) == kept, made.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's OpenMP")
@pytest.mark.parametrize(
    "script, given, policy, spins",
    [
        ("train_gpt.py", {}, "ACTIVE", "1000"),
        ("train_gpt.py", {"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE", "0"),
        ("train_gpt.py", {"GOMP_SPINCOUNT": "7"}, "ACTIVE", "7"),
        ("bench/train.py", {}, "ACTIVE", "1000"),
        ("tools/generate.py", {"GOMP_SPINCOUNT": "7"}, "ACTIVE", "7"),
    ],
)
def test_waiting_threads_soon_sleep(script, given, policy, spins):
    """As OpenMP itself prints it when torch is loaded; what the user sets counts."""
    shown = python(str(SCRIPT.parent / script), "--help", OMP_DISPLAY_ENV="verbose", **given).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch has another OpenMP")
    assert f"OMP_WAIT_POLICY = '{policy}'" in shown and f"GOMP_SPINCOUNT = '{spins}'" in shown, shown


def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(tg.ConfigError, match="^DEVICE=cuda: "):
        tg.start_run(config(DEVICE="cuda"), {})


def test_the_folder_is_named_by_the_run_or_given(tmp_path):
    with working_folder(tmp_path):
        for knobs, folder in ((dict(RUN_ID="mine"), "logs/mine"), (dict(ARTIFACT_DIR="a/b", RUN_ID="other"), "a/b")):
            run = single_run()
            tg.open_folder(run, config(**knobs))
            assert run.folder.as_posix() == folder
            saved = json.loads((tmp_path / folder / "config.json").read_text())
            assert saved["model_dim"] == 32 and set(saved) == {f.name for f in tg.dataclasses.fields(tg.Config)}
        run = single_run()
        tg.open_folder(run, config(SEED=5))
        assert run.folder.parent.name == "logs" and run.folder.name.endswith("-baseline-seed5")
        assert not (tmp_path / "logs" / "other").exists()


def test_a_folder_with_other_files_may_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = single_run()
    tg.open_folder(run, config(ARTIFACT_DIR=tmp_path))
    assert run.folder == tmp_path and (tmp_path / "notes.txt").read_text() == "mine"
    run.close()
    with pytest.raises(tg.ConfigError, match="already holds a run"):
        tg.open_folder(single_run(), config(ARTIFACT_DIR=tmp_path, RESUME=0))


def test_errors_name_what_stands_where():
    assert str(tg.ConfigError("KNOB", 3, "must be 4")) == "KNOB=3: must be 4"
    assert str(tg.ConfigError("file.bin", "", "is damaged")) == "file.bin: is damaged"
    assert issubclass(tg.ArtifactError, tg.ConfigError)


@pytest.mark.parametrize(
    "arguments, options, mode",
    [
        ([], set(), None),
        (["--help"], {"--help"}, None),
        (["-h"], {"--help"}, None),
        (["--mode", "eval"], set(), "eval"),
        (["--mode=train"], set(), "train"),
        (["--dry-run", "--mode", "all"], {"--dry-run"}, "all"),
    ],
)
def test_arguments(arguments, options, mode):
    given = {"MODE": "other"} if mode else {}
    found, environment = tg.parse_arguments(arguments, given)
    assert found == options and environment.get("MODE") == mode
    assert given == ({"MODE": "other"} if mode else {})  # the caller's environment is not changed


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(RANK="3", WORLD_SIZE="2"), "RANK=3: must be below WORLD_SIZE=2"),
        (dict(RANK="0", WORLD_SIZE="0"), "RANK=0: must be below WORLD_SIZE=0"),
        (dict(RANK="x", WORLD_SIZE="2"), "RANK=x: must be an integer"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two: must be an integer"),
        (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"), "LOCAL_RANK=2: must be below"),
    ],
)
def test_numbers_of_ranks_that_cannot_be_are_refused_in_one_line(variables, words, data, capfd):
    """The rank whose number is wrong says so itself: there may be no rank 0 to do it."""
    knobs = dict(TINY, DATA_PATH=data, MASTER_ADDR="127.0.0.1", MASTER_PORT=9)
    assert tg.main([], {**strings(knobs), **variables}) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")
