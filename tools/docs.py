"""Generates parts of the documentation: docs/knobs.md, docs/variables.md, README.md's results, and its picture.

    python tools/docs.py            updates stale files (make docs)
    python tools/docs.py --check    writes nothing; names stale files in one line and exits with 1

docs/knobs.md shows train_gpt.Config as tables. In README.md, the part between the lines that begin with `<!-- results`
and `<!-- end of results` shows submission.json. Without a submission.json at the root, README.md stays as it is. To
generate another part, add a row to PARTS: a file, and a function from the root folder and the old text to the new text.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402
import train_gpt as tg  # noqa: E402
from commands import variables_page  # noqa: E402
from demo_picture import demo_page  # noqa: E402
from runs import Parser, UserError, command_line, read_json, write_atomic  # noqa: E402
from strangers import markdown  # noqa: E402

# ------------------------------------------------------------------------------------------------------ docs/knobs.md

KNOBS_HEAD = """<!-- Made by `make docs` from train_gpt.Config. Do not edit: a change belongs there. -->

# Every knob

A knob is an environment variable. `PRESET` names a set of defaults; a variable that is set overrides the preset, and
what neither sets keeps the default. A value that is not allowed ends the run with one line that names the variable, and
exit code 2. A variable that looks like a misspelt knob gets a warning. `python train_gpt.py --help` prints the same
table; `python train_gpt.py --dry-run` prints the values that a run would use.

*Observed in* says where a change of the knob shows first; `tests/test_knobs.py` changes each knob and compares the
runs. In the order of a run, the places are:
{places}.

Knobs with † describe the model: they travel in the artifact, and `MODE=eval` reads them from there.
""".format(places=", ".join(tg.Observed))


def plain(value: Any) -> str:
    """A knob's value as it is written in the environment."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(int(value) if isinstance(value, bool) else value)


def code(value: Any) -> str:
    return "empty" if value == "" else f"`{plain(value)}`"


def allowed(field: dataclasses.Field) -> str:
    """A knob's type and the values that it allows."""
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return ", ".join(map(code, choices))
    if low is None:
        return {"bool": "0 or 1", "str": "text"}[str(field.type)]
    return f"{field.type}, " + (f"from {plain(low)}" if high is None else f"{plain(low)} to {plain(high)}")


def knob_row(field: dataclasses.Field) -> list[str]:
    """A knob's row of the table."""
    presets = (f"{preset} {code(row[field.name])}" for preset, row in tg.PRESETS.items() if field.name in row)
    name = f"`{field.name.upper()}`" + (
        "†" if field.name in {f.name for f in dataclasses.fields(tg.ModelConfig)} else ""
    )
    cells = [
        name,
        allowed(field),
        code(field.default),
        "<br>".join(presets),
        field.metadata["meaning"],
        field.metadata["observed"],
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def knobs_page(root: Path, text: str) -> str:
    """docs/knobs.md: a table for each section of the knobs."""
    head = "| Variable | Allowed | Default | Presets | Meaning | Observed in |\n|---|---|---|---|---|---|"
    parts = [KNOBS_HEAD]
    for title, fields in tg.knob_sections().items():
        rows = ("| " + " | ".join(knob_row(field)) + " |" for field in fields)
        parts.append("\n".join((f"## {title}", "", head, *rows, "")))
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------- README.md

BEGIN, END = "<!-- results: made by make docs -->", "<!-- end of results -->"


class Column(NamedTuple):
    """A column of the results: title, key of the figure in submission.json, divisor of the figure, number format.

    tools/check_submission.py recognizes a column by words of its title.
    """

    title: str
    key: str
    unit: float
    form: str


COLUMNS = (
    Column("val_bpb pre-quantization", "pre_quant_val_bpb", 1, ".4f"),
    Column("quantized", "quantized_val_bpb", 1, ".4f"),
    Column("after TTT", "ttt_val_bpb", 1, ".4f"),
    Column("with hints", "val_bpb", 1, ".4f"),
    Column("artifact bytes", "artifact_bytes", 1, ".0f"),
    Column("steps", "steps", 1, ".0f"),
    Column("training s", "train_wallclock_ms", 1000, ".1f"),
    Column("evaluation s", "eval_time_s", 1, ".1f"),
)


def results(s: dict[str, Any]) -> str:
    """The table of a submission.json with mean and sample deviation, and a line with hardware, data and date.

    Without test-time training the score is the quantized one, and the column of TTT stays empty. Where hints follow it,
    they have a column.
    Errors: KeyError, TypeError, AttributeError or ValueError if something is missing or has the wrong type.
    """
    rows = s["seed_results"]
    adapted = any(row["val_bpb"] != row["quantized_val_bpb"] for row in rows.values())
    hinted = all("ttt_val_bpb" in row for row in rows.values())
    both = hinted and all(row["ttt_val_bpb"] is not None for row in rows.values())
    chosen = [c for c in COLUMNS if both or c.key != "ttt_val_bpb"]
    if not hinted:  # the score is the one after test-time training
        chosen = [c._replace(title="after TTT") if c.key == "val_bpb" else c for c in chosen]
    columns = [(c, [row[c.key] / c.unit for row in rows.values()]) for c in chosen]
    shown = [(c, values if adapted or c.key != "val_bpb" else []) for c, values in columns]
    table = [["Seed", *(c.title for c in chosen)]]
    for place, seed in enumerate(rows):
        table.append([markdown(seed), *(format(values[place], c.form) if values else "" for c, values in shown)])
    summary = [(c, runs.mean_and_deviation(values) if values else None) for c, values in shown]
    table.append(["mean ± sample deviation", *(pair and with_deviation(*pair, c.form) or "" for c, pair in summary)])
    about = "; ".join(markdown(s[name], 2000) for name in ("hardware", "dataset", "date"))
    return f"{runs.table(table, markdown=True)}\n\n{about}."


def with_deviation(mean: float, deviation: float | None, form: str) -> str:
    return format(mean, form) + (f" ± {format(deviation, form)}" if deviation is not None else "")


def readme_page(root: Path, text: str) -> str:
    """README.md with the results of the root's submission.json. Errors: UserError."""
    file = root / "submission.json"
    if not file.is_file():
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest:
        raise UserError(
            f"README.md: must hold one line {BEGIN} and after it one line {END}, for the results of submission.json"
        )
    try:
        part = results(read_json(file))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: is not a submission.json of tools/reproduce.py ({error!r})") from None
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


# ---------------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Path, str], str]] = {
    "docs/knobs.md": knobs_page,
    "docs/variables.md": variables_page,
    "README.md": readme_page,
    "docs/demo.svg": demo_page,
}


def stale(root: Path) -> dict[str, str]:
    """Files whose generated part is out of date, with their new text. Errors: UserError."""
    texts = {name: (root / name).read_text(encoding="utf-8") if (root / name).is_file() else "" for name in PARTS}
    made = {name: make(root, texts[name]) for name, make in PARTS.items()}
    return {name: text for name, text in made.items() if text != texts[name]}


def main(arguments: list[str]) -> int:
    parser = Parser(prog="docs.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    options = parser.parse_args(arguments)
    changed = stale(ROOT)
    if options.check and changed:
        print(f"stale: {', '.join(changed)}; `make docs` writes them")
        return 1
    for name, text in () if options.check else changed.items():
        write_atomic(ROOT / name, text)
        print(f"written: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
