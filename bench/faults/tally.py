"""The campaign's table and page."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import train_gpt as t
from faults.trials import HUNG, LOST, MISREPORTED, SURVIVED, Kind

COLUMNS = (SURVIVED, LOST, MISREPORTED, HUNG)
SHOWN = 60  # findings in a page


def escape(text: str) -> str:
    """Text as a cell or a list's item: one line, nothing of Markdown or HTML in it."""
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return plain.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def table(rows: list[dict[str, Any]], chosen: dict[str, Kind]) -> str:
    """Trials by kind: tried, survived, lost, misreported, hung. Skipped ones do not count as tried."""
    lines = ["| kind | tried | survived | lost | misreported | hung |", "|---|---:|---:|---:|---:|---:|"]
    counts = {name: Counter(row["verdict"] for row in rows if row["kind"] == name) for name in chosen}
    total: Counter = Counter()
    for name, count in counts.items():
        total += count
        lines.append(f"| {name} | {' | '.join(cells(count))} |")
    lines.append(f"| **all** | {' | '.join(f'**{cell}**' for cell in cells(total))} |")
    return "\n".join(lines)


def cells(count: Counter) -> list[str]:
    """A row's figures."""
    return [str(sum(count[column] for column in COLUMNS)), *(str(count[column]) for column in COLUMNS)]


def page(rows: list[dict[str, Any]], chosen: dict[str, Kind], about: dict[str, Any]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {number}" for name, number in t.versions().items())
    cores = f"{t.available_cores()} cores of {t.cpu_info('model name') or 'an unknown processor'}"
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(about["begun"]))
    lines = [
        "# Campaign",
        "",
        "What was done to runs and tools, and what came of it ([how to read this](../../docs/robustness.md)).",
        "",
        table(rows, chosen),
        "",
        f"Seed {about['seed']}, {about['seconds'] / 60:.1f} minutes, {cores}; {versions}; {date}.",
        f"Command: `{about['command']}`",
        "",
        "| kind | what it does |",
        "|---|---|",
        *(f"| {kind.name} | {kind.meaning} |" for kind in chosen.values()),
        "",
    ]
    skipped = Counter((row["kind"], row["notes"][0]) for row in rows if row["verdict"] == "skipped")
    if skipped:
        lines += ["## Skipped here", ""]
        lines += [f"- {kind}: {count} ({escape(reason)})" for (kind, reason), count in sorted(skipped.items())]
        lines.append("")
    said = sorted({note for row in rows for note in row["notes"] if note.startswith("measured: ")})
    if said:
        lines += ["## Measured", "", *(f"- {escape(note.removeprefix('measured: '))}" for note in said), ""]
    bad = [row for row in rows if row["findings"]]
    if bad:
        lines += ["## Findings", ""]
        for row in bad[:SHOWN]:
            texts = "; ".join(f"{verdict}: {text}" for verdict, text in row["findings"])
            notes = escape(", ".join(row["notes"]))[:300]
            lines.append(f"- {row['kind']}:{row['number']} ({notes}): {escape(texts)[:600]}")
        lines += [f"- {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        lines.append("")
    return "\n".join(lines)
