"""What the numbers of a submission mean, in its logs and in its submission.json, whatever their names are.

People name the same figure val_bpb, ttt_bpb, mean_val_bpb or sliding_bpb, in ms or s, per seed or in all. `meaning`
reads a name, with the names around it, as a kind of figure, a part of the run, a statistic over seeds and a unit. The
figures of the logs become evidence, by kind. tools/stated.py compares each stated number with what has its meaning.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runs
import strangers
from runs import CAP_BYTES, Misread
from strangers import visible

MOST = 600  # figures that are kept of one log
LEAVES = 2000  # numbers of one submission.json that are compared
LINE = 2000  # characters of a log line that are read

# ------------------------------------------------------------------------------------------------------------ meanings


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Of somebody else, of an older version, or a limit: nothing that the runs of this folder tell.
FOREIGN = word_set(
    "baseline sota leaderboard previous prev prior reference ref superseded ablation ablations without comparison "
    "competitor competition parent original upstream target limit cap budget merged pr threshold naive old deprecated "
    "invalid required projected expected estimated theirs"
)
DIFFERENCE = word_set(
    "delta diff difference gain improvement gap vs over margin reduction drop headroom remaining slack cost "
    "degradation penalty saved saving savings"
)
STATISTICS = dict(
    mean="mean avg average",
    std="std stdev stddev sd sigma",
    max="max maximum largest worst highest",
    min="min minimum best smallest lowest",
    median="median",
    range="range spread",
)
STATISTIC = {word: name for name, words in STATISTICS.items() for word in words.split()}
TIMES = dict(ms=1e-3, milliseconds=1e-3, s=1.0, sec=1.0, secs=1.0, second=1.0, seconds=1.0, m=60.0, min=60.0, mins=60.0)
TIMES |= dict(minute=60.0, minutes=60.0, h=3600.0, hours=3600.0)
SIZES = dict(mb=(1e6, 2.0**20), mib=(2.0**20,), kb=(1e3, 1024.0), kib=(1024.0,))
PLURALS = dict(bpbs="bpb", losses="loss", sizes="size", means="mean", stds="std", times="time", deltas="delta")
NO_COUNT = word_set("warmup warmdown accum grad ttt inner sgd muon backend every per chunk local ns start at")


@dataclass(frozen=True)
class Meaning:
    """What a number means: `units` are the factors to nats, bits, bytes or seconds that its name allows."""

    kind: str = ""  # bpb, loss, bytes, seconds, step, steps, parameters, tokens, shards, seed, p, or unknown
    part: str = ""  # of scores pre, quant, sliding, ttt; of bytes total, model, code, raw; of seconds train, eval
    statistic: str = ""
    seed: int | None = None
    foreign: bool = False
    difference: bool = False
    units: tuple[float, ...] = (1.0,)


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case: of bytesModel_int6 bytes, model, int and 6."""
    found = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[:200]).lower())
    return [PLURALS.get(word) or word for word in found]


def seed_of(name: str) -> int | None:
    """The seed that a key names: 1337, seed_1337, val_bpb_seed42."""
    match = re.fullmatch(r"(?:.*[_\W])?(?:seed|s)[_ -]?([0-9]{1,10})", name[:200], re.I)
    text = name if re.fullmatch(r"[0-9]{1,10}", name) else match and match[1]
    return int(text) if text else None


def score_part(words: set[str]) -> str:
    """The stage of a score, by the words around it."""
    if {"ttt", "adapted"} & words and not {"before", "no", "pre"} & words:
        return "ttt"
    if {"sliding", "slide", "sw", "stride", "window"} & words:
        return "sliding"
    quantized = {"quant", "quantization", "quantized", "export"} & words
    if ("pre" in words and quantized) or ({"ema", "swa", "unquantized", "float", "raw"} & words and not quantized):
        return "pre"
    if {"quant", "quantized", "roundtrip", "int", "zlib", "zstd", "post"} & words:
        return "quant"
    return ""


def byte_part(words: set[str]) -> str:
    if "code" in words or "script" in words:
        return "code"
    if {"raw", "uncompressed", "payload", "unquantized"} & words:
        return "raw"
    if {"total", "submission", "artifact"} & words:
        return "total"
    return "model" if {"model", "weights", "compressed", "quantized", "serialized"} & words else "total"


def time_part(words: set[str]) -> str:
    if {"eval", "evaluation", "ttt", "sliding", "inference", "roundtrip"} & words:
        return "eval"
    return "train" if {"train", "training", "wallclock"} & words else ""


