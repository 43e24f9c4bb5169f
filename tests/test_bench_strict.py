"""bench/strict.py: the documents that it scores, its three rows of one artifact, and the means of its table."""

import json
import sys

import numpy as np
import pytest

from helpers import ROOT, TINY, fork, fork_script, knob_names, tg

sys.path.append(str(ROOT / "bench"))
import strict  # noqa: E402


def validation_tokens(data):
    return np.concatenate([tg.open_shard(path) for path in sorted(data.glob("fineweb_val_*.bin"))])


def test_a_part_is_whole_documents(data, tmp_path):
    tokens = validation_tokens(data)
    begins = np.flatnonzero(tokens == tg.BOS_ID)
    lengths = strict.write_part(data, tmp_path, 3, 5)
    part = tg.open_shard(tmp_path / "fineweb_val_000000.bin")
    assert np.array_equal(part, tokens[begins[3] : begins[8] + 1])
    assert lengths.tolist() == np.diff(begins[3:9]).tolist()
    with pytest.raises(ValueError, match="has 40 validation documents, not 41"):
        strict.write_part(data, tmp_path, 39, 2)


def test_a_run_has_three_rows_of_the_same_windows(data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, MODE="train", ARTIFACT_DIR=tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small = ["TTT_BATCH_SIZE=8", "TTT_LORA_RANK=4", "TTT_LORA_LR=0.01", "GLOBAL_TTT_CHUNK_TOKENS=512"]
    arguments = ("--data", data, "--documents", 30, "--json", tmp_path / "result.json", "--set", *small)
    done = fork(ROOT / "bench" / "strict.py", {}, tmp_path / "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["rows"]
    assert row["model"] == "baseline, 3 layers of 32" and row["seed"] == TINY["SEED"]
    assert len({row[name]["bpb"] for name in ("off", "length", "stream")}) == 3
    assert row["length"]["phase_ends"] == [7, 15, 22]  # quarters of the 30 documents
    ends = row["stream"]["phase_ends"]
    assert ends and ends == sorted(ends) and ends == row["off"]["phase_ends"]
    assert result["settings"]["TTT_LORA_RANK"] == "4" and result["versions"]["torch"]
    assert done.stdout.endswith("\n".join(result["table"]) + "\n")


def test_settings_are_knobs():
    for settings in (strict.SMALL, *strict.ORDERS.values()):
        assert set(settings) <= set(knob_names())


def test_a_mean_has_its_interval_over_the_seeds():
    rows = [
        dict(
            model="m",
            seed=seed,
            off=dict(bpb=2.0),
            length=dict(bpb=1.9, targets_per_second=100.4),
            stream=dict(bpb=stream, targets_per_second=50.0),
        )
        for seed, stream in ((1, 1.88), (2, 1.89), (3, 1.90))
    ]
    lines = strict.table(rows).splitlines()
    assert lines[2] == "| m | 1 | 2.0000 | 0.1000 | 0.1200 | +0.0200 | 100 | 50 |"
    # Student's t for 2 degrees of freedom, 4.303, times 0.01 over the root of 3
    assert lines[-1] == "| m | mean | 2.0000 ± 0.0000 | 0.1000 ± 0.0000 | 0.1100 ± 0.0248 | 0.0100 ± 0.0248 | | |"
    assert strict.mean_and_interval([0.5]) == "0.5000"
