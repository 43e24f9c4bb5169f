"""Shared code of the tools: reading runs from folders and logs, statistics over seeds, one-line errors.

A run is read from its folder (summary.json, metrics.jsonl, log.txt), from a metrics file, or from a log alone. The log
may be ours or in the format of the challenge's public records. A figure that is not in a source is None or absent. What
a source says in a wrong form is among the run's problems. tools/strangers.py opens the files.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import strangers
from strangers import (
    AMOUNT,
    COUNT,
    FLAG,
    INTEGER,
    NUMBER,
    TEXT,
    Unreadable,
    UserError,
    either,
    map_of,
    markdown,
    read_json,
    visible,
)

__all__ = ["Unreadable", "UserError", "read_json", "visible"]
ROOT = Path(__file__).resolve().parent.parent
CAP_BYTES, BUDGET_SECONDS = 16_000_000, 600.0  # limits: decimal bytes; seconds of training, and of evaluation
MARGIN_NATS, LEVEL = 0.005, 0.01  # a record must be better by this margin, at a p-value below this level
SEEDS = (42, 0, 314)
LEVELS = 6  # of folders within folders that are looked into
MOST_RUNS, MOST_ROWS = 500, 2_000_000  # that are read at once; losses and scores count as rows
ROWS = 200_000  # of losses and scores that are kept of one run
SETTINGS = 2000  # that are kept of one log
PROBLEMS = 20  # that are kept of one run
RUN_FILES = ("summary.json", "metrics.jsonl", "log.txt")
EVALUATION_STAGES = ("unpack", "evaluate", "ttt")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)


def number_type(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            wanted = "a whole number" if kind is int else "a number"
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted} {limits}")
        return value

    return parse


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line(main: Callable[[list[str]], int]) -> int:
    """Runs a tool's main. A user's error gives one line and exit code 2, an interrupt exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by something else
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the tools leave it while their modules are loaded
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(sys.argv[1:])
    except UserError as error:
        message, code = visible(" ".join(str(error).split()), 2000), 2
    except ModuleNotFoundError as error:
        if error.name and (ROOT / "tools" / f"{error.name.split('.')[0]}.py").exists():
            raise
        message, code = f"{error.name}: is not installed; run `pip install -r requirements-tools.txt`", 2
    except BrokenPipeError:  # who read the output, such as `head`, has left: the end that a signal would have made
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
        return 128 + signal.SIGPIPE
    except OSError as error:
        message, code = f"{visible(error.filename2 or error.filename or 'a file')}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    return code


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a temporary file beside the target and renames it, so that no reader sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------ records


@dataclass
class Stage:
    """A score: nats per token, bits per byte, and seconds of the evaluation if the source has them."""

    loss: float | None  # None: the source has bits per byte alone
    bpb: float
    seconds: float | None = None
    stride: int | None = None
    label: str = ""  # what a log calls it


@dataclass
class Run:
    """All figures known of one run."""

    name: str
    source: str
    seed: int | None = None
    losses: list[tuple[int, float, float | None]] = field(default_factory=list)  # step, train_loss, seconds
    scores: list[tuple[int, float, float, float | None]] = field(default_factory=list)  # step, loss, bpb, seconds
    stages: dict[str, Stage] = field(default_factory=dict)  # those of KNOWN_STAGES, and others under their own names
    last_stage: str | None = None  # the one whose score a log says last
    code_bytes: int | None = None
    model_bytes: int | None = None
    artifact_bytes: int | None = None
    steps: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    train_tokens: int | None = None  # that the training read, of all steps
    train_shards: int | None = None
    targets: int | None = None  # scored tokens
    val_tokens: int | None = None  # tokens of the validation shards
    val_bytes: int | None = None
    shared_documents: int | None = None  # validation documents that are in training too
    strictly_causal: bool | None = None  # whether scores depend on the artifact and earlier tokens alone
    resumed: int = 0  # how often the run was cut off and went on
    parameters: int | None = None
    hardware: str | None = None
    attention: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sections: list[dict] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # what its files say in a wrong form
    remarks: list[str] = field(default_factory=list)  # what a reader should know, and is no fault

    def problem(self, text: str) -> None:
        """Keeps a problem; of very many, the first ones."""
        if text not in self.problems and len(self.problems) < PROBLEMS:
            self.problems.append(text)

    def resume(self, step: int) -> None:
        """Forgets what was computed after a step from which the run, once cut off, went on."""
        self.losses = [row for row in self.losses if row[0] <= step]
        self.scores = [row for row in self.scores if row[0] < step]  # a validation is made again

    @property
    def final_stage(self) -> str | None:
        """The stage whose score counts: a log's last one, otherwise the first of FINAL that there is."""
        if self.last_stage in self.stages:
            return self.last_stage
        known = next((stage for stage in FINAL if stage in self.stages and stage != "pre_quant"), None)
        return known or next((stage for stage in reversed(self.stages) if stage != "ttt_baseline"), None)

    @property
    def final(self) -> Stage | None:
        """The score that counts: that of the run's last stage."""
        name = self.final_stage
        return self.stages[name] if name else None

    @property
    def step_avg_ms(self) -> float | None:
        return 1000 * self.train_seconds / self.steps if self.train_seconds and self.steps else None

    @property
    def tokens_per_step(self) -> float | None:
        """Training tokens of a step: what the settings say, otherwise the mean over the steps."""
        batch = strangers.whole_number(self.settings.get("train_batch_tokens", ""))
        if batch:
            return float(batch)
        return self.train_tokens / self.steps if self.train_tokens and self.steps else None

    @property
    def bpb_per_nat(self) -> float | None:
        """Bits per byte for each nat per token, by a score that a source has in both; None without one."""
        pairs = [(loss, bpb) for _, loss, bpb, _ in reversed(self.scores)]
        pairs += [(stage.loss, stage.bpb) for stage in self.stages.values()]
        for loss, bpb in pairs:
            if strangers.is_number(loss) and strangers.is_number(bpb) and loss and loss > 0 and bpb > 0:
                return bpb / loss
        return None