def kind_of(last: list[str], around: set[str]) -> tuple[str, str, tuple[float, ...]]:
    """Kind, part and units of a name: the last one decides, those around it tell the part."""
    w = set(last)
    unit = next((TIMES[x] for x in reversed(last) if x in TIMES), None)
    if {"p", "pvalue"} & w and ({"value", "pvalue"} & w or len(last) == 1):
        return "p", "", (1.0,)
    if {"bpb", "bpp"} & w or {"bits", "byte"} <= w:
        return "bpb", score_part(w | around), (1.0,)
    if {"loss", "nll", "nats", "nat"} & w and "train" not in w:
        return "loss", score_part(w | around), (1.0,)
    if {"memory", "vram", "mem"} & w or ({"memory", "vram"} & around and {"mib", "mb", "gb"} & w):
        return "memory", "", (1024.0, 1000.0, 1e9 / 2**20) if {"gb", "gib"} & w else (1.0,)
    if {"bytes", "mb", "mib", "kb", "kib"} & w or ("size" in w and {"artifact", "code", "submission", "model"} & w):
        found = next((SIZES[x] for x in SIZES if x in w), (1.0,))
        return "bytes", byte_part(w | around), found
    if {"gpus", "world", "nproc", "num_gpus"} & w and not {"time", "ms"} & w:
        return "gpus", "", (1.0,)
    if "step" in w and {"ms", "avg", "time", "s", "sec", "seconds"} & w and not {"train", "stop"} & w:
        return "step", "", (unit or 1e-3,)
    if {"time", "seconds", "sec", "secs", "wallclock", "wall", "minutes", "duration", "elapsed", "ms", "s"} & w:
        return "seconds", time_part(w | around), (unit,) if unit else (1.0, 1e-3, 60.0)
    if {"steps", "step", "iterations"} & w and not NO_COUNT & w:
        return "steps", "", (1.0,)
    if {"params", "parameters", "nparams"} & w:
        return "parameters", "", (1e6, 1.0) if "m" in w else (1.0,)
    for kind in ("tokens", "shards"):
        if kind in w and not NO_COUNT & w:
            return kind, "", (1.0,)
    return ("seed", "", (1.0,)) if w == {"seed"} else ("", "", (1.0,))


@functools.lru_cache(4096)
def meaning(path: tuple[str, ...]) -> Meaning:
    """What a number means that stands under these keys, or in a log line after these words."""
    last = words_of(path[-1]) if path else []
    names = [words_of(name) for name in path]
    around = {word for inner in names[:-1] for word in inner}
    if not set(last) - {"value", "values"} - STATISTIC.keys() or (path and re.fullmatch(r"(seed_?)?[0-9]+", path[-1])):
        inner = next((n for n in reversed(names[:-1]) if set(n) - STATISTIC.keys() - {"seed", "seeds", "results"}), [])
        last = inner + last  # mean: {val_bpb: 1.1} and val_bpb: {mean: 1.1, "42": 1.1} say the same
    kind, part, units = kind_of(last, around)
    everything = around | set(last)
    found = [STATISTIC[word] for word in (*last, *(x for n in reversed(names[:-1]) for x in n)) if word in STATISTIC]
    if kind == "step" and found and found[0] == "mean" and sum(x == "mean" for x in found) == 1:
        found = []  # step_avg_ms is one run's
    if kind == "seconds" and "min" in last and found and found[0] == "min":
        found = found[1:]  # minutes
    seed = next((s for s in map(seed_of, reversed(path)) if s is not None), None)
    return Meaning(
        kind,
        part,
        found[0] if found else "",
        seed,
        bool(FOREIGN & everything),
        bool(DIFFERENCE & set(last)) or bool(DIFFERENCE & around and kind in ("bpb", "loss")),
        units,
    )


# ------------------------------------------------------------------------------------------------------------- numbers


class Written(float):
    """A number of a JSON file that knows its text: 1.0810 has four decimals."""

    text: str

    def __new__(cls, text: str) -> Written:
        self = super().__new__(cls, text)
        self.text = text
        return self


def text_of(value: float) -> str:
    """A number as it was written."""
    return getattr(value, "text", None) or (repr(value) if abs(value) < 1e300 else "1e300")


