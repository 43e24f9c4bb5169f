"""bench/ttt_tuning.py: its variants, what it runs once and not again, and its page."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from helpers import ROOT, TINY, fork, fork_script, knob_names, tg, wait_until

sys.path.append(str(ROOT / "bench"))
import ttt_tuning  # noqa: E402


def row(model, variant, bpb, seed=1):
    return dict(model=model, seed=seed, variant=variant, documents=30, bpb=bpb)


def test_variants_change_knobs_of_the_base():
    assert set(ttt_tuning.BASE) <= set(knob_names())
    for name, changes in ttt_tuning.VARIANTS.items():
        assert changes and set(changes) <= set(knob_names()), name
        assert not changes.items() <= ttt_tuning.BASE.items(), f"{name} is the base"


def test_the_base_leaves_no_setting_of_a_variant_to_the_preset():
    changed = set().union(*ttt_tuning.VARIANTS.values())
    assert changed - set(ttt_tuning.BASE) <= {"TTT_BETA2"}  # which all presets have alike


def test_the_page_has_differences_to_the_base_at_each_size():
    rows = [row("a", "base", 2.0), row("a", "beta2 0.9", 1.98), row("b", "base", 1.5), row("b", "beta2 0.9", 1.51)]
    lines = ttt_tuning.report([*rows, row("a", ttt_tuning.OFF, 2.25)]).splitlines()
    assert "| variant | settings | a, seed 1 | b, seed 1 |" in lines
    assert "| base | | 2.0000 bpb | 1.5000 bpb |" in lines
    assert "| beta2 0.9 | `TTT_BETA2=0.9` | -0.0200 | +0.0100 |" in lines
    assert "| without learning |  | +0.2500 |  |" in lines
    assert not any(line.startswith("| rank") for line in lines)  # which did not run


def test_seeds_of_a_model_share_a_column():
    rows = [row("a", "base", 2.0 + seed / 10, seed) for seed in (1, 2, 3)]
    rows += [row("a", "chunk / 2", 2.0 + seed / 10 + change, seed) for seed, change in ((1, -0.01), (2, -0.03))]
    lines = ttt_tuning.report(rows).splitlines()
    assert "| variant | settings | a, seeds 1, 2, 3 |" in lines
    assert "| base | | 2.2000 ± 0.2484 bpb |" in lines  # 4.303 * 0.1 / sqrt(3)
    assert "| chunk / 2 | `TTT_CHUNK_SIZE=24` | -0.0200 ± 0.1271 |" in lines  # of the two seeds that have it


def test_a_setting_that_is_refused_ends_it_with_one_line(data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, MODE="train", ARTIFACT_DIR=tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = ("--results", tmp_path / "rows.jsonl", "--report", tmp_path / "page.md")
    name = "rate x 2, chunk / 3, 48 recomputed"  # the context is 32 tokens
    arguments = ("--data", data, "--documents", 5, "--jobs", 1, *files, "--only", name)
    done = fork(ROOT / "bench" / "ttt_tuning.py", {}, tmp_path / "run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: TTT_RECOMPUTE_TOKENS=48: must be 0, or at least 1")


@pytest.mark.parametrize("error", [tg.ConfigError("SEED", -1, "must be at least 0"), tg.ArtifactError("it is empty")])
def test_errors_of_users_pass_from_one_process_to_another(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and copy.parts == error.parts


def test_what_has_a_result_is_not_scored_again(data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, MODE="train", ARTIFACT_DIR=tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, seed = ttt_tuning.model_of(tmp_path / "run")
    own = dict(artifact=ttt_tuning.digest(tmp_path / "run"))
    known = [row(model, variant, 5.0, seed) | own for variant in ("base", ttt_tuning.OFF)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in known))
    files = ("--results", tmp_path / "rows.jsonl", "--report", tmp_path / "page.md")
    arguments = ("--data", data, "--documents", 30, "--jobs", 1, *files, "--only", "chunk / 2")
    done = fork(ROOT / "bench" / "ttt_tuning.py", {}, tmp_path / "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[:2] == known and [r["variant"] for r in rows[2:]] == ["chunk / 2"]
    assert done.stdout.count(", chunk / 2: ") == 1 and ": 5.0" not in done.stdout
    assert 0 < rows[2]["bpb"] < 12 and rows[2]["targets_per_second"] > 0
    assert (tmp_path / "page.md").read_text() == ttt_tuning.report(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_its_processes_end_with_it(data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, MODE="train", ARTIFACT_DIR=tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = ("--results", tmp_path / "rows.jsonl", "--report", tmp_path / "page.md")
    arguments = [tmp_path / "run", "--data", data, "--documents", 30, "--jobs", 1, *files]
    tuning = subprocess.Popen([sys.executable, ROOT / "bench" / "ttt_tuning.py", *map(str, arguments)], cwd=tmp_path)

    started: set[int] = set()

    def has_started():
        started.update(processes.family().get(tuning.pid, []))
        return len(started) >= 2  # one that scores, and multiprocessing's own

    try:
        wait_until(has_started, tuning)
    finally:
        tuning.kill()
        tuning.wait()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in started))


def test_results_of_another_artifact_are_refused(tmp_path):
    """Also of the same folder, in which another run has been since, and of results that name none."""
    (tmp_path / "config.json").write_text(
        json.dumps(dict(preset="demo", num_layers=4, model_dim=64, seed=1, max_wallclock_seconds=9))
    )
    (tmp_path / "model.pgolf").write_bytes(b"one")
    model, seed = ttt_tuning.model_of(tmp_path)
    scored = row(model, "base", 5.0, seed)
    ttt_tuning.check_artifacts([tmp_path], [scored | dict(artifact=ttt_tuning.digest(tmp_path))], tmp_path / "rows")
    ttt_tuning.check_artifacts([tmp_path], [dict(scored, seed=2)], tmp_path / "rows")
    for other in (scored, scored | dict(artifact="0" * 16)):
        with pytest.raises(ValueError, match="rows has results of another artifact of demo, 4 layers of 64, 9 s, seed"):
            ttt_tuning.check_artifacts([tmp_path], [other], tmp_path / "rows")