FINAL = ("hint", "ttt", "sliding", "quantized", "pre_quant")  # the stage that counts is the first of these
KNOWN_STAGES = (*reversed(FINAL), "ttt_baseline")
MOST_STAGES = 40  # that are kept of one run

# One way to match each text, so that no line takes more than its length in steps.
FIGURE = r"[-+]?(?:[0-9][0-9,]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|nan|inf)"
PAIR = re.compile(rf"(?<![\w/])([A-Za-z_][\w/]*)[:=]\s*({FIGURE})(ms|s|m)?(?![\w.])")
STEP = re.compile(
    r"^(?:step[:=]?\s*([0-9]+)(?:/([0-9]+))?|([0-9]+)/([0-9]+)):?[\s|,]+"
    r"(?=(?:train_loss|val_loss|val_bpb|loss)(?:[:=]|\s{1,9}[0-9]))"
)
# A column of `step 100/7000 | loss 5.1039 | 2.4 steps/s | 154s`, and its time at the end.
COLUMN = re.compile(rf"\|\s*([A-Za-z_]\w*)\s+({FIGURE})\s*(?=\||$)")
CLOCK = re.compile(rf"\|\s*({FIGURE})(ms|s|m)\s*$")
NAME = re.compile(r"[\w +.()\[\]:=,|*#>&'~-]{0,160}")
BPB = re.compile(rf"(?<![A-Za-z])val_bpb\s?[:=]\s*({FIGURE})(?![\w.%])(.*)$")
LOSS = re.compile(rf"^(.*?)(?:(?<![A-Za-z])|(?<=_))val_loss\s?[:=]\s*({FIGURE})[\s,|]+(.*)$")
# What stands before a line where a launcher, a terminal or a logger has put it: times, ranks, levels, colours.
COLOUR = re.compile("\x1b\\[[0-9;]{0,20}m")
DAY = r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}"
TIME = r"[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]{1,9})?(?:Z|[+-][0-9]{2}:?[0-9]{2})?"
PREFIX = re.compile(
    rf"(?:\[?{DAY}(?:[T ]{TIME})?\]?|\[?{TIME}\]?|\[\s{{0,9}}[0-9.]{{1,12}}\s?s?\]"
    r"|\[?(?:(?:rank|default|node|gpu)[ :]?[0-9]{1,4}|stdout|stderr)\]?:?(?=[\s|:\[])"
    r"|\[[0-9]{1,4},[0-9]{1,4}\]<std(?:out|err)>|(?:root|__main__)(?=\s-)"
    r"|\[?(?:INFO|DEBUG|WARNING|NOTICE)\]?(?::[\w.]{1,40})?(?=[\s|:-])|[0-9]{1,3}:(?=\s))(?:\s?[|:-])? ?",
    re.IGNORECASE,
)
SIZE = re.compile(r"^(Total submission size|Code size|Serialized model|serialized_model)([^:]*):\s*([0-9,]+) bytes")
ARTIFACT = re.compile(r"^\s*(?:total |final )?artifact(?: size)?:\s*([0-9][0-9,]*) bytes", re.IGNORECASE)
# A score as `Quantized BPB (no XSA): 1.041537`, where it names a stage that is known.
SPOKEN = re.compile(
    rf"^\s*(?:([A-Za-z][A-Za-z +-]{{0,60}}?) (?:BPB|bpb)(?: ?\([^()]{{0,40}}\))?"
    rf"|(?:val_)?(?:BPB|bpb) \(([A-Za-z][\w +-]{{0,60}})\))\s?[:=]\s*({FIGURE})\s*$"
)
OURS = {
    "artifact": re.compile(r"^artifact +([0-9]+) bytes \(code ([0-9]+) \+ model ([0-9]+)\)"),
    "read back": re.compile(r"^val_bpb .*read back; ([0-9]+) targets, ([0-9]+) bytes"),
    "trained": re.compile(r"^trained +([0-9]+) steps, ([0-9]+) tokens, .* ([0-9]+) parameters$"),
    "seconds": re.compile(r"^seconds +(.*); (?:in all|total)"),
    "folder": re.compile(r"^\S+  (.*ranks?|[0-9]+ x .*?)  (\{.*\})$"),
    "shared": re.compile(r"^(?:warning: )?audit: ([0-9]+) validation documents are in the training shards too"),
    "attention": re.compile(r"^device:\w+ .*\battention:(\w+)"),
    "causal": re.compile(r"^ +strictly causal: (yes|no)$"),
    "resumed": re.compile(r"^resumed from .*: step ([0-9]+), [0-9.]+ s of training count$"),
}
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0, "": 1.0}


def number(text: str) -> float:
    """A figure of a log: nan and inf are figures of a training that diverged. Errors: Misread."""
    value = float(text.replace(",", ""))
    if not is_figure(value):
        raise Misread(text)
    return value


def amount(text: str) -> float:
    """A figure of a log that is finite and not negative, such as seconds. Errors: Misread."""
    value = number(text)
    if not 0 <= value <= strangers.LARGEST:
        raise Misread(text)
    return value


def whole(text: str) -> int:
    """A whole number of a log. Errors: Misread for one with more digits than any count has."""
    value = strangers.whole_number(text.replace(",", ""))
    if value is None:
        raise Misread(text)
    return value


