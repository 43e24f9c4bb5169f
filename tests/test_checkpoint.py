"""Checkpoints: a run that is killed goes on, and ends as if nothing had happened."""

import errno
import json
import os
import random
import re
import shutil
import signal
import struct
import threading

import numpy as np
import pytest
import torch

import runs
import train_gpt as tg
from helpers import RECORD_LIKE, ROOT, TINY, config, fork, single_run, strings, wait_until, working_folder
from test_training import make_trainer, no_validation

SCRIPT = ROOT / "tests" / "killed_run.py"
PHASED = dict(
    TTT_MODE="phased",
    TTT_BASELINE=1,
    TTT_LORA_RANK=4,
    TTT_BATCH_SIZE=8,
    TTT_CHUNK_SIZE=64,
    TTT_EVAL_SEQ_LEN=96,
    PHASED_TTT_PREFIX_TOKENS=3000,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=1024,
)
MODES = {
    "phased": PHASED,
    "length": PHASED
    | dict(TTT_BASELINE=0, TTT_ORDER="length", PHASED_TTT_PREFIX_TOKENS=0, PHASED_TTT_PREFIX_DOCS=20, TTT_STREAMS=2),
    "chunk": dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=1024, TTT_EPOCHS=1),
}
# Averages of both kinds, layers that start to train late, and a checkpoint at every step and every batch.
TRAINING = dict(
    ITERATIONS=8, EMA_DECAY=0.9, SWA_ENABLED=1, SWA_EVERY=2, PROGRESSIVE_DEPTH_SCHEDULE="0.3,0.6", MUON_WD=0.1
)
SMALL = {**TINY, **TRAINING, "VAL_BATCH_SIZE": 512, "CHECKPOINT_EVERY_SECONDS": 1e-9}


def go(data, folder, ranks=1, **more):
    return fork(SCRIPT, {**SMALL, "DATA_PATH": data, "ARTIFACT_DIR": folder, **more}, ranks=ranks)


def results(folder):
    """What must be the same: the model, the averages that it was made from, and every score."""
    summary = json.loads((folder / "summary.json").read_text())
    scores = {name: value for name, value in summary.items() if name.startswith(("val_", "steps", "train_tokens"))}
    return (folder / tg.CONTAINER_FILE).read_bytes(), scores


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# ---------------------------------------------------------------------------------------------------------- the files


def tensors_of_all_kinds():
    generator = torch.Generator().manual_seed(1)
    return {
        "weights.a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, dtype=torch.float64, generator=generator),
        "c": torch.randn(2, 2, generator=generator).bfloat16(),
        "scalar": torch.tensor(7.0),
        "counts": torch.arange(4),
        "bits": torch.tensor([1, 255], dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 2, generator=generator).T,
    }


def test_tensors_and_state_are_read_as_written(tmp_path):
    tensors, state = tensors_of_all_kinds(), dict(step=3, seconds=0.1, text="ä\n", none=None)
    tg.write_tensors(tmp_path / "x", tensors, state)
    back, again = tg.read_tensors(tmp_path / "x")
    assert again == state and list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_other_programs_can_read_a_checkpoint(tmp_path):
    """The form of safetensors, read by its definition: a length, a table in JSON, and the numbers."""
    tg.write_tensors(tmp_path / "x", tensors_of_all_kinds(), {})
    data = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    row = table["weights.a"]
    begin, end = row["data_offsets"]
    values = np.frombuffer(data[8 + length :][begin:end], "<f4").reshape(row["shape"])
    assert row["dtype"] == "F32" and np.array_equal(values, tensors_of_all_kinds()["weights.a"].numpy())
    assert length % 8 == 0 and all(isinstance(v, str) for v in table["__metadata__"].values())
    ends = [r["data_offsets"] for name, r in table.items() if name != "__metadata__"]
    assert [b for b, _ in ends] == [0, *(e for _, e in ends[:-1])] and ends[-1][1] == len(data) - 8 - length


