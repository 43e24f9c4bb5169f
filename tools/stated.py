"""Compares every number that a stranger's submission.json states with what its logs, or its other numbers, tell.

A number is looked for among the figures of its kind: those of its seed's logs, or the statistics of them over seeds.
One that is none of them, but near to one, disagrees. What nothing in the folder can tell is named in a note.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import claims
from claims import Figure, Leaf, Meaning, stands
from runs import BUDGET_SECONDS, Run

if TYPE_CHECKING:
    from check_submission import Findings, Folder

# Parts of its value: a figure this near to a stated number is the one that it means.
NEAR = dict(bpb=0.015, loss=0.015, seconds=0.05, steps=0.05, memory=0.05)
FIGURES = 5000  # of all logs, and statistics of them, that are compared
CLOSE = 0.001  # a figure this near is meant, whatever stage it is of
UNSURE = 0.02  # for seconds that may be of anything
CORE = ("val_bpb", "val_loss", "bytes_total", "artifact_bytes", "mean_val_bpb", "val_bpb_mean", "bpb")
ASSIGNED = re.compile(r"(?<![\w$])([A-Z][A-Z0-9_]{2,60})=[\"']?([^\s\"'\\;`|,)]{1,60})")
PER_BPB = math.log(2)  # nats per bit


class Evidence:
    """What the logs of a folder say, by seed, with statistics over seeds, and what its files are."""

    def __init__(self, folder: Folder):
        self.by_seed: dict[int, list[Figure]] = defaultdict(list)
        self.settings: dict[str, set[str]] = defaultdict(set)
        self.figures: list[Figure] = []
        main = {id(log) for _, log in folder.figures if any(counts(s.log, log) for s in folder.seeds.values())}
        for seed, log in sorted(folder.figures, key=lambda pair: id(pair[1]) in main):  # those that count are the last
            self.figures += log.figures
            if seed is not None:
                self.by_seed[seed] += log.figures
            for name, value in log.settings.items():
                self.settings[name].add(value)
        self.figures = self.figures[-FIGURES:]
        self.cache: dict[tuple, list[float]] = {}
        self.stages: dict[tuple, set[str]] = {}
        self.seeds = claims.stated_seeds(folder.everything) or list(folder.seeds)
        scores = [f.value for f in self.figures if f.meaning.kind == "bpb"]
        self.leaves = [as_score(leaf, scores) for leaf in claims.leaves(folder.everything, self.seeds)]
        sizes = [Figure(float(n), 0.0, Meaning("bytes", "code"), name) for name, n in folder.scripts.items()]
        self.files = sizes + [Figure(float(n), 0.0, Meaning("bytes", "model"), n_) for n_, n in folder.weights.items()]
        self.over = list(itertools.islice(self.statistics(), FIGURES))
        self.by_kind: dict[str, list[Figure]] = defaultdict(list)
        for figure in self.figures:
            self.by_kind[figure.meaning.kind].append(figure)
        self.ratio = self.nats_per_bit()
        self.assigned = assignments(folder.page)

    def statistics(self) -> Iterator[Figure]:
        """The statistics over seeds of the logs' figures, and of the stated figures of seeds."""
        logged = [s for s in self.by_seed if self.by_seed[s]]
        for seeds in {tuple(sorted(logged)), tuple(sorted(s for s in logged if s in self.seeds))}:
            yield from claims.over_seeds(self.by_seed, seeds)
        rows: dict[tuple, dict[int, Figure]] = defaultdict(dict)
        for leaf in self.leaves:
            m = leaf.meaning
            place = m.seed if m.seed is not None else listed(leaf)
            if place is not None and m.kind and not m.statistic and not m.foreign:
                key = tuple(name for name in leaf.path if claims.seed_of(name) is None and name[0:1] != "#")
                label = "/".join(key)
                one = Figure(leaf.value * m.units[0], claims.slack_of(leaf.text) * m.units[0], m, label)
                rows[key][place] = one
        for found in rows.values():
            first = next(iter(found.values()))
            logged = all(self.by_seed.get(seed) for seed in found)  # which are more exact than what is stated
            values = [(f.value, 0.0 if logged else f.slack) for f in found.values()]
            yield from claims.aggregates(values, first.meaning, first.label)

    def nats_per_bit(self) -> float | None:
        """Nats per token for each bit per byte, by the scores that stand together in a log."""
        ratios = []
        for figures in (*self.by_seed.values(), self.figures):
            loss = {f.label.replace("val_loss", "val_bpb"): f.value for f in figures if f.meaning.kind == "loss"}
            for f in figures:
                if f.meaning.kind == "bpb" and f.value and f.label in loss:
                    ratios.append(loss[f.label] / f.value)
        return statistics.median(ratios) if ratios else None

    def pool(self, leaf: Leaf) -> list[Figure]:
        """The figures that a stated number may be: of its kind, and of its seed or over seeds."""
        m = leaf.meaning
        files = self.files if m.kind == "bytes" else []
        if m.seed is not None and not (m.statistic and m.seed not in self.by_seed):
            return [f for f in self.by_seed.get(m.seed, []) if f.meaning.kind == m.kind] + with_code(files, self, m)
        over = [f for f in self.over if f.meaning.kind == m.kind]
        if m.statistic and over:
            return [f for f in over if f.meaning.statistic == m.statistic]
        plain = self.by_kind.get(m.kind, [])
        return plain + [f for f in over if "std" not in f.meaning.statistic] + with_code(files, self, m)