def step_pairs(line: str) -> dict[str, tuple[str, str]]:
    """The figures of a line of training, by name, each with its unit."""
    pairs = {name: (value, unit) for name, value, unit in PAIR.findall(line)}
    if "|" in line:
        pairs |= {name: (value, "") for name, value in COLUMN.findall(line) if name not in pairs}
        if "train_time" not in pairs and (clock := CLOCK.search(line)):
            pairs["train_time"] = (clock[1], clock[2])
    return pairs


class Misread(Exception):
    """A figure that cannot be one."""


# Words of a stage's line that say how a score was made, and do not change what is scored. All others name a stage that
# is not known here, such as slot or ngram.
PLAIN_TEXT = """
final exact legal val eval evaluation validation test diagnostic result results score scored first full stride
window windows win context ctx seq len seqlen seq_len zlib zstd lzma brotli br xz bz2 ans rans pergroup gptq
lite mixed packed artifact model saved reloaded export exported research storage pass stored phased lora global
chunk chunked causal sgd adam adamw muon doc docs document documents post after of the with and best only
standard std compat done end complete completed total bits bit awq lqer sdclip per row rank seed loss bpb metric
metrics compressed serialized deserialized weights params state dict eval_only submission official main default
batched compiled flash online
"""
PLAIN_WORDS = frozenset(PLAIN_TEXT.split())
AVERAGE_WORDS = frozenset(("ema", "swa", "lawa", "average", "averaged", "avg", "raw", "float", "unquantized"))
BASELINE_WORDS = frozenset(("baseline", "before", "no", "without", "pre"))
QUANTIZED_WORD = re.compile(r"(de)?quant|postquant|roundtrip|rt$|ternary|binary|[fn]f4")
BITS_WORD = re.compile(r"u?int[0-9]+|[0-9]+bit|fp[0-9]+|bf16|q[0-9]")


def own_name(words: str) -> str:
    """What a line calls its stage, as one word."""
    name = re.sub(r"[^a-z0-9+]+", "_", words.lower()).strip("_")
    return re.sub(r"^final_(?=.)|_exact$", "", name) or "score"


def stage_name(words: str) -> tuple[str, bool]:
    """(name, known) of the stage that a log line names, in our words or those of the public records.

    A stage that is not known has the line's own words as its name.
    """
    lowered = re.sub(r"pre[-_ ]?quant\w*|pre[-_ ]?export", " prequant ", words.lower())
    tokens = [word for word in re.split(r"[^a-z0-9]+", lowered) if word]
    named = [word for word in tokens if not re.fullmatch(r"[swl]?[0-9]+k?|[0-9]+d", word)]
    bits = {word for word in named if BITS_WORD.fullmatch(word)}
    quantized = {word for word in named if QUANTIZED_WORD.match(word)} | bits
    sliding = {"sliding", "slide", "sw"} & set(named)
    averages = AVERAGE_WORDS & set(named)
    before, ttt = "prequant" in named, "ttt" in named
    without = BASELINE_WORDS & set(named) if ttt else set()
    rest = set(named) - PLAIN_WORDS - quantized - sliding - averages - without - {"prequant", "ttt"}
    if "roundtrip" in quantized:
        rest = {word for word in rest if not re.fullmatch(r"(?:[a-z]{1,3}[0-9]{1,2}){2,4}", word)}  # a format: w6e8
    own = own_name(words)
    if rest == {"hint"} and not ttt and not before:
        return "hint", True
    if rest or (before and (ttt or sliding)) or not (ttt or sliding or quantized or averages or before):
        return own, False
    if ttt:
        return ("ttt_baseline" if without else "ttt"), True
    if sliding:
        return "sliding", True
    return ("pre_quant", True) if before or (averages and not quantized - bits) else ("quantized", True)


def bare(line: str) -> str:
    """A line of a log without colours, and without what a launcher or a logger put before it."""
    line = COLOUR.sub("", line) if "\x1b" in line else line
    line = line.rpartition("\r")[2]  # a progress bar was written over
    for _ in range(4):
        match = PREFIX.match(line)
        if not match or match.end() == len(line):
            break
        line = line[match.end() :]
    return line


