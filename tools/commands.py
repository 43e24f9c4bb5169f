"""Runs public commands through the configuration, without training: what of them is understood, and what is not.

    python tools/commands.py COMMANDS [--each]
    python tools/commands.py --variables          prints docs/variables.md, the community's variables and ours

COMMANDS is tests/public_commands.json, or a table (TSV) with the columns preset and assignments, such as
`record<TAB>SEED=42 TTT_ENABLED=0`. Every assignment is one of:

    understood   a knob, or a value that means what happens here anyway
    translated   another script's name for a knob, or a switch
    off          it turns off, or belongs to, what is off here too
    machine      it is read by a library or a launcher
    warned       it has no effect here, and the log says so, with what comes nearest; STRICT=1 refuses it
    refused      the command ends with an error that names it
    silent       none of these
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import collections
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from runs import Parser, UserError, command_line  # noqa: E402

KINDS = ("understood", "translated", "off", "machine", "warned", "refused", "silent")


class Verdict(NamedTuple):
    """What the configuration makes of a command."""

    kinds: dict[str, str]  # variable: one of KINDS
    refusal: str  # the error's line, or an empty string
    warnings: dict[str, str]  # variable: what comes nearest

    @property
    def whole(self) -> bool:
        """Whether every assignment is understood, or the command is refused by the name of one of them."""
        return bool(self.refusal) or not {"warned", "silent"} & set(self.kinds.values())


def kind_of(name: str, given: dict[str, str], command: tg.Command, warnings: dict[str, str]) -> str:
    """Which of KINDS an assignment is, in a command that is not refused."""
    if name in command.understood:
        return "understood" if name in command.fields and name not in command.sources.values() else "translated"
    if name in warnings:
        return "warned"
    if tg.is_off(given[name]) or given[name] == "" or tg.switched_off(name, given):
        return "off"
    return "machine" if re.match(f"{tg.ORDINARY}|NPROC|NUM_GPUS|CC$|CXX$", name) else "silent"


def judge(preset: str, given: dict[str, str]) -> Verdict:
    """The verdict on a command, on a machine that has no GPU."""
    environment = {"PRESET": preset, "DEVICE": "cpu", **given}
    refused, warnings, command = "", {}, None
    try:
        command = tg.Command(environment, environment["PRESET"])
        warnings = tg.foreign_variables(environment, command.understood)
        tg.config_from_env(environment, False)
    except tg.ConfigError as error:
        refused = str(error)
        names = [name for name in given if name == error.parts[0]]
        if not names:
            return Verdict(dict.fromkeys(given, "silent"), "", {})  # it names what the command does not set
        return Verdict(dict.fromkeys(given, "refused"), refused, warnings)
    return Verdict({name: kind_of(name, given, command, warnings) for name in given}, "", warnings)


def read_commands(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(preset, assignments) of each command of a file. Errors: UserError for a file that is neither of both forms."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("{"):
            content = json.loads(text)
            words = [word.partition("=") for word in content["assignments"]]
            for preset, *numbers in content["commands"]:
                yield content["presets"][preset], {words[n][0]: words[n][2] for n in numbers}
            return
        for row in csv.DictReader(text.splitlines(), delimiter="\t"):
            pairs = (word.partition("=") for word in row["assignments"].split(" ") if "=" in word)
            preset = row["preset"] if row["preset"] in tg.PRESETS else "baseline"
            yield preset, {name: value for name, _, value in pairs}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: no commands can be read from it: {error}") from None


def report(path: Path, each: bool) -> list[str]:
    """The lines of the report on a file of commands."""
    counts, silent, warned, refusals = (collections.Counter() for _ in range(4))
    whole = commands = 0
    lines = []
    for preset, given in read_commands(path):
        verdict = judge(preset, given)
        commands, whole = commands + 1, whole + verdict.whole
        counts.update(verdict.kinds.values())
        silent.update(f"{n}={given[n]}" for n, kind in verdict.kinds.items() if kind == "silent")
        warned.update(f"{n}={given[n]}: {hint}" for n, hint in verdict.warnings.items())
        refusals.update([verdict.refusal] if verdict.refusal else [])
        if each:
            lines.append(f"{preset}: {verdict.refusal or dict(collections.Counter(verdict.kinds.values()))}")
    total = sum(counts.values())
    lines += [f"{kind:10} {counts[kind]:6} assignments, {counts[kind] / max(total, 1):.1%}" for kind in KINDS]
    strict = commands - sum(
        1 for preset, given in read_commands(path) if "silent" in judge(preset, given).kinds.values()
    )
    lines.append(f"{whole} of {commands} commands are understood in full or refused by name ({whole / commands:.0%})")
    lines.append(f"{strict} of {commands} with STRICT=1, which refuses what is warned about ({strict / commands:.0%})")
    for title, rows in (("silent", silent), ("warned about", warned), ("refused", refusals)):
        lines += ["", f"{title}:", *(f"  {count:4} {text}" for text, count in rows.most_common())]
    return lines


def run(arguments: list[str]) -> int:
    """Reports on the commands of a file, or prints the table of variables."""
    parser = Parser(prog="commands.py", description="What of public commands the configuration understands.")
    parser.add_argument("commands", nargs="?", type=Path, help="file of commands")
    parser.add_argument("--each", action="store_true", help="a line for each command, too")
    options = parser.parse_args(arguments)
    if options.commands is None:
        raise UserError("name a file of commands, such as tests/public_commands.json")
    print("\n".join(report(options.commands, options.each)))
    return 0


if __name__ == "__main__":
    sys.exit(command_line(run))