def listed(leaf: Leaf) -> int | None:
    """The place of a number in a list of figures of seeds that are not named, such as val_bpb_seeds."""
    place = next((name for name in leaf.path if name.startswith("#")), None)
    words = {word for name in leaf.path for word in claims.words_of(name)}
    return -int(place[1:]) if place and place[1:].isdigit() and {"seed", "seeds"} & words else None


def counts(run: Run | None, log: claims.LogFigures) -> bool:
    """Whether these figures are of the log that counts for a seed."""
    return run is not None and run.source.rpartition("/")[2] == log.name


# Names of what holds a figure for each seed, which do not say what it is.
OF_SEEDS = claims.word_set("seed seeds per by result results score scores run runs individual all s")


def as_score(leaf: Leaf, scores: list[float]) -> Leaf:
    """A number without a kind that is a score, as such: a seed's, near to one of the logs, as in seeds: {"42": 1.08};
    or somebody else's, or a gain over it, as in competition_sota."""
    m = leaf.meaning
    words = set(claims.words_of(leaf.path[-1]))
    if not m.kind and m.seed is not None and isinstance(leaf.value, float) and 0 < leaf.value < 4:
        around = {word for name in leaf.path for word in claims.words_of(name) if not word.isdigit()}
        if around <= OF_SEEDS and any(abs(leaf.value - x) <= 0.02 * x for x in scores):
            return Leaf(leaf.path, leaf.value, dataclasses.replace(m, kind="bpb"))
    if m.kind or not (m.foreign or m.difference) or not isinstance(leaf.value, float):
        return leaf
    if not 0 < abs(leaf.value) < 4 or {"pct", "percent", "lr", "rank", "decay", "ratio"} & words:
        return leaf
    return Leaf(leaf.path, leaf.value, dataclasses.replace(m, kind="bpb"))


def with_code(files: list[Figure], evidence: Evidence, m: Meaning) -> list[Figure]:
    """The sizes of files, and of models with a script."""
    if not files:
        return []
    figures = evidence.by_seed.get(m.seed, []) if m.seed is not None else evidence.figures
    models = [f.value for f in figures if f.meaning.kind == "bytes" and f.meaning.part == "model"]
    models += [f.value for f in files if f.meaning.part == "model"]
    scripts = [f.value for f in files if f.meaning.part == "code"][:9]
    logged = {f.value for f in evidence.figures if f.meaning.kind == "bytes" and f.meaning.part == "code"}
    scripts += [sum(scripts), *sorted(logged)[:9]]  # runs may have counted a script in another form
    sums = [Figure(a + b, 0.0, Meaning("bytes", "total"), "model and script") for a in models[:50] for b in scripts]
    return files + sums