def test_no_damage_goes_unnoticed(tmp_path):
    tg.write_tensors(tmp_path / "x", tensors_of_all_kinds(), dict(step=3))
    whole = (tmp_path / "x").read_bytes()
    draw = random.Random(5)
    damaged = [whole[:n] for n in (0, 7, 8, 50, len(whole) - 1)] + [whole + b"\0", b"[" * 200_000, b"\xff" * 99]
    for place in (*range(12), *(draw.randrange(len(whole)) for _ in range(200))):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
    for content in damaged:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint, or a damaged one"):
            tg.read_tensors(tmp_path / "x")


def kept(folder):
    folder.mkdir(exist_ok=True)
    run, lines = single_run(), []
    run.warn = lines.append
    return tg.Checkpoints(run, folder, 1.0), lines


def test_a_step_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """While the thread writes, the tensors change; the file holds what they were."""
    checkpoints, _ = kept(tmp_path / "c")
    may_write, write = threading.Event(), tg.write_tensors

    def slow(*arguments):
        may_write.wait()
        write(*arguments)

    monkeypatch.setattr(tg, "write_tensors", slow)
    weights = torch.ones(4)
    checkpoints.save("step-1.safetensors", dict(w=weights), {}, lambda: ())
    weights.fill_(2.0)
    assert checkpoints.busy and not checkpoints.numbered()
    may_write.set()
    checkpoints.flush()
    assert not checkpoints.busy
    assert torch.equal(tg.read_tensors(tmp_path / "c" / "step-1.safetensors")[0]["w"], torch.ones(4))


def test_what_is_not_finite_never_replaces_a_good_checkpoint(tmp_path):
    checkpoints, _ = kept(tmp_path / "c")
    for number, value in enumerate((1.0, float("nan"), float("inf"))):
        checkpoints.save(f"step-{number}.safetensors", dict(w=torch.tensor([value])), {}, lambda: ())
    checkpoints.flush()
    assert [p.name for p in checkpoints.numbered()] == ["step-0.safetensors"]


def test_a_full_disk_costs_a_line_and_not_the_run(tmp_path, monkeypatch):
    checkpoints, lines = kept(tmp_path / "c")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg, "write_tensors", full)
    checkpoints.save("step-1.safetensors", dict(w=torch.ones(2)), {}, lambda: ())
    checkpoints.flush()
    (line,) = lines
    assert line.startswith(f"checkpoints in {tmp_path / 'c'} cannot be written (No space left on device)")


def test_the_last_two_are_kept(data, tmp_path):
    run = single_run()
    knobs = config({**SMALL, "DATA_PATH": data, "ARTIFACT_DIR": tmp_path / "run"})
    tg.open_folder(run, knobs)
    trainer = make_trainer(SMALL, data)
    trainer.run = run
    tg.train(trainer, no_validation)
    run.close()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir())
    assert names[-2:] == ["step-000000007.safetensors", "step-000000008.safetensors"] and len(names) == 3


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, dict(TINY, NORMUON_BETA2=0.9)], ids=["tiny", "record", "normuon"])
def test_a_training_goes_on_bit_by_bit(base, data):
    """From any step, in another Trainer: with both averages, and layers whose optimizer has no state yet."""
    base = {**base, **TRAINING}
    whole = make_trainer(base, data)
    end = tg.train(whole, no_validation)
    for at in (1, 3, 6):
        first = make_trainer(base, data)
        for step in range(at):
            p = tg.Progress(step, 0.0)
            first.step(p, *tg.step_variant_at(p, first.config))
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        second = make_trainer(base, data)
        second.load(state, first.swa_count)
        assert tg.train(second, no_validation, tg.Progress(at, 0.0)).step == end.step
        for name, tensor in whole.state().items():
            assert torch.equal(tensor, second.state()[name]), (at, name)
        assert second.swa_count == whole.swa_count


