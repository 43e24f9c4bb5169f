"""Runs public commands through the configuration, without training: what of them is understood, and what is not.

    python tools/commands.py COMMANDS [--each] [--blocking N]

COMMANDS is tests/public_commands.json, or a table (TSV) with the columns preset and assignments, such as
`record<TAB>SEED=42 TTT_ENABLED=0`. Every assignment is one of:

    understood   a knob, or a value that means what happens here anyway
    translated   another script's name for a knob, or a switch
    off          it turns off, or belongs to, what is off here too
    machine      it is read by a library or a launcher
    warned       it has no effect here, and the log says so, with what comes nearest; STRICT=1 refuses it
    refused      the command ends with an error that names it
    silent       none of these

Two figures are counted over commands. `whole`: every assignment takes effect, means what happens here anyway, or is
refused by name. `named`: every assignment takes effect or is named with a reason, in a warning or an error.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import collections
import csv
import functools
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
        return bool(self.refusal) or not self.blocking

    @property
    def named(self) -> bool:
        """Whether every assignment is understood, or named with a reason: a warning, or an error with STRICT=1."""
        return "silent" not in self.kinds.values()

    @property
    def blocking(self) -> list[str]:
        """The variables without effect that keep the command from being whole."""
        return [] if self.refusal else [name for name, kind in self.kinds.items() if kind in ("warned", "silent")]


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
    refused, command = "", None
    warnings: dict[str, str] = {}
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


def report(path: Path, each: bool = False, blocking: int = 12) -> list[str]:
    """The lines of the report on a file of commands, with the `blocking` variables that keep most from being whole."""
    counts, silent, warned, refusals, blocks, alone = (collections.Counter() for _ in range(6))
    verdicts, lines = [], []
    for preset, given in read_commands(path):
        verdict = judge(preset, given)
        verdicts.append(verdict)
        counts.update(verdict.kinds.values())
        silent.update(f"{n}={given[n]}" for n, kind in verdict.kinds.items() if kind == "silent")
        warned.update(f"{n}={given[n]}: {hint}" for n, hint in verdict.warnings.items())
        refusals.update([verdict.refusal] if verdict.refusal else [])
        blocks.update(verdict.blocking)
        alone.update(verdict.blocking if len(verdict.blocking) == 1 else [])
        if each:
            kinds = dict(collections.Counter(verdict.kinds.values()))
            lines.append(f"{preset}: {verdict.refusal or kinds} {' '.join(verdict.blocking)}".rstrip())
    total = sum(counts.values())
    lines += [f"{kind:10} {counts[kind]:6} assignments, {counts[kind] / max(total, 1):.1%}" for kind in KINDS]
    for title, met, what in (
        (
            "whole",
            sum(v.whole for v in verdicts),
            "takes effect, means what happens here anyway, or is refused by name",
        ),
        (
            "named",
            sum(v.named for v in verdicts),
            "takes effect or is named with a reason; STRICT=1 refuses the latter",
        ),
    ):
        share = f"{met / max(len(verdicts), 1):.0%}"
        lines.append(f"{title}: {met} of {len(verdicts)} commands ({share}): every assignment {what}")
    lines += ["", "without effect, in commands that are not whole (in as many it is the only one):"]
    lines += [f"  {count:4} ({alone[name]}) {name}" for name, count in blocks.most_common(blocking)]
    for title, rows in (("silent", silent), ("warned about", warned), ("refused", refusals)):
        lines += ["", f"{title}:", *(f"  {count:4} {text}" for text, count in rows.most_common())]
    return lines


# What a variable that is no knob here is about: the first pattern that matches its beginning.
ABOUT = {
    "PRE_?QUANT_TTT": "test-time training of the float model, before quantization",
    "SDTTT": "test-time training by self-distillation",
    "(DEEP_)?SLOT": "vectors trained for each window at evaluation (SLOT)",
    "PAID_PREFIX|TRAIN_ON_VAL|TRAIN_ORACLE": "validation text used in training or in the artifact",
    "WITHIN|WORD|AGREE": "gates of n-gram hints within words and at words' beginnings",
    "PPM": "mixture with a PPM model of bytes",
    "NGRAM_(TILT|HINT)|TOKEN_(ORDER|BOOST|THR)": "hints from repeated runs of tokens",
    "NGRAM|KNN|CTW|PHRASE|CUBRIC|ALPHA|ENTROPY|ONLINE_BEST": "mixture with an n-gram cache",
    ".*(MIXER|HEDGE)|COMPLEMENT|COMP_": "mixture of experts of n-grams with the model",
    "ETLB": "a bias of the logits trained at evaluation",
    "LOGIT_CALIB|TEMP|USE_LOGIT_CAL": "calibration of the logits",
    "(.*_)?TTT|TTT": "option of test-time training",
    "MTP|.*MTP": "multi-token prediction",
    ".*(QAT|CROWN)": "quantization-aware training",
    ".*(LOOP|RECUR|PASS|REPEAT|UNIQUE|NUM_ITER|SHARED|LAYER_SCHED|CORE|CODA|PRELUDE|PHYSICAL|OUTER)": (
        "shared or repeated layers"
    ),
    ".*CRAWLER|INST_DIM|.*FLAT": "a crawler: shared layers beside flat ones",
    "PRUNE": "pruning of the smallest weights",
    ".*(COMPRESS|CODEC|ZSTD)|EXPORT": "compression of the artifact",
    ".*(QUANT|INT[0-9]|BITS|GPTQ|AWQ|TERNARY|BITNET|FP16|FP_|HESSIAN|ROT|HADAMARD|RAKI|LATE_K|LOWBIT)": "quantization",
    "(FINAL_)?(VAL|EVAL|SLIDING|DOC_ISO|KV_EVAL)": "option of the evaluation",
    ".*(TRIGRAM|BIGRAM|HASH)": "hashed embeddings of token pairs or triples",
    "VALUE_RES|VRL": "value residuals, from the first layer to later ones",
    "EMA|SWA|LAWA|USE_POLYAK": "averages of weights",
    ".*(GATE|ATTN|XSA|WINDOW|SDP)": "attention",
    ".*(MOMENTUM|MUON)": "Muon",
    ".*(LR$|LR_)": "learning rates",
    ".*WARMUP|WARMDOWN": "schedules of the learning rate",
    ".*(SEQ_|CURRICULUM|BATCH_)": "schedules of context and batch",
    "JEPA|DIFFUSION|DISTILL|LABEL|FOCAL|KG_|RATIO|AUX|BYTE_W": "terms of the training loss",
    "TVERSKY|REFINER|HYMBA|SSM|HNET|DELTA|CANON|.*ADAPTER|READOUT|EMBED|NUM_EXPERTS|MLP|BACKOUT|ORTHO": "architecture",
    ".*(COMPILE|DYNAMO|FUSED)": "compilation and kernels",
    ".*(LOG_EVERY|CHECKPOINT|STRICT|BUDGET|SKIP_|COMPARE)": "logs, checkpoints and checks",
    ".*(TRAIN_SHARD|SHARDS|REPO|DATA|TOKEN)": "data",
}


def meaning_here(name: str, value: str) -> tuple[str, str]:
    """What a variable is, and what it is here, by a value that is usual. For docs/variables.md."""
    fields = {f.name.upper(): f for f in tg.Config.__dataclass_fields__.values()}
    if name in fields:
        return fields[name].metadata["meaning"].split(";")[0], f"`{name}`"
    about = next((text for pattern, text in ABOUT.items() if re.match(pattern, name)), "of one script or a few")
    for kind, rows in tg.ALIASES.items():
        for row in rows.strip().splitlines():
            names, meaning = row.split(" > ")
            switches = re.search(":|{0=|ttt_mode", meaning) and tg.switch_of(name)[0] in names.split()
            if name in names.split() or switches:
                return f"another name ({kind})", told(meaning)
    for row in tg.FOREIGN.strip().splitlines():
        pattern, meant = row.strip("!~").split(" > ")
        if re.match(pattern.split(" @ ")[0], name):
            if row[0] == "~":
                return about, f"refused where it is on: it asks for another model ({meant})"
            knobs = ", ".join(f"`{knob}`" for knob in meant.split())
            return about, f"refused where it is on: it {meant}" if row[0] == "!" else f"no; nearest: {knobs}"
    if re.match(f"{tg.ORDINARY}|NPROC|NUM_GPUS|CC$|CXX$|TMPDIR$", name):
        return "a variable of the machine, a library or the launcher", "works as everywhere"
    return about, "no"


def told(meaning: str) -> str:
    """A row of train_gpt.ALIASES in words."""
    knob, sign, rest = (*re.split(r"([@={:*+])", meaning, maxsplit=1), "", "")[:3]
    if sign == "@":
        words = (getattr(tg.Command, rest).__doc__ or "").strip().rstrip(".")
    elif sign == "=":
        words = f"has no knob; holds here: {rest.replace('|', ', ')}" if rest != "*" else "changes no score"
    elif sign == ":":
        off, on = re.split("[+ ]", rest)[0].split(":")
        words = f"a switch of `{knob}`: {off or 'empty'} or {on}"
    elif sign == "*":
        words = f"`{knob}`, times {rest}"
    elif sign == "+":
        words = ", ".join(f"`{name}`" for name in (knob, *rest.split("+")))
    else:
        words = ", ".join(in_words(part) for part in meaning.split())
    return words


def in_words(part: str) -> str:
    """A knob of a row of train_gpt.ALIASES, with the values that are translated."""
    knob, _, table = part.rstrip("}").partition("{")
    pairs = [pair.split("=") for pair in table.split(",") if "=" in pair]
    told = ", ".join(f"{value} for {text}" for text, value in pairs if value)
    return f"`{knob}`" + (f" ({told})" if told else "")


@functools.cache
def public_figures() -> str:
    """How many of tests/public_commands.json are whole and named, as docs/variables.md says it."""
    verdicts = [judge(preset, given) for preset, given in read_commands(ROOT / "tests" / "public_commands.json")]
    whole, named = sum(v.whole for v in verdicts), sum(v.named for v in verdicts)
    others = sum(ANOTHER_MODEL in v.refusal for v in verdicts)
    share = f"{whole / len(verdicts):.0%}"
    return FIGURES.format(commands=len(verdicts), whole=whole, named=named, others=others, share=share)


def variables_page(root: Path, text: str) -> str:
    """docs/variables.md: every variable that at least two public pull requests set, and what it is here."""
    lines = [
        VARIABLES_HEAD.format(figures=public_figures()),
        "| Variable | Pull requests | What it is | Here |",
        "|---|---|---|---|",
    ]
    with open(root / "tools" / "variables.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            about, here = meaning_here(row["variable"], row["values"].split(",")[0])
            cells = (f"`{row['variable']}`", row["pull_requests"], about, here)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


ANOTHER_MODEL = "asks for another model"  # of train_gpt's refusals
FIGURES = """\
Of the {commands} public commands in `tests/public_commands.json`, {whole} are whole ({share}) and {named} are named.
{others} ask for another model, such as a mixture of experts, and are refused by that name. What keeps others from being
whole are techniques of one script or a few that this one lacks.\
"""
VARIABLES_HEAD = """\
<!-- Made by `make docs` from tools/variables.tsv and train_gpt.py. Do not edit: a change belongs there. -->

# The community's variables

Every variable that at least two public pull requests of the challenge set in their commands, with the number of them.
The log says what was translated (`NAME=value is read as KNOB=value`), and warns about each variable that has no effect.
With `STRICT=1` such a variable is an error, as it is in `make reproduce` and `tools/sweep.py`. `tools/commands.py` runs
any list of commands through the configuration and counts two things:

- *whole*: every assignment of a command takes effect, means what happens here anyway, or is refused by name;
- *named*: every assignment takes effect or is named with a reason, in a warning or an error.

{figures}
"""


def run(arguments: list[str]) -> int:
    """Reports on the commands of a file, or prints the table of variables."""
    parser = Parser(prog="commands.py", description="What of public commands the configuration understands.")
    parser.add_argument("commands", type=Path, help="file of commands, such as tests/public_commands.json")
    parser.add_argument("--each", action="store_true", help="a line for each command, too")
    parser.add_argument(
        "--blocking", type=int, default=12, metavar="N", help="variables that keep most commands from being whole (12)"
    )
    options = parser.parse_args(arguments)
    print("\n".join(report(options.commands, options.each, options.blocking)))
    return 0


if __name__ == "__main__":
    sys.exit(command_line(run))