def assignments(page: str) -> dict[str, set[str]]:
    """The variables that a page's commands set, in lower case, with their values."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, value in ASSIGNED.findall(page):
        if len(found) < claims.LEAVES:
            found[name.lower()].add(value)
    return found


# ------------------------------------------------------------------------------------------------------------- checks


def check_stated(folder: Folder, findings: Findings) -> None:
    """Checks every number of submission.json. Our own has its own checks."""
    if folder.ours:
        return
    evidence = Evidence(folder)
    folder.evidence = evidence
    if folder.exact:
        return
    unknown: list[str] = []
    for leaf in evidence.leaves:
        known = check_leaf(folder, findings, evidence, leaf)
        if known is None:
            unknown.append(leaf.name)
        else:
            findings.compared += 1
    check_pairs(findings, evidence)
    check_sums(findings, evidence)
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        findings.note(f"submission.json: nothing in the folder tells {shown}", cause="figures")


def check_leaf(folder: Folder, findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """Whether a stated number stands; None where nothing tells."""
    m = leaf.meaning
    if setting_of(leaf, evidence) and m.kind not in ("bpb", "loss", "bytes"):
        return check_setting(findings, evidence, leaf)
    if m.kind in ("", "p", "seed", "memory") and not m.difference:
        return check_nameless(findings, evidence, leaf)
    if m.difference:
        return check_difference(folder, findings, evidence, leaf)
    if m.foreign:
        return check_foreign(folder, findings, evidence, leaf)
    if m.statistic == "std":
        return check_deviation(folder, findings, evidence, leaf)
    return check_figure(findings, evidence, leaf)


def setting_of(leaf: Leaf, evidence: Evidence) -> str:
    name = leaf.path[-1].lower()
    return name if name in evidence.settings or name in evidence.assigned else ""


def same_setting(stated: float, text: str) -> bool:
    try:
        return math.isclose(stated, float(text.replace(",", "").rstrip("%")), rel_tol=1e-6)
    except ValueError:
        return text.lower() in ("true", "false") and stated == (text.lower() == "true")


def check_setting(findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """A setting must be the one that the logs print, or else the one of the page's commands."""
    name = leaf.path[-1].lower()
    logged = evidence.settings.get(name, set())
    values = logged or evidence.assigned.get(name, set())
    if any(same_setting(leaf.value, text) for text in values):
        return True
    numeric = [text for text in values if re.fullmatch(r"[-+0-9.eE,%]+", text)]
    if not numeric:
        return None
    where = "the logs" if logged else "README.md's commands"
    said = ", ".join(sorted(numeric)[:4])
    text = f"submission.json: {leaf.name} is {leaf.text}, and {where} have {said}"
    findings.add_finding("error" if logged else "warning", text, "configuration")
    return False