# ---------------------------------------------------------------------------------------------------------- the kills


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """For each mode, a run that nobody disturbs, and its events."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for mode, knobs in MODES.items():
        done = go(data, folder / mode, EVENTS_FILE=folder / f"{mode}.events", **knobs)
        assert done.returncode == 0, done.stderr
        found[mode] = results(folder / mode), (folder / f"{mode}.events").read_text().splitlines()
    return found


def finish(data, folder, kills, **knobs):
    """Starts a run, kills it at these events one after another, and lets it end. Returns how often it was killed."""
    for killed, at in enumerate((*kills, 0)):
        done = go(data, folder, KILL_AT=at, **knobs)
        if done.returncode == 0:
            return killed
        assert done.returncode == -9, done.stderr
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments_a_run_ends_as_an_undisturbed_one(mode, undisturbed, data, tmp_path):
    """Seven moments for each of three modes; each kill loses what came after the last checkpoint."""
    expected, events = undisturbed[mode]
    draw = random.Random(mode)
    moments = [draw.randrange(1, len(events) // 2) for _ in range(7)]
    killed = finish(data, tmp_path / "run", moments, **MODES[mode])
    assert results(tmp_path / "run") == expected
    summary = summary_of(tmp_path / "run")
    times = summary["resumed"]  # a kill before there is a folder leaves nothing to be gone on from
    assert 2 < times <= killed and summary["idle_seconds"] > 0
    assert f"resumed    {times} times" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "checkpoint").exists()


def stages(events):
    return [number for number, event in enumerate(events, 1) if event.startswith("__enter__")]


def test_killed_at_the_beginning_of_every_stage(undisturbed, data, tmp_path):
    """One run, killed whenever it begins a stage: it ends, and no stage that had ended is computed again."""
    expected, events = undisturbed["phased"]
    folder, seen = tmp_path / "run", []
    for attempt in range(40):
        lines = tmp_path / f"{attempt}.events"
        begun = [e for file in seen for e in file]
        # The first event of a stage that no attempt has begun yet.
        fresh = [e for e in events if e.startswith("__enter__") and e not in begun]
        done = go(data, folder, EVENTS_FILE=lines, KILL_STAGE=fresh[0].split()[1] if fresh else "", **PHASED)
        seen.append(lines.read_text().splitlines())
        if done.returncode == 0:
            break
    assert done.returncode == 0 and results(folder) == expected
    assert sum("step" in e for file in seen[-3:] for e in file if "train" in e) == 0
    last = seen[-1]
    assert "__enter__ train" not in last and "__enter__ quantize" not in last and "__enter__ ttt" in last


SIGNALLED = dict(CHECKPOINT_EVERY_SECONDS=3600, KILL_STAGE="train", KILL_EVENT="step", KILL_AT=3)


@pytest.mark.parametrize(
    "number, ranks, struck, command",
    [
        (signal.SIGTERM, 1, 0, "the same command"),
        (signal.SIGINT, 1, 0, "the same command with RESUME=auto"),
        (signal.SIGHUP, 1, 0, "the same command"),
        (signal.SIGTERM, 2, 1, "the same command"),
        (signal.SIGINT, 2, 0, "the same command"),
    ],
)
def test_a_signal_leaves_a_checkpoint_of_the_step(number, ranks, struck, command, undisturbed, data, tmp_path):
    """Whichever rank gets it, all end after the same step; nothing that was computed is lost."""
    folder, resume = tmp_path / "run", "0" if "RESUME" in command else "auto"
    knobs = SIGNALLED | dict(KILL_SIGNAL=int(number), KILL_RANK=struck, RESUME=resume)
    done = go(data, folder, ranks, **PHASED, **knobs)
    assert done.returncode == 128 + number, done.stderr
    said = "interrupted" if number == signal.SIGINT else f"error: ended by {number.name}"
    (line,) = done.stderr.splitlines()
    # On two ranks, rank 0 may be a step further when it hears of it.
    steps = {f"{said} after step {step}; {command} goes on" for step in ((3,) if ranks == 1 else (3, 4))}
    assert line in steps and (folder / "log.txt").read_text().splitlines()[-1] == line
    step = int(line.split()[line.split().index("step") + 1].strip(";"))
    assert [p.name for p in folder.glob("checkpoint/step-*")] == [tg.checkpoint_name(step)]
    done = go(data, folder, ranks, **PHASED)
    assert done.returncode == 0 and summary_of(folder)["resumed_at_steps"] == [step], done.stderr
    if ranks == 1:
        assert results(folder) == undisturbed["phased"][0]


@pytest.mark.parametrize("struck", [0, 1])
def test_a_signal_just_before_the_first_step_leaves_a_checkpoint(struck, data, tmp_path):
    """As when torchrun is ended while its ranks still compile: two seconds later a training went on without a word."""
    knobs = SIGNALLED | dict(KILL_EVENT="__enter__", KILL_AT=1, KILL_SIGNAL=int(signal.SIGTERM), KILL_RANK=struck)
    done = go(data, tmp_path / "run", 2, **PHASED | dict(ITERATIONS=100_000), **knobs)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 143 and re.fullmatch(r"error: ended by SIGTERM after step \d+; .* goes on", line), line
    assert [*tmp_path.glob("run/checkpoint/step-*")]


def test_a_second_signal_ends_a_training_at_once(data, tmp_path):
    knobs = SIGNALLED | dict(KILL_SIGNAL=int(signal.SIGTERM), KILL_AGAIN=1.2)
    done = go(data, tmp_path / "run", **knobs)
    assert (done.returncode, done.stderr) == (143, "error: ended by SIGTERM\n")
    assert not [*tmp_path.glob("run/checkpoint/step-*")]


def test_without_checkpoints_a_signal_ends_a_training_as_ever(data, tmp_path):
    done = go(data, tmp_path / "run", **SIGNALLED | dict(CHECKPOINT_EVERY_SECONDS=0, KILL_SIGNAL=int(signal.SIGTERM)))
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_a_refusal_of_several_ranks_leaves_no_lock(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "already holds a run" in refused(go(data, tmp_path / "run", 2))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    run = single_run()
    run.checkpoints = tg.Checkpoints(run, tmp_path, 1.0)
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with pytest.raises(KeyboardInterrupt), tg.SignalHold(run):
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: run.asked)
    assert run.hold is None and signal.getsignal(signal.SIGINT) == before and threading.active_count() == threads


def test_a_checkpoint_that_a_signal_cannot_leave_is_not_claimed(data, tmp_path, monkeypatch):
    def full(path, tensors, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(TINY, data)
    run = trainer.run
    run.folder, run.checkpoints = tmp_path / "mine", tg.Checkpoints(run, tmp_path, 1.0)
    run.folder.mkdir()
    run.journal = tg.Journal(tmp_path / "run.json", run)
    run.hold = tg.SignalHold(run)
    run.hold.take(signal.SIGTERM, 0.0)
    monkeypatch.setattr(tg, "write_tensors", full)
    trainer.save(tg.Progress(5, 1.0), ended=False, last=True)
    error = tg.interrupted(trainer, tg.Progress(5, 1.0))
    assert error.code == 143 and str(error) == (
        "error: ended by SIGTERM after step 5; the same command with RUN_ID=mine goes on from an earlier step, as this "
        "one's checkpoint could not be written"
    )


def test_a_finished_training_is_not_repeated_because_packing_failed(undisturbed, data, tmp_path):
    expected, events = undisturbed["chunk"]
    at = events.index("pack ") + 1
    done = go(data, tmp_path / "run", KILL_AT=at, **MODES["chunk"])
    assert done.returncode == -9
    again = go(data, tmp_path / "run", EVENTS_FILE=tmp_path / "again", **MODES["chunk"])
    assert again.returncode == 0 and results(tmp_path / "run") == expected
    steps = (tmp_path / "again").read_text().split("__enter__ train")[1].split("__enter__ validate")[0]
    assert "step" not in steps and "resumed from" in again.stdout


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run on one rank without a baseline of test-time training."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert go(data, folder, **{**PHASED, "TTT_BASELINE": 0}).returncode == 0
    return folder


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(before, after, alone, data, tmp_path):
    """In the training and in test-time training: every target is scored once, and the score is that of one rank."""
    knobs = {**PHASED, "TTT_BASELINE": 0}
    for stage, moment in (("train", "step"), ("ttt", "run_batch")):
        folder = tmp_path / stage
        done = go(data, folder, ranks=before, KILL_STAGE=stage, KILL_EVENT=moment, KILL_AT=3, **knobs)
        assert done.returncode != 0
        done = go(data, folder, ranks=after, **knobs)
        assert done.returncode == 0, done.stderr
        assert ("resumed from" if stage == "train" else "ttt: resumed in phase") in done.stdout
        ours, theirs = summary_of(folder), summary_of(alone)
        assert ours["val_bpb"] == pytest.approx(theirs["val_bpb"], abs=2e-3)
        assert ours["val_tokens"] == theirs["val_tokens"] and ours["ranks"] == after


def test_files_of_a_stage_that_changed_places_are_passed_over(alone, data, tmp_path):
    """Each is whole, its checksum right, and its model the run's own."""
    knobs, folder = {**PHASED, "TTT_BASELINE": 0}, tmp_path / "run"
    assert go(data, folder, KILL_STAGE="ttt", KILL_EVENT="run_batch", KILL_AT=6, **knobs).returncode == -9
    weights = sorted((folder / "checkpoint").glob("ttt-weights-*"))[-1]
    scores = sorted(p for p in (folder / "checkpoint").glob("ttt-*") if "weights" not in p.name)[-1]
    contents = weights.read_bytes(), scores.read_bytes()
    scores.write_bytes(contents[0])
    weights.write_bytes(contents[1])
    done = go(data, folder, **knobs)
    assert done.returncode == 0, done.stderr
    assert results(folder) == results(alone)