class LogReader:
    """Reads the lines of a log into a Run."""

    def __init__(self, run: Run):
        self.run, self.exact = run, set()
        self.total = False  # a line had the total size
        self.mode: int | None = None  # the stride of sliding windows in which the last stage is scored

    def feed(self, line: str) -> None:
        """Reads one line, without its newline. A line with an impossible figure is a problem of the run."""
        line = bare(line)
        try:
            if match := STEP.match(line):
                step = whole(match[1] or match[3])
                self.step(step, step_pairs(line))
            elif match := SIZE.match(line):
                self.size(match[1], match[2], whole(match[3]))
            elif not self.stage(line):
                self.other(line)
        except Misread as error:
            self.run.problem(f"log: the figure {visible(error, 40)} is impossible: {visible(line, 60)}")

    def step(self, step: int, pairs: dict[str, tuple[str, str]]) -> None:
        seconds = amount(pairs["train_time"][0]) * SECONDS[pairs["train_time"][1]] if "train_time" in pairs else None
        if len(self.run.scores) + len(self.run.losses) >= ROWS:
            self.run.problem(f"log: has more than {ROWS} lines of training; the rest is passed over")
            return
        if "val_bpb" in pairs:
            loss = number(pairs["val_loss"][0]) if "val_loss" in pairs else math.nan
            self.run.scores.append((step, loss, number(pairs["val_bpb"][0]), seconds))
        elif found := pairs.get("train_loss", pairs.get("loss")):
            self.run.losses.append((step, number(found[0]), seconds))
        if step and seconds is not None:
            self.run.steps, self.run.train_seconds = step, seconds

    def stage(self, line: str) -> bool:
        """Whether the line is a stage's score, which it keeps unless it is a count of progress or says one again."""
        found = split_score(line)
        if found is None:
            return False
        words, loss, bpb, rest = found
        exact = "exact" in words
        label = re.sub(r"_?exact", "", " ".join(words.split())).strip(" :=")
        if not exact and label in self.exact:
            return True
        name = stage_name(words)[0]
        if exact:
            self.exact.add(label)
        pairs = {n: (v, unit) for n, v, unit in PAIR.findall(rest)}
        stage = Stage(None if loss is None else number(loss), number(bpb), label=label)
        for word in ("eval_time", "time", "elapsed", "t"):
            if word in pairs and stage.seconds is None:
                stage.seconds = amount(pairs[word][0]) * SECONDS[pairs[word][1]]
        stride = re.search(r"stride[:=]?\s?([0-9]{1,9})\b", line)
        stage.stride = whole(stride[1]) if stride else None
        if name == "quantized" and self.mode:  # how a line before has said that it is scored
            name, stage.stride = "sliding", self.mode
        self.keep(name, stage)
        return True

    def keep(self, name: str, stage: Stage) -> None:
        """Adds a stage, as the one that counts so far unless it is a score of before the quantization."""
        run = self.run
        before = run.stages.get(name)
        if name == "quantized" and not before and "ttt" in run.stages and not same_score(run.stages["ttt"], stage):
            first = run.stages.pop("ttt")  # training on the validation text before the quantization
            run.stages[own_name(first.label)] = first
        if name == "quantized":
            # Scripts end with a line of the baseline's name that says the last stage's score once more.
            others = [other for other in run.stages if other not in ("quantized", "pre_quant", "ttt_baseline")]
            if any(same_score(run.stages[other], stage) for other in others):
                return
            repeated = before and any(same_score(run.stages[other], before) for other in others)
            if repeated:  # it was that line, and came first
                run.stages["quantized"] = stage
                return
            if before and others and before.label != stage.label:
                name = own_name(stage.label)
                before = run.stages.get(name)
        if before:
            stage.seconds = before.seconds if stage.seconds is None else stage.seconds
            stage.stride = before.stride if stage.stride is None else stage.stride
        if not before and len(run.stages) >= MOST_STAGES:
            run.problem(f"log: has more than {MOST_STAGES} stages; the first ones are passed over")
            run.stages.pop(next((other for other in run.stages if other not in KNOWN_STAGES), next(iter(run.stages))))
        run.stages[name] = stage
        early = name in ("pre_quant", "ttt_baseline") or bool(re.search(r"pre_?quant|pre_?export", name))
        if not early and not (before and same_score(before, stage)) and not (name == "sliding" and self.beyond(stage)):
            run.last_stage = name

    def beyond(self, stage: Stage) -> bool:
        """Whether the last stage is one that is not known, on top of sliding windows which are said after it."""
        stages = list(self.run.stages)
        last = self.run.last_stage
        if last is None or last in KNOWN_STAGES or "quantized" not in stages:
            return False
        return stages.index("quantized") < stages.index(last) and self.run.stages[last].bpb < stage.bpb

    def size(self, what: str, form: str, count: int) -> None:
        """Keeps the last total, since records first print that of the unquantized model."""
        if what.startswith("Code"):
            if "uncompressed" not in form:
                self.run.code_bytes = count
        elif what.startswith("Total"):
            self.run.artifact_bytes, self.total = count, True
        else:
            self.run.model_bytes = count

    def other(self, line: str) -> None:
        run = self.run
        if match := OURS["artifact"].match(line):
            run.artifact_bytes, run.code_bytes, run.model_bytes = map(whole, match.groups())
        elif match := OURS["read back"].match(line):
            run.targets, run.val_bytes = whole(match[1]), whole(match[2])
        elif match := OURS["trained"].match(line):
            run.steps, run.train_tokens, run.parameters = map(whole, match.groups())
        elif match := OURS["seconds"].match(line):
            run.seconds = self.stage_seconds(match[1])
        elif line.endswith("}") and (match := OURS["folder"].match(line)):
            run.hardware = match[1]
            run.versions = dict(re.findall(r"'(\w+)': '([^']*)'", match[2]))
        elif match := OURS["attention"].match(line):
            run.attention = match[1]
        elif match := OURS["shared"].match(line):
            run.shared_documents = whole(match[1])
        elif match := OURS["causal"].match(line):
            run.strictly_causal = match[1] == "yes"
        elif match := OURS["resumed"].match(line):
            run.resume(whole(match[1]))
        else:
            self.records(line)

    def stage_seconds(self, text: str) -> dict[str, float]:
        """Seconds by stage of a list such as `train 9.1, pack 0.2`. Errors: Misread."""
        found = {}
        for part in text.split(", "):
            name, _, value = part.rpartition(" ")
            if not re.fullmatch(FIGURE, value):
                raise Misread(value)
            found[name] = amount(value)
        return found

    def records(self, line: str) -> None:
        """Lines that only logs of public records have."""
        run = self.run
        if line.startswith("stopping_early"):
            pairs = {name: (value, unit) for name, value, unit in PAIR.findall(line)}
            step = re.search(r"step[:=]\s*([0-9]+)(?:/|\s|$)", line)
            if step and pairs.get("train_time", ("", ""))[1]:
                seconds, unit = pairs["train_time"]
                run.train_seconds, run.steps = amount(seconds) * SECONDS[unit], whole(step[1])
        elif match := re.match(r"^Stopping early at step ([0-9]+)\b", line, re.IGNORECASE):
            run.steps = whole(match[1])
        elif match := re.match(rf"^Training (?:complete|done|finished)(?: in|:) ({FIGURE}) ?(ms|s|m)\b", line, re.I):
            run.train_seconds = amount(match[1]) * SECONDS[match[2]]
        elif match := ARTIFACT.match(line):
            run.artifact_bytes = run.artifact_bytes if self.total else whole(match[1])
        elif match := SPOKEN.match(line):
            words = (match[1] or match[2]).strip()
            name, known = stage_name(words)
            said = run.stages.get(name)
            if known and (said is None or said.label == words):
                self.keep(name, Stage(None, number(match[3]), label=words))
        elif match := re.match(r"^final_eval_mode:\s*(\w+)(?:.*\bstride[:=]\s*([0-9]{1,9}))?", line):
            self.mode = whole(match[2]) if "sliding" in match[1] and match[2] else None
        elif match := re.match(
            r"^val_loader:.*tokens:\s*([0-9]+)|^val_tokens:\s*([0-9]+)|^Validation tokens:\s*([0-9][0-9,]*)", line
        ):
            run.val_tokens = whole(match[1] or match[2] or match[3])
        elif match := re.match(rf"^total_eval_time:\s*({FIGURE})(ms|s)", line):
            run.eval_seconds = amount(match[1]) * SECONDS[match[2]]
        elif match := re.match(r"^(?:model_params|Total param(?:eter)?s):\s*([0-9][0-9,]*)", line):
            run.parameters = whole(match[1])
        elif len(run.settings) < SETTINGS and (match := re.match(r"^ {0,4}(\w+): ?([^\s:]\S*)$", line)):
            run.settings.setdefault(match[1].lower(), match[2])
        if match := re.match(r"^\s*seed\s?[:=]\s*([0-9]+)\b", line, re.IGNORECASE):
            run.seed = whole(match[1])
        for name, value in re.findall(r"(?<!\w)(train_shards|train_batch_tokens)\s?[:=]\s*([0-9]+)\b", line):
            if name == "train_shards":
                run.train_shards = whole(value)
            else:
                run.settings.setdefault(name, value)


