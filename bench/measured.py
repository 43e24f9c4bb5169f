"""Training steps measured on a GPU, against what the budget's model says of that GPU.

    python bench/measured.py bench/results/h200/train.json [...] [--table h100.json] [--out FILE]

The files are those of bench/train.py on one GPU. Only the forward and backward passes are compared: the table of
`make check-h100` is of one rank of eight, whose optimizers do an eighth of the work. The factor is what real kernels
lose on the ceilings; bench/budget.py takes one that was fitted to PR #2163's published steps (docs/budget.md). The last
column is the step measured here, times the model's ratio of an H100 to this chip: an estimate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import cost_model  # noqa: E402
import train_gpt as t  # noqa: E402
from budget import RESULTS, markdown_table  # noqa: E402
from cost_model import Ceilings, Table, TableError  # noqa: E402

# Bytes/s of copies as measured on such machines; products of bf16 matrices were as fast on both (788 and 798 TFLOP/s).
MEMORY = {"NVIDIA H100 80GB HBM3": 3.0e12, "NVIDIA H200": 4.3e12}
USES = dict(plain="training", looped="training (looped)")
COLUMNS = [
    "chip",
    "step",
    "attention",
    "torch",
    "measured ms",
    "modelled ms",
    "ratio",
    "factor",
    "on an H100, estimated",
]


def compared(found: dict[str, Any], table: Table, factor: float) -> list[dict[str, Any]]:
    """The passes of one file of bench/train.py. Errors: TableError for a chip or sizes that the model does not know."""
    if found["chip"] not in MEMORY:
        raise TableError(f"{found['chip']}: the memory's bytes/s are known of {', '.join(MEMORY)}")
    config = table.content.get("config", {})
    other = [name for name, size in found["shape"].items() if config.get(name, size) != size]
    if other or found["tokens_per_step"] != 98_304 or found["ranks"] != 1:
        raise TableError(f"measured with other sizes than {table.name}: {', '.join(other) or 'tokens or ranks'}")
    limits = dataclasses.replace(Ceilings(), memory=MEMORY[found["chip"]])
    rows = []
    for row in found["rows"]:
        if row["part"] == "forward+backward" and row["order"] in USES:
            terms = [r for r in table.rows(USES[row["order"]]) if r.part in ("forward", "backward")]
            here, h100 = (1e3 * cost_model.step_seconds(terms, c) for c in (limits, Ceilings()))
            ms = row["ms_per_step"]
            rows.append(
                dict(
                    chip=found["chip"],
                    order=row["order"],
                    attention=found["backend"]["attention"],
                    torch=found["torch"],
                    measured=ms,
                    modelled=factor * here,
                    ratio=ms / (factor * here),
                    factor=ms / here,
                    on_h100=ms * h100 / here,
                )
            )
    return rows


def text(rows: list[dict[str, Any]], factor: float) -> str:
    """The comparison as a page."""
    lines = ["# Steps measured on a GPU, against the budget's model", ""]
    lines += [f"Forward and backward pass of 98,304 tokens. The budget's factor is {factor:.2f}.", ""]
    digits = dict(measured=1, modelled=1, ratio=2, factor=2, on_h100=1)
    cells = [[f"{v:.{digits[k]}f}" if k in digits else str(v) for k, v in row.items()] for row in rows]
    return "\n".join(lines + markdown_table(COLUMNS, cells)).rstrip() + "\n"


def main() -> int:
    """Returns the exit code: 2 for an error of the user, after one line that explains it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--table", type=Path, default=RESULTS / "h100.json")
    parser.add_argument("--reference", type=Path, default=RESULTS / "h100_reference.json")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        table = Table.read(options.table)
        factor = cost_model.calibrate(Table.read(options.reference), Ceilings()).training.mid
        rows = [row for path in options.files for row in compared(json.loads(path.read_text()), table, factor)]
    except (TableError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = text(rows, factor)
    if options.out:
        t.write_atomic(options.out, shown)
    print(shown, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