# --------------------------------------------------------------------------------------------------- what is refused


def test_the_seconds_of_all_attempts_count(data, tmp_path):
    """A training with a time limit, killed after its last checkpoint: what was lost counts too."""
    limit = dict(ITERATIONS=100000, MAX_WALLCLOCK_SECONDS=3, CHECKPOINT_EVERY_SECONDS=0.5)
    done = go(data, tmp_path / "run", KILL_STAGE="train", KILL_EVENT="step", KILL_SECONDS=1.7, **limit)
    assert done.returncode == -9
    left = json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())
    assert 0.5 < left["train_seconds"] < 2.5
    done = go(data, tmp_path / "run", **limit)
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "run")
    (at,) = summary["resumed_at_steps"]
    assert at > 0 and 3 <= summary["train_seconds"] < 3.5
    assert summary["seconds"]["train"] > 2  # the journal's last entry is up to half a second older than the kill


def cut_off(data, folder, **more):
    done = go(data, folder, KILL_STAGE="train", KILL_EVENT="step", KILL_AT=5, **more)
    assert done.returncode == -9
    return sorted((folder / "checkpoint").glob("step-*.safetensors"))[-2:]  # a third may wait for being deleted


def refused(done):
    """The one line of a refusal."""
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_a_folder_is_gone_on_with_only_by_the_same_settings(data, tmp_path):
    folder = tmp_path / "run"
    cut_off(data, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "run.lock"}
    line = refused(go(data, folder, SEED=8))
    assert "holds a run that was cut off, and it has SEED=7, and this one 8" in line
    assert "already holds a run" in refused(go(data, folder, RESUME=0))
    assert "already holds a run" in refused(go(data, folder, CHECKPOINT_EVERY_SECONDS=0))
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "run.lock"}
    assert go(data, folder, CPU_THREADS=2, CHECKPOINT_EVERY_SECONDS=5).returncode == 0
    assert "already holds a run" in refused(go(data, folder))


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert go(data, whole).returncode == 0
    older, newer = cut_off(data, folder)
    newer.write_bytes(newer.read_bytes()[:-1])
    done = go(data, folder)
    assert done.returncode == 0 and f"warning: {newer} is no checkpoint, or a damaged one" in done.stdout
    assert summary_of(folder)["resumed_at_steps"] == [int(older.stem.split("-")[1])]
    assert results(folder) == results(whole)