def seed_in_name(stem: str) -> int | None:
    """The seed that a file's name says, such as train_seed42."""
    match = re.search(r"seed_?([0-9]+)", stem)
    return strangers.whole_number(match[1]) if match else None


HELD = 2000  # lines before a run's first step that may belong to it or to the run before


class RunSplitter:
    """Gives the lines of a log to the runs that are in it, one after the other.

    A run begins where steps begin again: at step 0 or 1, or anywhere below after the run before had ended. What stands
    between the last result of a run and the first step of the next, such as settings, is the next one's.
    """

    def __init__(self, new: Callable[[], Run]):
        self.runs, self.new = [new()], new
        self.reader = LogReader(self.runs[0])
        self.held: list[str] = []
        self.step, self.ended = -1, False

    def feed(self, line: str) -> None:
        """Reads one line, without its newline."""
        text = bare(line)
        match = STEP.match(text)
        if match:
            self.at_step(whole_or(match[1] or match[3], self.step), whole_or(match[2] or match[4], 0))
        elif text.startswith("resumed from "):
            self.step, self.ended = -1, False
        elif SIZE.match(text) or text.startswith("stopping_early") or split_score(text):
            self.ended = self.ended or self.step > 0
        else:
            self.held.append(line)
            if len(self.held) > HELD:
                self.reader.feed(self.held.pop(0))
            return
        self.flush()
        self.reader.feed(line)

    def at_step(self, step: int, total: int) -> None:
        again = step < self.step and (step <= 1 or self.ended)
        if again and len(self.runs) < MOST_RUNS:
            self.runs.append(self.new())
            self.reader = LogReader(self.runs[-1])
        self.step, self.ended = step, bool(total) and step >= total

    def flush(self) -> None:
        """Reads the lines that were held back."""
        for line in self.held:
            self.reader.feed(line)
        self.held.clear()


def whole_or(text: str | None, otherwise: int) -> int:
    """The whole number of a text, or another one where it has none or too many digits."""
    value = strangers.whole_number(text or "")
    return otherwise if value is None else value


def split_score(line: str) -> tuple[str, str | None, str, str] | None:
    """(words, val_loss or None, val_bpb, rest) of a line with a stage's score; None for any other line."""
    if "val_bpb" not in line:
        return None
    match = BPB.search(line)
    if not match:
        return None
    words, loss = line[: match.start()], None
    if pair := LOSS.match(words + " "):
        words, loss = f"{pair[1]} {pair[3]}", pair[2]
    if not NAME.fullmatch(words) or NO_SCORE.search(words):
        return None
    return words, loss, match[1], match[2]


# Lines that report progress, or what is no score of this run: a difference, an aim, another run's.
NO_SCORE = re.compile(
    r"[0-9]/[0-9]|progress|running|partial|gap|delta|diff|gain|improv|penalt|target|threshold|reference|sota"
    r"|leaderboard|expected|previous|goal|warmup|search|refine|sweep|candidate",
    re.IGNORECASE,
)


def same_score(one: Stage, other: Stage) -> bool:
    """Whether two lines say one score, rounded or not."""
    return abs(one.bpb - other.bpb) < 6e-5


def read_logs(path: Path, name: str = "", inside: Path | None = None) -> list[Run]:
    """The runs of a text log, which are several where steps begin again. Errors: Unreadable."""
    name = name or path.stem
    splitter = RunSplitter(lambda: Run(name, str(path)))
    for line in strangers.read_lines(path, "log", inside):
        splitter.feed(line.rstrip("\r"))
    splitter.flush()
    found = distinct(splitter.runs)
    for place, run in enumerate(found):
        complete(run, path)
        if len(found) > 1:
            run.name = f"{name} run {place + 1}"
    if len(found) > 1:
        found[-1].remarks.append(f"log: holds {len(found)} runs, one after the other")
    return found