def check_nameless(findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """A number of another kind: the figure of the same name in the logs, if they have one."""
    if leaf.meaning.kind == "memory":
        return check_figure(findings, evidence, leaf)
    name = leaf.path[-1].lower()
    if name in ("num_seeds", "n_seeds", "seed_count", "seeds_count"):
        counts = {len(evidence.seeds), len(evidence.by_seed)} - {0}
        if counts and leaf.value not in counts:
            findings.error(f"submission.json: {leaf.name} is {leaf.text}, and there are {min(counts)}")
            return False
        return True if counts else None
    return True if leaf.meaning.kind == "seed" and leaf.value in evidence.by_seed else None


def states(leaf: Leaf, figure: Figure) -> bool:
    cut = leaf.meaning.statistic != "std"
    return any(stands(leaf.text, figure.value, figure.slack, unit, cut) for unit in leaf.meaning.units)


def distance(leaf: Leaf, figure: Figure) -> float:
    """How far a figure is from a stated number, in parts of it."""
    return min(abs(leaf.value * u - figure.value) for u in leaf.meaning.units) / (abs(figure.value) or 1.0)


def in_unit(leaf: Leaf, figure: Figure) -> str:
    unit = min(leaf.meaning.units, key=lambda u: abs(leaf.value * u - figure.value))
    return f"{figure.value / unit:.9g}"


def nominal(leaf: Leaf) -> bool:
    """Whether a number is the limit of seconds, which people state instead of what they spent."""
    return leaf.meaning.kind == "seconds" and any(leaf.value * u == BUDGET_SECONDS for u in leaf.meaning.units)


def check_figure(findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """A plain figure, a mean, a largest or a smallest one."""
    m = leaf.meaning
    pool = evidence.pool(leaf)
    if any(states(leaf, figure) for figure in pool):
        return check_stage(findings, evidence, leaf, pool)
    own = [f for f in pool if f.meaning.part == m.part] if m.part else pool
    if not own:
        return None
    if (place := listed(leaf)) is not None and -place > len([s for s in evidence.by_seed if evidence.by_seed[s]]):
        return None  # of a seed without a log
    nearest = min(own, key=lambda f: distance(leaf, f))
    if nominal(leaf) and distance(leaf, nearest) < 0.1:
        return True
    reach = UNSURE if m.kind == "seconds" and not m.part else NEAR.get(m.kind, 0.1)
    core = leaf.path[-1].lower() in CORE and (m.seed is not None or len(leaf.path) == 1)
    if distance(leaf, nearest) > reach and not core:
        return None
    last = [f for f in own if m.kind == "bpb" and not f.meaning.statistic and f.meaning.part]
    if last and not (m.part or m.statistic) and distance(leaf, nearest) > CLOSE:
        nearest = last[-1]  # the score that counts
    who = f"seed {m.seed}: " if m.seed is not None else ""
    what = f"{m.statistic or nearest.meaning.statistic} of the seeds'" if nearest.meaning.statistic else "its"
    source = f"{what} figures" if nearest.meaning.statistic else "log"
    findings.error(
        f"{who}{leaf.name if not who else leaf.path[-1]} in submission.json and {source}: {leaf.text} and "
        f"{in_unit(leaf, nearest)} ({nearest.label.strip()})",
        cause="score" if m.kind in ("bpb", "loss") else "figures",
        subject=f"seed {m.seed}: row and log" if who else "",
    )
    return False


def check_stage(findings: Findings, evidence: Evidence, leaf: Leaf, pool: list[Figure]) -> bool:
    """A score that is found must be of the stage that its name says, and a headline the mean over the seeds."""
    m = leaf.meaning
    if m.kind != "bpb" or m.statistic:
        return True
    own = [f for f in pool if m.part and f.meaning.part == m.part and not f.meaning.statistic]
    if own and not any(states(leaf, f) for f in pool if f.meaning.part in (m.part, "" if m.part == "pre" else m.part)):
        found = next(f for f in pool if states(leaf, f))
        if "pre" in (m.part, found.meaning.part) or not found.meaning.part:
            near = min(own, key=lambda f: distance(leaf, f))
            findings.warning(
                f"submission.json: {leaf.name} {leaf.text} is the log's {found.label.strip()}, and "
                f"{near.label.strip()} is {near.value:.9g}",
                cause="score",
            )
    if len(leaf.path) > 1 or m.part:
        return True
    means = [f for f in evidence.over if f.meaning.kind == "bpb" and f.meaning.statistic == "mean"]
    several = len([s for s in evidence.by_seed if s in evidence.seeds]) > 1 or len(evidence.seeds) > 1
    if several and means and not any(states(leaf, f) for f in means):
        claimed = any(x.meaning.seed is not None and x.meaning.kind == "bpb" for x in evidence.leaves)
        findings.add_finding(
            "warning" if claimed else "note",
            f"submission.json: {leaf.name} {leaf.text} is one seed's, and the seeds' mean is "
            f"{min(means, key=lambda f: distance(leaf, f)).value:.6g}",
            "statistics",
        )
    return True


def of_same_stage(evidence: Evidence, leaf: Leaf, pool: list[Figure]) -> list[Figure]:
    """The statistics of the figure whose mean is stated beside a deviation, where one is."""
    m = leaf.meaning
    if (m.kind, m.part) not in evidence.stages:
        evidence.stages[m.kind, m.part] = stages_of(evidence, m)
    labels = evidence.stages[m.kind, m.part]
    return [f for f in pool if f.label in labels] or pool


def stages_of(evidence: Evidence, m: Meaning) -> set[str]:
    """The labels of the figures whose mean is stated."""
    means = [f for f in evidence.over if f.meaning.kind == m.kind and f.meaning.statistic == "mean"]
    labels: set[str] = set()
    for other in evidence.leaves:
        o = other.meaning
        if o.kind == m.kind and o.part == m.part and o.seed is None and o.statistic in ("", "mean") and not o.foreign:
            labels |= {f.label for f in means if not o.difference and states(other, f)}
    return labels


def check_deviation(folder: Folder, findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """A deviation must be the sample's; the population's is named as such."""
    m = leaf.meaning
    pool = [f for f in evidence.over if f.meaning.kind == m.kind]
    same = of_same_stage(evidence, leaf, pool)
    pool = same if any(f.meaning.statistic == "std" for f in same) else pool
    sample = [f for f in pool if f.meaning.statistic == "std"]
    if not sample:
        return None
    if any(states(leaf, f) for f in sample):
        return True
    population = [f for f in pool if f.meaning.statistic == "pstd" and states(leaf, f)]
    words = folder.page.lower()
    if population and ("population" in words or "ddof=0" in words or "pop" in claims.words_of(leaf.path[-1])):
        return True
    nearest = (population or sorted(sample, key=lambda f: distance(leaf, f)))[0]
    mine = min(sample, key=lambda f: abs(f.value - nearest.value))
    why = " (it is the population's)" if population else ""
    findings.error(
        f"submission.json: {leaf.name} {leaf.text} and the seeds' sample deviation {mine.value:.4g}{why}",
        cause="statistics",
    )
    return False


# ------------------------------------------------------------------------------------------------ differences, others


def of_kind(evidence: Evidence, kind: str, foreign: bool, seed: int | None = None) -> Iterator[float]:
    """The stated numbers of a kind that are figures, no differences or deviations."""
    for leaf in evidence.leaves:
        m = leaf.meaning
        plain = not m.difference and m.statistic not in ("std", "range")
        if plain and m.kind == kind and m.foreign == foreign and seed in (None, m.seed):
            yield leaf.value * m.units[0]


def page_scores(page: str) -> list[float]:
    """The numbers of a page that look like bits per byte."""
    return [float(x) for x in re.findall(r"(?<![\w.])[0-4]\.[0-9]{3,8}(?![\w.]|[0-9])", page[:500_000])[:2000]]


def difference_pool(folder: Folder, evidence: Evidence, leaf: Leaf) -> list[float]:
    """What a stated difference may be, without its sign."""
    m = leaf.meaning
    kind = "bpb" if m.kind in ("bpb", "loss", "") else m.kind
    if m.seed is not None:
        ours = [f.value for f in evidence.by_seed.get(m.seed, []) if f.meaning.kind == kind]
        ours += of_kind(evidence, kind, False, m.seed)
        found = claims.differences(ours)
    else:
        ours = [f.value for f in evidence.over if f.meaning.kind == kind and f.meaning.statistic in ("mean", "max")]
        ours += of_kind(evidence, kind, False)
        theirs = list(of_kind(evidence, kind, True))
        abroad = bool(claims.FOREIGN & set(claims.words_of(leaf.path[-1]))) or "over" in leaf.path[-1].lower()
        if not theirs and kind == "bpb":
            theirs = page_scores(folder.page)
        found = claims.differences(ours, theirs)
        found += [] if abroad and theirs else claims.differences(ours)
    if kind == "bytes":
        found += claims.cap_room(ours)
    if m.kind == "loss" or "nats" in leaf.path[-1].lower():
        ratio = evidence.ratio or stated_ratio(evidence)
        found = [x * ratio for x in found] if ratio else []
        losses = [*of_kind(evidence, "loss", False, m.seed), *of_kind(evidence, "loss", True)]
        found += claims.differences(losses)
    return [x for x in found if x > 0]


def check_difference(folder: Folder, findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """A difference, a gain or a gap must be one of two figures."""
    words = set(claims.words_of(leaf.path[-1]))
    if not leaf.meaning.kind and not {"nats", "bpb"} & words or {"pct", "percent", "ratio", "x"} & words:
        return None
    key = (leaf.meaning.kind, leaf.meaning.seed, tuple(sorted(words & (claims.FOREIGN | {"over", "nats"}))))
    if key not in evidence.cache:
        evidence.cache[key] = sorted(set(difference_pool(folder, evidence, leaf))) if len(evidence.cache) < 50 else []
    found = evidence.cache[key]
    text = leaf.text.lstrip("+-")
    wide = 2e-4 if leaf.meaning.kind == "loss" else 0.0
    number = abs(leaf.value)
    slack = claims.slack_of(text)
    place = bisect.bisect_left(found, number)
    beside = found[max(0, place - 1) : place + 1]
    if any(abs(x - number) <= 2 * slack + wide * number + 1e-9 for x in beside):
        return True
    near = [x for x in beside if abs(x - number) <= 0.1 * number]
    if not near:
        return None
    nearest = min(near, key=lambda x: abs(x - number))
    findings.error(
        f"submission.json: {leaf.name} {leaf.text}, and the figures differ by {nearest:.5g}", cause="statistics"
    )
    return False


def check_foreign(folder: Folder, findings: Findings, evidence: Evidence, leaf: Leaf) -> bool | None:
    """Somebody else's figure: the page may name it, and a stated difference must lead to it."""
    if leaf.meaning.kind != "bpb" or leaf.meaning.seed is not None:
        return None
    said = page_scores(folder.page)
    if any(stands(leaf.text, x) or stands(repr(x), leaf.value) for x in said):
        return True
    lines = [line for line in folder.page[:500_000].splitlines() if foreign_line(line)]
    near = [x for line in lines for x in page_scores(line) if abs(x - leaf.value) <= 0.03 * x]
    own = [f for f in (*evidence.figures, *evidence.over) if f.meaning.kind == "bpb"]
    near += [x for x in said if abs(x - leaf.value) <= 0.015 * x and not any(stands(repr(x), f.value) for f in own)]
    if not near:
        return None
    findings.warning(f"submission.json: {leaf.name} {leaf.text}, and README.md says {near[0]:.6g}", cause="statistics")
    return False


def foreign_line(line: str) -> bool:
    """Whether a line speaks of other people's runs."""
    return bool(re.search(r"sota|baseline|leaderboard|\bPR ?#|#[0-9]{2,5}\b|previous|\bvs\b|prior|record", line, re.I))


# --------------------------------------------------------------------------------------------------- within the JSON


def siblings(evidence: Evidence) -> Iterator[list[Leaf]]:
    """The stated numbers that stand in one object, or that belong to one seed."""
    groups: dict[tuple, list[Leaf]] = defaultdict(list)
    for leaf in evidence.leaves:
        if not leaf.meaning.foreign:
            groups[leaf.path[:-1]].append(leaf)
    yield from groups.values()


def loss_pairs(evidence: Evidence) -> Iterator[tuple[Leaf, Leaf]]:
    """The scores that are stated in nats and in bits under the same name."""
    by_path = {leaf.path: leaf for leaf in evidence.leaves}
    for leaf in evidence.leaves:
        m = leaf.meaning
        if m.kind != "bpb" or m.difference or m.statistic == "std":
            continue
        other = by_path.get(tuple(re.sub("bpb", "loss", name) for name in leaf.path))
        if other is not None and other is not leaf and leaf.value > 0:
            yield leaf, other


def stated_ratio(evidence: Evidence) -> float | None:
    ratios = [loss.value / bpb.value for bpb, loss in loss_pairs(evidence)]
    return statistics.median(ratios) if ratios else None


def check_pairs(findings: Findings, evidence: Evidence) -> None:
    """Nats per token and bits per byte of one text have one ratio; ln 2 is that of nats per byte."""
    pairs = list(loss_pairs(evidence))
    ratios = [loss.value / bpb.value for bpb, loss in pairs]
    usual = evidence.ratio or (statistics.median(ratios) if len(ratios) >= 3 else None)
    vocab = {text for text in evidence.settings.get("vocab_size", ()) if text.isdigit()}
    if any(int(text) <= 300 for text in vocab if len(text) < 6):
        return  # tokens are bytes
    for (bpb, loss), ratio in zip(pairs, ratios, strict=True):
        slack = claims.slack_of(bpb.text) / bpb.value + claims.slack_of(loss.text) / (abs(loss.value) or 1)
        if abs(ratio / PER_BPB - 1) < 0.002 + slack and (usual is None or abs(usual / PER_BPB - 1) > 0.01 + slack):
            findings.error(
                f"submission.json: {loss.name} {loss.text} is nats per byte ({bpb.name} times ln 2), not per token",
                cause="score",
            )
        elif usual is not None:
            findings.require(
                abs(ratio / usual - 1) < 0.003 + slack,
                f"submission.json: {loss.name} {loss.text} and {bpb.name} {bpb.text} are a ratio of {ratio:.4f}, "
                f"and those of the same text have {usual:.4f}",
                cause="score",
            )


def check_sums(findings: Findings, evidence: Evidence) -> None:
    """Bytes of code and model make the total; steps by their time make the time of training."""
    for group in siblings(evidence):
        plain = [x for x in group if not x.meaning.difference and x.meaning.statistic in ("", "mean")]
        found: dict[tuple[str, str], list[Leaf]] = defaultdict(list)
        for leaf in plain:
            found[leaf.meaning.kind, leaf.meaning.part].append(leaf)
        single = {key: group[0] for key, group in found.items() if len(group) == 1}
        code, model = single.get(("bytes", "code")), single.get(("bytes", "model"))
        total = single.get(("bytes", "total"))
        if code and model and total:
            parts = [x.value * x.meaning.units[0] for x in (code, model, total)]
            slack = sum(claims.slack_of(x.text) * x.meaning.units[0] for x in (code, model, total))
            findings.require(
                abs(parts[0] + parts[1] - parts[2]) <= slack + 1,
                f"submission.json: {code.name} + {model.name} and {total.name}: {parts[0] + parts[1]:.0f} and "
                f"{parts[2]:.0f}",
                cause="figures",
            )
        check_time(findings, single)


def check_time(findings: Findings, single: dict[tuple[str, str], Leaf]) -> None:
    steps, step = single.get(("steps", "")), single.get(("step", ""))
    spent = single.get(("seconds", "train"))
    if not (steps and step and spent) or nominal(spent) or not step.value:
        return
    product, seconds = steps.value * step.value * step.meaning.units[0], spent.value * spent.meaning.units[0]
    slack = claims.slack_of(step.text) / step.value + claims.slack_of(steps.text) / max(steps.value, 1)
    findings.require(
        abs(product - seconds) <= (0.004 + slack) * seconds + claims.slack_of(spent.text) * spent.meaning.units[0],
        f"submission.json: {steps.name} x {step.name} and {spent.name}: {product:.1f} s and {seconds:.1f} s",
        cause="figures",
    )


# ------------------------------------------------------------------------------------------------------------- rows

ROW_NAMES = {
    ("bpb", ""): "val_bpb",
    ("loss", ""): "val_loss",
    ("bytes", "total"): "artifact_bytes",
    ("bytes", "code"): "code_bytes",
    ("bytes", "model"): "model_bytes",
    ("steps", ""): "steps",
    ("step", ""): "step_avg_ms",
    ("seconds", "train"): "train_wallclock_ms",
    ("seconds", "eval"): "eval_time_s",
}
WHOLE = ("artifact_bytes", "code_bytes", "model_bytes", "steps")


def rows_of(everything: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Each seed's figures under our names, wherever a submission.json keeps them."""
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    for leaf in claims.leaves(everything, claims.stated_seeds(everything)):
        m = leaf.meaning
        name = ROW_NAMES.get((m.kind, m.part))
        if name is None or m.seed is None or m.foreign or m.difference or m.statistic or leaf.value < 0:
            continue
        value = leaf.value * m.units[0] * (1000 if name.endswith("_ms") else 1)
        rows[m.seed].setdefault(name, round(value) if name in WHOLE else float(value))
    return rows