def slack_of(text: str) -> float:
    """How far from the number of a text the figure may be that it states: half of its last digit.

    Of a large whole number with zeros at its end, half of the last digit before them, and at most half a percent.
    """
    number, slack = runs.rounding(text)
    zeros = re.search(r"[1-9](0{2,})$", text.replace(",", ""))
    if zeros and abs(number) >= 1000:
        slack = min(0.5 * 10.0 ** min(len(zeros[1]), 300), 0.005 * abs(number))
    return slack


def stands(text: str, value: float, slack: float = 0.0, unit: float = 1.0, cut: bool = True) -> bool:
    """Whether a text states this figure, rounded or, with `cut`, cut off at its last digit, in a unit."""
    number = runs.rounding(text)[0] * unit
    off = abs(number - value)
    if off <= slack_of(text) * unit + slack + 1e-9 * abs(value):
        return True
    if not cut or "e" in text.lower():
        return False
    digits = len(text.partition(".")[2])
    long = digits >= 2 or abs(number) >= 1e5  # a mean of bytes is cut off too
    return long and off < (1 - 1e-6) * 10.0**-digits * unit and abs(value) > abs(number)


@dataclass(frozen=True)
class Figure:
    """A number that a log says, in nats, bits, bytes or seconds. Its label tells the same figures of other logs."""

    value: float
    slack: float
    meaning: Meaning
    label: str