def distinct(found: list[Run]) -> list[Run]:
    """The runs without those that a log says twice, and without such that have no score and no loss: what is wrong
    with their lines is the run's before them."""
    kept: list[Run] = []
    for run in found:
        if kept and not (run.losses or run.scores or run.stages):
            kept[-1].problems += run.problems
            continue
        if any((run.losses, run.scores, run.stages) == (other.losses, other.scores, other.stages) for other in kept):
            continue
        kept.append(run)
    return kept


def complete(run: Run, path: Path) -> None:
    """Fills in what follows from a log's other figures, or from its name."""
    named = seed_in_name(path.stem)
    if run.seed is None:
        run.seed = named
    elif named is not None and named != run.seed:
        run.remarks.append(f"log: is of seed {run.seed}, and its name says seed {named}")
    if run.eval_seconds is None and (run.seconds.keys() & set(EVALUATION_STAGES)):
        run.eval_seconds = sum(run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES)
    if run.eval_seconds is None:
        final = run.final
        times = [s.seconds for s in run.stages.values() if s.seconds]
        run.eval_seconds = final.seconds if final and final.seconds else (times or [None])[-1]


def read_log(path: Path, inside: Path | None = None) -> Run:
    """The Run of a text log; of a log with several runs, the last one. Errors: Unreadable."""
    return read_logs(path, "", inside)[-1]


def is_figure(value: Any) -> bool:
    """Whether a value is a figure, finite or not."""
    return strangers.is_number(value) or (isinstance(value, float) and not math.isfinite(value))


# A score may be nan in a training that diverged; whoever draws or averages scores looks.
ANY_FIGURE = strangers.Kind("a number", lambda value: float(value) if is_figure(value) else None)
METRICS = {
    "resumed_at": (dict(resumed_at=COUNT), ("resumed_at",)),
    "train_loss": (dict(step=COUNT, train_loss=ANY_FIGURE, train_seconds=AMOUNT), ("step", "train_loss")),
    "stage": (dict(stage=TEXT, val_loss=ANY_FIGURE, val_bpb=ANY_FIGURE), ("stage", "val_loss", "val_bpb")),
    "val_bpb": (
        dict(step=COUNT, val_loss=ANY_FIGURE, val_bpb=ANY_FIGURE, train_seconds=AMOUNT),
        ("step", "val_loss", "val_bpb"),
    ),
}


