"""bench/measured.py: what was measured on a GPU, beside the budget's model of that GPU."""

import copy
import json
import sys

import pytest

from helpers import ROOT, run_command

sys.path.append(str(ROOT / "bench"))
import measured  # noqa: E402
from cost_model import Table, TableError  # noqa: E402

RESULTS = ROOT / "bench/results"
FOUND = json.loads((RESULTS / "h200/train.json").read_text())
TABLE = Table.read(RESULTS / "h100.json")


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    page = tmp_path / "measured.md"
    done = run_command([sys.executable, ROOT / "bench/measured.py", RESULTS / "h200/train.json", "--out", page])
    assert done.returncode == 0, done.stderr
    assert done.stdout == page.read_text() == (RESULTS / "h200/measured.md").read_text()


def test_a_slower_chip_and_a_slower_step_show():
    """Half the time is half the ratio; on a chip with less memory bandwidth the model expects more."""
    rows = measured.compared(FOUND, TABLE, 1.0)
    assert [row["order"] for row in rows] == ["plain", "looped"]
    faster, h100 = copy.deepcopy(FOUND), dict(FOUND, chip="NVIDIA H100 80GB HBM3")
    for row in faster["rows"]:
        row["ms_per_step"] /= 2
    assert [r["ratio"] for r in measured.compared(faster, TABLE, 1.0)] == [pytest.approx(r["ratio"] / 2) for r in rows]
    for here, there in zip(rows, measured.compared(h100, TABLE, 1.0), strict=True):
        assert there["modelled"] > here["modelled"] and there["on_h100"] == there["measured"] < here["on_h100"]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(chip="NVIDIA L4"), "NVIDIA L4"),
        (dict(tokens_per_step=4096), "other sizes"),
        (dict(ranks=8), "other sizes"),
        (dict(shape=dict(FOUND["shape"], model_dim=768)), "model_dim"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    with pytest.raises(TableError, match=words):
        measured.compared({**FOUND, **change}, TABLE, 1.0)