def test_a_checkpoint_begins_a_run_with_other_settings(data, tmp_path):
    """RESUME=PATH takes a file or a run's folder; what differs is logged, and the other run is left alone."""
    folder = tmp_path / "run"
    older, newer = cut_off(data, folder)
    before = {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()}
    for source, step in ((older, older), (folder, newer), (folder / "checkpoint", newer)):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        done = go(data, tmp_path / "other", RESUME=source, MATRIX_LR=0.01)
        assert done.returncode == 0, done.stderr
        assert "resumed with another setting: MATRIX_LR 0.03 -> 0.01" in done.stdout
        summary = summary_of(tmp_path / "other")
        assert summary["resumed_at_steps"] == [int(step.stem.split("-")[1])] and summary["resumed_from"] == str(step)
    assert before == {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()}


def test_where_a_run_came_from_is_kept_at_once(data, tmp_path):
    """Else a kill within the journal's half second would leave a run that says nothing of the other one."""
    source, _ = cut_off(data, tmp_path / "first")
    trainer = make_trainer(SMALL, data)
    trainer.run.journal = tg.Journal(tmp_path / "run.json", trainer.run)  # whose thread does not run
    tg.load_resumed(trainer, tg.Resumed(str(source), *tg.read_tensors(source)))
    left = json.loads((tmp_path / "run.json").read_text())
    assert left["resumed_from"] == str(source) and left["resumed_at"] == [int(source.stem.split("-")[1])]