def metrics_rows(path: Path, run: Run, inside: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a metrics.jsonl with their kind. A partial last line is ignored. Errors: Unreadable."""
    wrong, rows = "", 0
    for place, line in enumerate(strangers.read_lines(path, "metrics", inside, strangers.MIB)):
        if wrong:
            run.problem(wrong)
        wrong = ""
        try:
            row = strangers.parse_json(line) if line.strip() else None
        except ValueError as error:  # a problem unless it is the last line
            wrong = f"{path.name}: line {place + 1} is not JSON ({visible(error, 60)})"
            continue
        kind = next((kind for kind in METRICS if isinstance(row, dict) and kind in row), None)
        if kind is None:
            if row is not None and not isinstance(row, dict):
                run.problem(f"{path.name}: line {place + 1} must be an object, and is {strangers.brief(row)}")
            continue
        fields, needed = METRICS[kind]
        kept = strangers.record(fields, needed).keep(row)
        rows += 1
        if rows > ROWS:
            run.problem(f"{path.name}: has more than {ROWS} rows; the rest is passed over")
            return
        if kept is None:
            run.problem(f"{path.name}: line {place + 1} must have {', '.join(fields)} as numbers, and a stage as text")
        else:
            yield kind, kept


def read_metrics(path: Path, run: Run | None = None, inside: Path | None = None) -> Run:
    """A Run from metrics.jsonl, whose numbers are exact; the log's are rounded. Errors: Unreadable."""
    run = run or Run(path.parent.name or path.stem, str(path))
    losses, scores = [], []
    for kind, row in metrics_rows(path, run, inside):
        if kind == "train_loss":
            losses.append((row["step"], row["train_loss"], row.get("train_seconds")))
        elif kind == "stage":
            run.stages[row["stage"]] = Stage(row["val_loss"], row["val_bpb"])
        elif kind == "resumed_at":
            losses = [loss for loss in losses if loss[0] <= row["resumed_at"]]
            scores = [score for score in scores if score[0] < row["resumed_at"]]
        else:
            scores.append((row["step"], row["val_loss"], row["val_bpb"], row.get("train_seconds")))
    run.losses, run.scores = losses or run.losses, scores or run.scores
    done = [(row[0], row[-1]) for row in (*run.losses, *run.scores) if row[0] and row[-1]]
    if done and not run.steps:
        run.steps, run.train_seconds = max(done)
    return run


SECTION = strangers.record(dict(section=TEXT, bytes=COUNT), ("section", "bytes"))
SUMMARY = dict(
    seed=INTEGER,
    code_bytes=COUNT,
    model_bytes=COUNT,
    artifact_bytes=COUNT,
    steps=COUNT,
    train_seconds=AMOUNT,
    train_tokens=COUNT,
    val_bytes=COUNT,
    parameters=COUNT,
    hardware=TEXT,
    versions=map_of(either(TEXT, strangers.Kind("null", lambda v: "None" if v is None else None))),
    sections=strangers.list_of(SECTION),
    seconds=map_of(AMOUNT),
    attention=TEXT,
    strictly_causal=FLAG,
    resumed=COUNT,
)
SUMMARY_SCORES = dict(
    val_tokens=COUNT,
    audit=either(TEXT, strangers.OBJECT),
    val_loss=NUMBER,
    val_bpb=NUMBER,
    **{
        f"val_{what}_{stage}": NUMBER for what in ("loss", "bpb") for stage in ("pre_quant", "quantized", "ttt", "hint")
    },
)


def apply_summary(run: Run, content: Any, where: str = "summary.json") -> Run:
    """The Run with the exact figures of a summary.json. Fields of a wrong type are problems of the run."""
    s = strangers.checked(content, SUMMARY | SUMMARY_SCORES, where, run.problems)
    for name in SUMMARY:
        if name in s:
            setattr(run, name, s[name])
    run.targets = s.get("val_tokens", run.targets)
    audit = s.get("audit")  # "none" where the data were never audited
    leaks = audit.get("leak_audit", audit) if isinstance(audit, dict) else None  # older summaries have one level less
    if isinstance(leaks, dict):
        shared = strangers.checked(leaks, dict(shared_documents=COUNT), f"{where}: audit", run.problems)
        run.shared_documents = shared.get("shared_documents", run.shared_documents)
    for stage in ("pre_quant", "quantized", "hint"):
        if f"val_bpb_{stage}" in s and f"val_loss_{stage}" in s:
            run.stages[stage] = Stage(s[f"val_loss_{stage}"], s[f"val_bpb_{stage}"])
    if "val_bpb_ttt" in s and "val_loss" in s:
        run.stages["ttt"] = Stage(s.get("val_loss_ttt", s["val_loss"]), s["val_bpb_ttt"])
    if run.seconds.keys() & set(EVALUATION_STAGES):
        run.eval_seconds = sum(run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES)
    return run


def read_summary(path: Path, run: Run, inside: Path | None = None) -> Run:
    """The Run with the figures of a summary.json. Errors: Unreadable."""
    problems: list[str] = []
    content = strangers.read_object(path, inside, problems)
    for text in problems:
        run.problem(f"{path.name}: {text}")
    return apply_summary(run, content, path.name)


def run_from_files(
    name: str, source: str, summary: Path | None, metrics: Path | None, log: Path | None, inside: Path | None = None
) -> Run:
    """One run from those of its files that exist. Exact figures replace rounded ones. Errors: Unreadable."""
    run = read_log(log, inside) if log and strangers.is_there(log) else Run(name, source)
    run.name, run.source = name, source
    if metrics and strangers.is_there(metrics):
        read_metrics(metrics, run, inside)
    if summary and strangers.is_there(summary):
        read_summary(summary, run, inside)
    return run


@dataclass
class Room:
    """How many runs, and rows of them, may still be read."""

    runs: int = MOST_RUNS
    rows: int = MOST_ROWS

    def take(self, run: Run) -> None:
        self.runs, self.rows = self.runs - 1, self.rows - len(run.losses) - len(run.scores)

    @property
    def full(self) -> bool:
        return min(self.runs, self.rows) <= 0


def read_runs(path: Path, problems: list[str] | None = None) -> list[Run]:
    """The runs at a path: a run's folder, a submission's folder, a folder of such, a log or a metrics file.

    Runs inside a folder that cannot be read are passed over, and are among the problems. Errors: UserError if there is
    no run, or the one that was named cannot be read.
    """
    problems = [] if problems is None else problems
    if not os.path.isdir(path):
        if not strangers.is_there(path):
            raise UserError(f"{path}: there is no such file or folder")
        if path.name.endswith("summary.json"):
            return [read_summary(path, Run(path.parent.name, str(path)))]
        return [read_metrics(path)] if path.suffix == ".jsonl" else read_logs(path)
    found = runs_below(path, path, problems, LEVELS, Room())
    if not found:
        more = f" ({problems[0]})" if problems else ""
        raise UserError(f"{path}: holds no run: no {', '.join(RUN_FILES)} and no *.log{more}")
    return found


def runs_below(path: Path, top: Path, problems: list[str], levels: int, room: Room) -> list[Run]:
    """The runs in a folder and in its folders, to some depth. Links out of `top` are passed over."""
    try:
        inside = strangers.entries(path, problems)
        strangers.real_path(path, top)
        for prefix in ("", "eval_"):
            files = [path / (prefix + name) for name in RUN_FILES]
            if any(strangers.is_there(file) for file in files):
                run = run_from_files(path.name or path.resolve().name, str(path), *files, inside=top)
                room.take(run)
                return [run]
    except Unreadable as error:
        if path == top:
            raise
        problems.append(str(error))
        return []
    found = submission_runs(path, problems, room)
    for folder in inside if levels else ():
        if room.full:
            problems.append(f"{path}: has more than {MOST_RUNS} runs or {MOST_ROWS} rows; the rest is passed over")
            break
        if folder.name != "logs" and os.path.isdir(folder) and not folder.is_symlink():  # logs: the submission's
            found += runs_below(folder, top, problems, levels - 1, room)
    return found


def is_log(path: Path) -> bool:
    """Whether a file's name is that of a text log."""
    return path.suffix in (".log", ".txt") and not path.name.startswith(("requirements", "LICENSE"))


def submission_logs(folder: Path, problems: list[str] | None = None) -> list[Path]:
    """The text logs of a submission's folder, whatever kind of file they are."""
    logs = [p for p in strangers.entries(folder, problems) if is_log(p) and not os.path.isdir(p)]
    inner = folder / "logs"
    if os.path.isdir(inner) and not inner.is_symlink():
        logs += [p for p in strangers.entries(inner, problems) if is_log(p)]
    return logs


def submission_runs(folder: Path, problems: list[str], room: Room) -> list[Run]:
    """The runs whose logs are in a submission's folder, with exact figures where those files exist."""
    found = []
    for log in submission_logs(folder, problems):
        tail = log.stem.removeprefix("train_")
        beside = log.with_name(f"summary_{tail}.json"), log.with_name(f"metrics_{tail}.jsonl")
        name = f"{folder.name}/{log.stem}"
        try:
            if any(map(strangers.is_there, beside)):
                inside = [run_from_files(name, str(log), *beside, log, folder)]
            else:
                inside = read_logs(log, name, folder)
        except Unreadable as error:
            problems.append(str(error))
            continue
        for run in inside:
            if run.losses or run.scores or run.stages:
                room.take(run)
                found.append(run)
        if room.full:
            break
    return found


def before_hints(run: Run) -> dict[str, float | None]:
    """Where hints end a run: bits per byte after test-time training as `ttt_val_bpb`, None where there was none."""
    if "hint" not in run.stages:
        return {}
    return dict(ttt_val_bpb=run.stages["ttt"].bpb if "ttt" in run.stages else None)


def calibration_seconds(run: Run) -> float | None:
    """Seconds that read training text after the training: they count as training's. None where a source has none."""
    known = [run.seconds[name] for name in ("calibrate", "tune") if name in run.seconds]
    return sum(known) if known else None


def figures(run: Run) -> dict[str, Any]:
    """The figures of a source, by their names in submission.json."""
    final, stages = run.final, run.stages
    return dict(
        val_loss=final.loss if final else None,
        val_bpb=final.bpb if final else None,
        pre_quant_val_bpb=stages["pre_quant"].bpb if "pre_quant" in stages else None,
        quantized_val_bpb=stages["quantized"].bpb if "quantized" in stages else None,
        ttt_val_bpb=before_hints(run).get("ttt_val_bpb"),
        artifact_bytes=run.artifact_bytes,
        code_bytes=run.code_bytes,
        model_bytes=run.model_bytes,
        steps=run.steps,
        train_wallclock_ms=1000 * run.train_seconds if run.train_seconds else None,
        step_avg_ms=run.step_avg_ms,
        calibration_time_s=calibration_seconds(run),
        target_tokens=run.targets,
        val_tokens=run.val_tokens,
        val_bytes=run.val_bytes,
        shared_documents=run.shared_documents,
        strictly_causal=run.strictly_causal,
    )


# --------------------------------------------------------------------------------------------------------- statistics


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (n - 1); None for the deviation of a single value."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan if len(values) > 1 else None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def welch(ours: list[float], baseline: list[float], margin: float = 0.0) -> float | None:
    """One-sided p-value of Welch's test that ours is lower than the baseline by more than `margin`.

    None if a side has fewer than two figures. Without any spread, the means decide.
    """
    if min(len(ours), len(baseline)) < 2:
        return None
    shifted = [value - margin for value in baseline]
    if max(np.ptp(ours), np.ptp(shifted)) < 1e-12:
        return 0.0 if ours[0] < shifted[0] else 1.0
    from scipy import stats

    with warnings.catch_warnings(action="ignore"):  # of figures that are nearly the same
        result: Any = stats.ttest_ind(ours, shifted, equal_var=False, alternative="less")  # its class has no types
    return float(result.pvalue)


def bpb_to_nats(bpb: float, targets: int, val_bytes: int) -> float:
    """Bits per byte as nats per token, for a validation text with this many targets and bytes."""
    return bpb * math.log(2) * val_bytes / targets


def rounding(text: str) -> tuple[float, float]:
    """The number that a text says, and how far from it a figure may be that was rounded to the digits of the text."""
    text = text.replace(",", "").lower()
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    power = max(-400, min(400, int(exponent[:9] or 0))) - digits
    slack = 10.0**power if power < 300 else math.inf
    return float(text), (0.501 if digits else 0.5) * slack


def rounded(value: float, text: str) -> bool:
    """Whether `text` could be this number, rounded to the digits of `text`."""
    number, slack = rounding(text)
    return math.isclose(value, number, rel_tol=1e-12, abs_tol=slack)


def shard_tokens(paths: Iterable[Path]) -> int:
    """Total tokens of shards, by their headers. Errors: UserError."""
    total = 0
    for path in paths:
        head = strangers.read_head(path, 1024)
        header = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
        size = 1024 + 2 * int(header[2]) if len(header) == 256 else -1
        if size < 0 or header[0] != 20240520 or strangers.file_size(path) != size:
            raise UserError(f"{path}: is not a complete token shard")
        total += int(header[2])
    return total


def validation_shards(data: Path) -> list[Path]:
    """The validation shards of a folder, without sidecars."""
    return sorted(data.glob("fineweb_val_[0-9]*.bin"))


# -------------------------------------------------------------------------------------------------------------- tables


def table(rows: list[list[str]], markdown: bool = False) -> str:
    """A text table with aligned columns. The first row is the head; numbers are right-aligned.

    For a terminal, control codes in cells are shown as escapes. Markdown in cells is kept: `stranger_rows` escapes it.
    """
    if not markdown:
        rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(re.fullmatch(rf"({FIGURE}%?|-|)", row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for place, row in enumerate(rows):
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and not place:
            lines.append(
                "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
            )
    return "\n".join(lines)


def stranger_rows(rows: list[list[str]]) -> list[list[str]]:
    """The rows of a Markdown table with cells that show as they are, whatever a stranger wrote there."""
    return [[markdown(cell) for cell in row] for row in rows]


def shown(value: float | None, form: str = "") -> str:
    """A number for a table, or `-` for None."""
    return "-" if value is None else format(value, form)