@dataclass
class LogFigures:
    """What a log says beyond a Run: all figures with a meaning, its settings, and where they stand."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    block: set[str] = field(default_factory=set)  # names of those that it prints as a block, of all of them
    seed: int | None = None

    def of(self, kind: str, part: str = "") -> list[Figure]:
        return [f for f in self.figures if f.meaning.kind == kind and (not part or f.meaning.part == part)]


STAMP = re.compile(
    r"^\[?(?:[0-9]{4}-[0-9]{2}-[0-9]{2}[T ])?[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]{1,9})?Z?\]?\s+"
    r"|^\[(?:rank ?)?[\w.-]{1,20}\]:?\s+"
)
PAIRS = re.compile(rf"(?<![\w/+.-])([A-Za-z_][\w/+-]*)[:=]\s?({runs.FIGURE})\s?(ms|s|m|MiB|MB|bytes|B)?(?![\w.])")
SIZE = re.compile(r"^([A-Za-z][\w +()/.-]{0,80}?)(?:: {0,9}| {1,4})([0-9][0-9,]*) bytes")
SETTING = re.compile(r"^\s{1,8}(\w+): ?(\S.*)$")
ONE_LINE = re.compile(r"(?<![\w/+.-])([a-z_][a-z0-9_]*)[:=]([^\s:=]+)(?=\s|$)")
WITH_UNIT = re.compile(r"[-+0-9.,]{1,20}(?:s|ms|m|us|GB|GiB|MB|MiB|%|C|W),?")
MEASURED = re.compile(r"(?:^|_)(?:time|ms|loss|bpb|mem|memory|elapsed|tokens?_per_s\w*|tok_s|mfu|step|this)(?:_|$)")


# Figures in words, with what their names mean: `Stopping early at step 1652`, `EMA BPB (no XSA): 1.022`.
SAID = {
    re.compile(rf"^(Stopping early) at step ({runs.FIGURE})\b", re.I): ("steps",),
    re.compile(rf"^(Training) (?:complete|done|finished)(?: in|:) ({runs.FIGURE}) ?s\b", re.I): ("train", "seconds"),
    re.compile(rf"^(Validation tokens): ({runs.FIGURE})$", re.I): ("val", "tokens"),
    re.compile(rf"^\s{{0,9}}([A-Za-z][A-Za-z +-]{{0,60}}? BPB)(?: ?\([^()]{{0,40}}\))?\s?[:=]\s*({runs.FIGURE})\s*$"): (
        "score",
    ),
}


class Reader:
    """Reads the lines of a log for their figures and settings."""

    def __init__(self, name: str):
        self.log = LogFigures(name)
        self.block = self.trained = False
        self.kept: dict[str, Figure] = {}

    def feed(self, line: str) -> None:
        line = STAMP.sub("", line[:LINE], count=1)
        if line.lstrip().startswith(("#", '"', "'")):
            return
        if re.match(r"^\s*(?:Hyperparameters|Hyper-parameters|Config(?:uration)?|args|Settings)\s*:?\s*$", line, re.I):
            self.block = True
            return
        match = SETTING.match(line) if self.block else None
        if match and len(self.log.settings) < MOST:
            self.log.settings.setdefault(match[1].lower(), match[2].strip())
            self.log.block.add(match[1].lower())
            return
        self.block = self.block and re.match(r"=*$", line) is not None and not self.log.block
        if self.log.seed is None and (match := re.match(r"^\s*seed[:=] ?([0-9]{1,10})\b", line, re.IGNORECASE)):
            self.log.seed = int(match[1])
        try:
            self.figures(line)
        except Misread:
            return  # the reader of runs names it

    def figures(self, line: str) -> None:
        if step := runs.STEP.match(line):
            self.trained = True
            self.keep(("steps",), step[1] or step[3], "", "curve")
        elif not self.trained and not line.startswith(("warmup", "compil")):
            self.header(line)
        for pattern, words in SAID.items():
            if match := pattern.match(line):
                self.keep((*words, match[1]) if words[0] == "score" else words, match[2], "", "curve")
                return
        if size := SIZE.match(line):
            self.keep((size[1], "bytes"), size[2], "", "")
            return
        first = line.partition(":")[0]
        for name, value, unit in PAIRS.findall(line):
            if name != "step":
                words = (first, name + ("_" + unit.lower() if unit else ""))
                if step:
                    words = ("train" if "time" in name else "", words[1])
                self.keep(words, value, unit, "curve")

    def end(self) -> None:
        """Hands over the figures, and adds what follows from them: the time of a step, tokens, and sums."""
        self.log.figures = list(self.kept.values())
        spent = [f for f in self.log.of("seconds", "train") if f.value > 0]
        steps = [f.value for f in self.log.of("steps") if f.value > 0]
        if spent and steps:
            last, count = spent[-1], max(steps)
            slack = last.slack / count
            self.log.figures.append(Figure(last.value / count, slack, Meaning("step"), "time by steps"))
        for count in steps[-1:]:
            batch = self.log.settings.get("train_batch_tokens", "")
            if batch.isdigit() and len(batch) < 12:
                tokens = Figure(count * int(batch), 0.0, Meaning("tokens"), "steps by tokens of a batch")
                self.log.figures.append(tokens)
        self.sums()
        if self.log.seed is None and self.log.settings.get("seed", "").isdigit():
            self.log.seed = int(self.log.settings["seed"][:10])

    def sums(self) -> None:
        """Adds the sums of the seconds of several evaluations, of which people state some."""
        spent = list({f.label: f for f in self.log.of("seconds", "eval")}.values())[-6:]
        for count in range(2, len(spent) + 1):
            for some in itertools.combinations(spent, count):
                value, slack = sum(f.value for f in some), sum(f.slack for f in some)
                self.log.figures.append(Figure(value, slack, Meaning("seconds", "eval"), "evaluations together"))

    def header(self, line: str) -> None:
        """Settings that stand in lines before training, such as num_heads:8 num_kv_heads:4."""
        for name, value in ONE_LINE.findall(line):
            if (
                not MEASURED.search(name)
                and not WITH_UNIT.fullmatch(value)
                and len(self.log.settings) < MOST
                and name not in ("tokens", "dataset")
            ):
                self.log.settings.setdefault(name, value)

    def keep(self, words: tuple[str, ...], text: str, unit: str, curve: str) -> None:
        value = runs.number(text)
        m = meaning(words)
        if not m.kind or not math.isfinite(value) or re.match(r"(?:max_|iterations|total_steps|num_steps)", words[-1]):
            return
        label = re.sub(r"[0-9]+ms|_?exact", "", " ".join(words).lower())[:120]
        factor = m.units[0]
        figure = Figure(value * factor, (runs.rounding(text)[1] if "." in text else 0.0) * factor, m, label)
        once = curve and m.kind in ("bpb", "loss", "seconds", "steps", "step", "memory")
        key = label if once or len(self.kept) >= MOST // 2 else f"{label} {len(self.kept)}"
        old = self.kept.pop(key, None)
        if old is not None and old.slack < figure.slack:  # the exact line stays
            figure = old
        if len(self.kept) < MOST:
            self.kept[key] = figure


def read_figures(path: Path, inside: Path) -> LogFigures:
    """The figures and settings of a log. Errors: Unreadable."""
    reader = Reader(path.name)
    for line in strangers.read_lines(path, "log", inside):
        reader.feed(line.rstrip("\r"))
    reader.end()
    return reader.log


# -------------------------------------------------------------------------------------------------- stated numbers


@dataclass(frozen=True)
class Leaf:
    """A number that submission.json states."""

    path: tuple[str, ...]
    value: float
    meaning: Meaning

    @property
    def name(self) -> str:
        return visible(".".join(self.path), 80)

    @property
    def text(self) -> str:
        return text_of(self.value)


def leaves(content: Any, seeds: list[int]) -> Iterator[Leaf]:
    """The numbers of a submission.json. A list as long as `seeds` has one for each; an object may hold its seed."""
    left: list[tuple[tuple[str, ...], Any]] = [((), content)]
    count = 0
    found = 0
    while left and count < 20 * LEAVES and found < LEAVES:
        path, value = left.pop()
        count += 1
        if isinstance(value, dict):
            own = value.get("seed")
            here = (*path, f"seed_{own}") if isinstance(own, int) and not isinstance(own, bool) else path
            left += [((*here, str(key)), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            named = [f"#{i + 1}" for i in range(len(value))]
            if len(value) == len(seeds) > 1:
                named = [f"seed_{s}" for s in seeds]
            named = named if path[-1:] != ("seeds",) else [""] * len(value)
            left += [((*path[:-1], n, *path[-1:]), v) for n, v in reversed(list(zip(named, value, strict=True))) if n]
        elif strangers.is_number(value) and path:
            found += 1
            yield Leaf(path, value, meaning(path))


def stated_seeds(content: dict[str, Any]) -> list[int]:
    """The seeds that a submission.json lists, in its order."""
    listed = content.get("seeds")
    names = list(listed) if isinstance(listed, (list, dict)) else []
    found = [n if isinstance(n, int) else seed_of(str(n)) for n in names[:100] if not isinstance(n, (dict, bool))]
    return [n for n in found if n is not None] if None not in found else []


# -------------------------------------------------------------------------------------------------------------- pools


def aggregates(values: list[tuple[float, float]], m: Meaning, label: str) -> Iterator[Figure]:
    """The statistics of one figure over seeds, from (value, slack); the deviation of the population as `pstd`."""
    numbers, slack = [v for v, _ in values], max(s for _, s in values)
    found = dict(mean=statistics.fmean(numbers), max=max(numbers), min=min(numbers), median=statistics.median(numbers))
    if len(numbers) > 1:
        found |= dict(std=statistics.stdev(numbers), pstd=statistics.pstdev(numbers))
        found["range"] = max(numbers) - min(numbers)
    for name, value in found.items():
        wide = slack * (1.5 if "std" in name else 1.0) + 1e-6 * abs(value)
        yield Figure(value, wide, Meaning(m.kind, m.part, name), label)


def over_seeds(by_seed: dict[int, list[Figure]], seeds: Iterable[int]) -> Iterator[Figure]:
    """The statistics of every figure that all these seeds have under the same label."""
    chosen = [by_seed[s] for s in seeds if by_seed.get(s)]
    if not chosen:
        return
    last = [{(f.label, f.meaning.kind): f for f in figures} for figures in chosen]
    for key in set.intersection(*map(set, last)):
        figures = [one[key] for one in last]
        yield from aggregates([(f.value, f.slack) for f in figures], figures[0].meaning, key[0])


class Numbers:
    """Many figures, to ask whether a text states one of them."""

    def __init__(self, values: Iterable[float]):
        self.sorted = sorted(v for v in values if math.isfinite(v))

    def states(self, text: str, unit: float = 1.0) -> bool:
        number = runs.rounding(text)[0] * unit
        reach = max(2.2 * slack_of(text) * unit, 1.0 if abs(number) >= 1e5 else 0.0, 1e-8 * abs(number))
        place = bisect.bisect_left(self.sorted, number)  # what stands is beside it, if anything does
        beside = self.sorted[max(0, place - 2) : place + 2]
        return any(abs(v - number) <= reach and stands(text, v, 0.0, unit) for v in beside)


def differences(values: Iterable[float], others: Iterable[float] | None = None, most: int = 400) -> list[float]:
    """Every difference of two of the values, or of one of these and one of the others, without a sign."""
    ours = list(dict.fromkeys(values))[:most]
    theirs = ours if others is None else list(dict.fromkeys(others))[:most]
    return [abs(a - b) for a in ours for b in theirs]


def cap_room(sizes: Iterable[float]) -> list[float]:
    """What sizes leave of the limit."""
    return [abs(CAP_BYTES - size) for size in sizes]