def test_what_cannot_be_gone_on_from_is_refused_in_one_line(data, tmp_path):
    older, _ = cut_off(data, tmp_path / "run")
    (tmp_path / "text").write_text("no checkpoint")
    for source, reason in ((tmp_path / "missing", "holds no checkpoint"), (tmp_path / "text", "is no checkpoint")):
        line = refused(go(data, tmp_path / "other", RESUME=source))
        assert line.startswith(f"error: RESUME={source}: ") and reason in line
        assert not (tmp_path / "other").exists()
    done = go(data, tmp_path / "wide", RESUME=older, MODEL_DIM=64)
    assert "is of another model" in done.stdout and refused(done).startswith(f"error: RESUME={older}: ")


def test_reports_show_each_step_of_a_resumed_run_once(data, tmp_path):
    """What came after the checkpoint is in the log twice, and counts once."""
    folder = tmp_path / "run"
    logs = dict(TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=1, CHECKPOINT_EVERY_SECONDS=60)  # only at the training's end
    done = go(data, folder, KILL_STAGE="train", KILL_EVENT="step", KILL_AT=5, **logs)
    assert done.returncode == -9 and go(data, folder, **logs).returncode == 0
    steps = list(range(1, 9))
    for read, name in ((runs.read_log, "log.txt"), (runs.read_metrics, "metrics.jsonl")):
        found = read(folder / name)
        assert [row[0] for row in found.losses] == steps and [row[0] for row in found.scores] == [0, *steps]
        assert not found.problems
    assert "step:4/8 train_loss" in (folder / "log.txt").read_text().split("resumed from the beginning: step 0, ")[0]
    assert runs.read_runs(folder)[0].resumed == 1


# --------------------------------------------------------------------------------------------------- NaN, explosions


def test_a_training_that_explodes_names_step_tensor_and_checkpoint(data, tmp_path, monkeypatch, capfd):
    """The checkpoint of before is kept, and its path is in the line."""
    monkeypatch.chdir(tmp_path)
    step = tg.Trainer.step

    def poisoned(trainer, p, *variant, **more):
        if p.step == 5:
            with torch.no_grad():
                trainer.model.kv_bank[0, 0, 0] = float("nan")
        return step(trainer, p, *variant, **more)

    monkeypatch.setattr(tg.Trainer, "step", poisoned)
    values = strings({**SMALL, "DATA_PATH": data, "RUN_ID": "run", "TRAIN_LOG_EVERY": 0})
    assert tg.main([], values) == 2
    (line,) = capfd.readouterr().err.splitlines()
    good = tmp_path / "logs" / "run" / "checkpoint" / "step-000000005.safetensors"
    assert line.startswith("error: MATRIX_LR=0.03: the training loss is nan at step 6, and the first of ")
    assert "tensors of weights that are not finite is '" in line
    assert f"RESUME={good.relative_to(tmp_path)} and another RUN_ID go on from the last checkpoint" in line
    monkeypatch.setattr(tg.Trainer, "step", step)
    resumed = {**values, "RUN_ID": "second", "RESUME": str(good), "MATRIX_LR": "0.01"}
    assert tg.main([], resumed) == 0
    with working_folder(tmp_path):
        assert summary_of(tmp_path / "logs" / "second")["resumed_at_steps"] == [5]


def test_a_loss_that_explodes_ends_the_training(data):
    """Finite, but twice what guessing costs: nothing good comes after it."""
    trainer = make_trainer(TINY, data)

    def loud(p, *variant):
        return torch.tensor(trainer.config.train_batch_tokens * (5.0 if p.step < 3 else 12.0), dtype=torch.float64)

    trainer.step = loud
    with pytest.raises(tg.ConfigError, match=r"the training loss is 12 at step 4, and the largest weight, .* is in '"):
        tg.train(trainer, no_validation)
