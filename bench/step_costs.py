"""Milliseconds of a training step on one of 8 H100s with other settings, side by side. Every figure is estimated.

    make check-h100 ARGS="--full --only training --set PRESET=frontier --out base"
    make check-h100 ARGS="--full --only training --set PRESET=frontier,NUM_HEADS=4,NUM_KV_HEADS=2 --out wide"
    python bench/step_costs.py base/h100.json wide/h100.json [--out FILE.md]

The tables are those of `make check-h100`, the seconds those of bench/budget.py's model. A row is named by the settings
in which its table differs from the first one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import cost_model  # noqa: E402
from cost_model import Ceilings, Table, TableError  # noqa: E402

USES = ("training", "training (looped)")


def milliseconds(table: Table, use: str, factor: float) -> tuple[float, float]:
    """Of a step, and of attention's kernels in it."""
    rows, c = table.rows(use), Ceilings()
    attention = factor * sum(cost_model.row_seconds(row, c) for row in rows if row.kind == "attention")
    return 1e3 * cost_model.step_seconds(rows, c, factor), 1e3 * attention


def differing(table: Table, first: Table) -> str:
    """The settings that a table's differ in from the first one's; an older table lacks knobs that are off."""
    before, own = (found.content["config"] for found in (first, table))
    changes = {name: value for name, value in own.items() if before.get(name, type(value)()) != value}
    return ", ".join(f"`{name.upper()}={value}`" for name, value in changes.items()) or "as it is"


def page(tables: list[Table], factor: float) -> str:
    """The rows as a page."""
    first = tables[0].content["config"]
    lines = [
        f"# A step of `{first['preset']}` with other settings, estimated",
        "",
        "Made by `bench/step_costs.py` from tables of `make check-h100`. Every figure is estimated, in milliseconds of "
        "a step on one of 8 H100s, and none was measured on a GPU.",
        "",
        "| settings | step before the loops | attention in it | step after | attention in it |",
        "|---|---|---|---|---|",
    ]
    for table in tables:
        figures = (f"{ms:.1f}" for use in USES for ms in milliseconds(table, use, factor))
        lines.append(f"| {differing(table, tables[0])} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Prints the page, or writes it. Returns the exit code: 2 for an error of the user, after one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="h100.json; the first is compared with")
    parser.add_argument("--reference", type=Path, default=ROOT / "bench" / "results" / "h100_reference.json")
    parser.add_argument("--out", type=Path, help="file for the page")
    options = parser.parse_args(arguments)
    try:
        factor = cost_model.calibrate(Table.read(options.reference), Ceilings()).training.mid
        text = page([Table.read(path) for path in options.tables], factor)
        if options.out:
            options.out.write_text(text, encoding="utf-8")
    except (TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
