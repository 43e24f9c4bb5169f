"""Compares the tables and results in a stranger's README.md with what the folder's logs and submission.json tell.

A cell or a line may also give a statistic over seeds, a difference of two figures, another unit or another rounding. A
number that is none of these and lies near to a figure of its meaning disagrees; other people's figures are passed over.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

import claims
import runs
from claims import Figure, stands

if TYPE_CHECKING:
    from check_submission import Findings, Folder
    from stated import Evidence

TOKEN = re.compile(r"(?<![\w./-])[-+−]?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![\w]|\.[0-9])")
HEADLINE = re.compile(
    r"^\W*(?:(?:final|mean|[0-9]-seed|our|score)\W+)*val[_ ]?bpb\W{0,6}(?:score\W{0,4})?[:=]\s*\W{0,4}"
    r"([0-9]\.[0-9]{3,10})(?![0-9])",
    re.I | re.M,
)
TITLE = re.compile(r"^#{1,3} .{0,200}?\bval[_ ]?bpb\W{1,6}([0-9]\.[0-9]{3,10})(?![0-9])", re.I | re.M)
# The same within a line, of a named run: the submitted artifact is seed 1337's, with `val_bpb = 1.08471849`.
INLINE = re.compile(
    r"^[^|\n]{0,200}?\b(?:seed|submitted|submission|final)\b[^|\n]{0,100}?"
    r"\bval[_ ]?bpb`?\s?[:=]\s?[`*]{0,3}([0-9]\.[0-9]{4,10})(?![0-9])",
    re.I | re.M,
)
DEVIATION = re.compile(r"(?:\bstd(?:ev)?|standard deviation|±|σ|\+/-)\W{0,8}(0\.0[0-9]{2,8})(?![0-9])", re.I)
RESULT = re.compile(r"^\W*(?:mean|average|avg|std|[0-9]-seed)\b", re.I)
ABROAD = re.compile(
    r"\bPR\b|#|sota|baseline|prev|leaderboard|\bvs\b|delta|Δ|diff|gain|improv|record|reference|paper", re.I
)
ASIDE = re.compile(
    r"ablat|previous|prior|baseline|comparison|supersed|sota|PR ?#|histor|earlier|sweep|negative|tried", re.I
)
TOKENS = 20_000  # numbers of a page that are compared
LINES = 5000
NEAR = 0.03  # of its value, in prose
STEP_TIME = 0.0015  # of a step's time: it depends on the step up to which it is taken
GAP = 0.25  # the largest difference of two scores that a page states
UNIT = re.compile(r"(?<=[0-9]) ?(?:ms|s|sec|seconds|min|MB|MiB|KB|kB|M|bytes)\b")
EXACT_BYTES = re.compile(r"(?<![\w.,#/-])([0-9]{1,2},[0-9]{3},[0-9]{3})(?![\w,]|\.[0-9]| ?(?:param|token|weight))")
EXACT_STEPS = re.compile(r"(?<![\w.,#/-])([0-9]{1,2},?[0-9]{3})(?:/[0-9]+`?)? steps\b")
NAMED_SEED = re.compile(r"\bseed[=: ]{1,2}[`*]{0,3}([0-9]{1,10})\b", re.I)
BULLET = re.compile(
    r"^\s{0,6}[-*+] +\**([A-Za-z][\w /()+-]{1,60}?)\**:\**\s*`?([0-9][0-9,.]*\s?(?:ms|s|bytes|MiB|MB)?)`?\b"
    r"|^\s{0,6}[-*+] +"
)
METRIC = re.compile(r"^(?:metric|measure|quantity|result|item|figure|property)s?$", re.I)
TABLE = dict(bpb=0.015, loss=0.015)  # in a column whose title says its kind


class Known:
    """The figures that a page may repeat: of the logs, of submission.json, of statistics, and in other units."""

    def __init__(self, folder: Folder, evidence: Evidence):
        values = [f.value for f in (*evidence.figures, *evidence.over, *evidence.files)]
        values += [leaf.value * unit for leaf in evidence.leaves for unit in leaf.meaning.units]
        values += [leaf.value for leaf in evidence.leaves]
        values += [size for sizes in (folder.scripts, folder.weights) for size in sizes.values()]
        texts = [text for several in evidence.settings.values() for text in several]
        values += [float(text) for text in texts if re.fullmatch(r"[0-9]{1,15}(?:\.[0-9]{1,10})?", text)]
        values += [runs.CAP_BYTES, runs.MARGIN_NATS, runs.LEVEL, runs.BUDGET_SECONDS]
        values += [abs(runs.CAP_BYTES - x) for x in values if 1e6 < x < 2e7]
        every = {x for v in dict.fromkeys(values) for x in units_of(v)}
        gaps = [x for x in claims.differences([x for x in values if 0 < abs(x) < 20], None, 300) if x < GAP]
        ratio = evidence.ratio or 0.0
        self.evidence = evidence
        self.own: dict[int | None, claims.Numbers] = {}
        self.left = TOKENS
        self.numbers = claims.Numbers([*every, *gaps, *(x * ratio for x in gaps if ratio)])

    def of_seed(self, seed: int | None) -> claims.Numbers:
        """The figures of a seed's logs and row, or without a seed the statistics over seeds."""
        if seed not in self.own:
            figures = self.evidence.by_seed.get(seed, []) if seed is not None else self.evidence.over
            values = [f.value for f in figures]
            values += [x.value for x in self.evidence.leaves if seed is not None and x.meaning.seed == seed]
            self.own[seed] = claims.Numbers(x for value in values for x in units_of(value))
        return self.own[seed]

    def tokens(self, text: str) -> list[str]:
        """The numbers of a text, as long as there are not too many on the page."""
        found = TOKEN.findall(text)[: self.left]
        self.left -= len(found)
        return found

    def has(self, text: str) -> bool:
        return self.numbers.states(text.replace("−", "-").lstrip("+-"))


def units_of(value: float) -> Iterator[float]:
    """A figure as people write it: in thousands, millions, mebibytes, minutes, ms and percent."""
    value = abs(value)
    yield from (value, value / 1e3, value * 1e3, value / 1e6)
    if value > 1e4:
        yield from (value / 2**20, value / 2**10, value / 1e9)
    elif value > 30:
        yield value / 60


def check_page(folder: Folder, findings: Findings) -> None:
    """Checks the tables, the lines of results and the headline of somebody else's README.md."""
    if not folder.page or folder.evidence is None:
        return
    evidence = folder.evidence
    known = Known(folder, evidence)
    header: list[str] = []
    above: dict[str, list[float]] = {}
    unknown: list[str] = []
    aside = titled = False  # in a section of other runs; under a heading
    rows: set[int] = set()
    page = re.sub(r"```.*?```", "", folder.page, flags=re.S)
    for line in page.splitlines()[:LINES]:
        cells = cells_of(line)
        if line.startswith("#") or "<summary" in line or "</details" in line:
            aside = titled and bool(ASIDE.search(line))  # the title may name what the runs build on
            titled = True
        if aside:
            continue
        if not cells:
            header = []
            unknown += check_line(findings, evidence, known, line)
            if not ABROAD.search(line):
                check_prose(findings, evidence, known, line)
                if BULLET.match(line):
                    check_bullet(findings, evidence, known, line)
        elif re.fullmatch(r"[\s|:-]+", line):
            continue
        elif not header:
            header, above = cells, {}
        elif len(header) == 2 and METRIC.search(header[0]) and not ABROAD.search(cells[0]):
            check_metric(findings, evidence, known, cells)
        else:
            seed = row_seed(header, cells)
            if seed is not None:
                rows.add(seed)
            unknown += check_row(folder, findings, known, seed, header, cells, above)
    check_headline(folder, findings, evidence)
    check_deviations(folder, findings, evidence)
    check_seeds(folder, findings, rows)
    if unknown:
        findings.note(f"README.md: in no other file, so not checked: {', '.join(sorted(set(unknown))[:12])}")


def cells_of(line: str) -> list[str]:
    row = line.strip()
    return [re.sub(r"~~", "", cell).strip(" *`") for cell in row.strip("|").split("|")] if row.startswith("|") else []


def row_seed(header: list[str], cells: list[str]) -> int | None:
    """The seed of a table's row, if its column of seeds says one."""
    place = next((i for i, title in enumerate(header) if "seed" in title.lower()), None)
    if place is None or place >= len(cells):
        return None
    match = re.fullmatch(r"(?:seed\s*)?([0-9]{1,10})(?:\s*\(.*\))?", cells[place], re.I)
    return int(match[1]) if match else None


def statistic_row(cells: list[str]) -> bool:
    return bool(cells and re.match(r"^\W*(?:mean|average|avg|std|stdev|deviation|[0-9]-seed)", cells[0], re.I))


def check_row(
    folder: Folder,
    findings: Findings,
    known: Known,
    seed: int | None,
    header: list[str],
    cells: list[str],
    above: dict[str, list[float]] | None = None,
) -> list[str]:
    """Checks a row of a seed, or of a statistic over seeds. Returns what nothing tells. `above` gets the scores of the
    rows, by the titles of their columns."""
    evidence = folder.evidence
    if evidence is None or (seed is None and not statistic_row(cells)):
        return [] if seed is None else [cells[0]]
    own = [f for f in evidence.by_seed.get(seed, []) if f.meaning.kind] if seed is not None else evidence.over
    unknown = []
    above = above if above is not None else {}
    if seed is None and re.match(r"^\W*(?:std|stdev|deviation)", cells[0], re.I):
        check_deviation_row(folder, findings, header, cells, above)
    for title, cell in zip(header, cells, strict=False):
        if seed is not None and (number := re.match(r"^[*]*([0-9]\.[0-9]{2,10})(?![0-9])", cell)):
            above.setdefault(title, []).append(float(number[1]))
        if ABROAD.search(title) or "seed" in title.lower():
            continue
        m = claims.meaning((title.replace("/", " per "),))
        kind = m.kind or column_kind(title, cell, own)
        for text in known.tokens(UNIT.sub("", re.sub(r"[~≈] ?[0-9.,]+|[0-9.,]+ ?%", "", cell))):
            digits = re.sub(r"\D", "", text)
            plain = text.replace("−", "-").lstrip("+-")
            if len(digits) < 3 or known.of_seed(seed).states(plain) or (kind == "seconds" and plain == "600"):
                continue
            if kind == "step" and any(
                abs(x - float(plain)) <= STEP_TIME * x for f in own if f.meaning.kind == kind for x in units_of(f.value)
            ):
                continue  # the mean up to another step
            if seed is None and title in above and stands(plain, statistics.fmean(above[title]), 1e-9):
                continue  # the mean of what the rows say, of which each was compared
            near = nearest(plain, own, kind, TABLE.get(kind, 0.05))
            if near is not None and seed is not None:
                findings.error(f"README.md: seed {seed}, {title}: {text} is not in its log or row: {near:.9g}")
            elif seed is not None and kind and any(f.meaning.kind == kind for f in own) and not known.has(text):
                findings.warning(f"README.md: seed {seed}, {title}: {text} is not in its log or row")
            elif seed is None and near is None and kind in ("bpb", "bytes") and not known.has(text):
                findings.error(f"README.md: {text} is in no other file: {cells[0]}, {title}")
            elif near is not None and not known.has(text):
                findings.error(f"README.md: {text} is in no other file: {cells[0]}, {title}, which are {near:.9g}")
            elif not known.has(text):
                unknown.append(text)
    findings.compared += 1
    return unknown


def check_deviation_row(
    folder: Folder, findings: Findings, header: list[str], cells: list[str], above: dict[str, list[float]]
) -> None:
    """A deviation below a column of seeds must be the sample's of what the column says."""
    for title, cell in zip(header, cells, strict=False):
        match = re.match(r"^[*±]*(0\.0[0-9]{2,10})(?![0-9])", cell)
        values = above.get(title, [])
        if not match or len(values) < 3:
            continue
        slack = 0.75 * 10.0 ** -min(len(repr(x).partition(".")[2]) for x in values)
        sample, population = statistics.stdev(values), statistics.pstdev(values)
        named = "population" in folder.page.lower() or "ddof=0" in folder.page
        if any(stands(match[1], x, slack, cut=False) for x in (sample, population if named else sample)):
            continue
        why = " (it is the population's)" if stands(match[1], population, slack, cut=False) else ""
        findings.error(
            f"README.md: {title}: std {match[1]} and the sample deviation of its rows {sample:.4g}{why}",
            cause="statistics",
        )


def check_metric(findings: Findings, evidence: Evidence, known: Known, cells: list[str]) -> None:
    """Checks a row of a table of metrics: a name, and a figure that must be one of its kind."""
    m = claims.meaning((cells[0].replace("/", " per "),))
    if len(cells) < 2:
        return
    kind = m.kind or column_kind(cells[0], cells[1], evidence.figures)
    if not kind or m.difference or m.foreign or m.statistic == "std":
        return
    for text in known.tokens(UNIT.sub("", re.sub(r"[~≈] ?[0-9.,]+|[0-9.,]+ ?%", "", cells[1])))[:1]:
        plain = text.replace("−", "-").lstrip("+-")
        near = nearest(plain, evidence.figures, kind, TABLE.get(kind, 0.03))
        if len(re.sub(r"\D", "", text)) >= 3 and near is not None and not known.has(text) and plain != "600":
            findings.error(f"README.md: {cells[0]}: {text} is in no other file, and the logs have {near:.9g}")
    findings.compared += 1


def check_prose(findings: Findings, evidence: Evidence, known: Known, line: str) -> None:
    """Checks the bytes and the steps that a line of prose states to the last digit; round numbers are aims."""
    for pattern, kind in ((EXACT_BYTES, "bytes"), (EXACT_STEPS, "steps")):
        for match in itertools.islice(pattern.finditer(line[:2000]), 20):
            text = match[1]
            if re.search(r"00$", text) or re.search(
                r"(?:[~≈<>]|about|before|from|over|under) ?$", line[: match.start(1)]
            ):
                continue
            near = nearest(text, evidence.figures, kind)
            if near is not None and not known.has(text):
                findings.error(f"README.md: {text} {kind} are in no other file, and the logs have {near:.9g}")


def check_bullet(findings: Findings, evidence: Evidence, known: Known, line: str) -> None:
    """Checks an item of a list: `Train time: 600047ms`, or pairs such as `val_bpb:1.1880`, of a seed that it names."""
    seed = NAMED_SEED.search(line)
    own = evidence.by_seed.get(int(seed[1]), []) if seed else evidence.figures
    if seed and not own:
        return  # of a run without a log
    label = BULLET.match(line)
    plain = line.replace("`", "").replace("*", "")
    pairs = [(name, value, unit) for name, value, unit in claims.PAIRS.findall(plain[:1000])]
    if not pairs and label and label[2]:
        check_metric(findings, evidence, known, [label[1], label[2]])
    for name, value, unit in pairs:
        m = claims.meaning(((label and label[1]) or "", name + ("_" + unit.lower() if unit else "")))
        step = name == "step"
        kind = "steps" if step else m.kind
        near = nearest(value, own, kind, TABLE.get(kind, 0.03))
        exact = len(re.sub(r"\D", "", value)) >= 3
        if kind and exact and not m.foreign and near is not None and not known.has(value):
            findings.error(f"README.md: {name} {value} is in no other file, and the logs have {near:.9g}")
    findings.compared += len(pairs)


def column_kind(title: str, cell: str, own: list[Figure]) -> str:
    """The kind of a column whose title does not say it: sizes, the scores of stages, and what is near to a score."""
    if re.search(r"artifact|size", title, re.I):
        return "bytes"
    match = re.match(r"^([0-3]\.[0-9]{3,8})\b", cell.strip(" *"))
    if not match:
        return ""
    stage = claims.score_part(set(claims.words_of(title))) or re.search(r"roundtrip|sliding", title, re.I)
    score = len(match[1]) >= 6 and nearest(match[1], own, "bpb", TABLE["bpb"]) is not None
    return "bpb" if stage or score else ""


def nearest(text: str, figures: list[Figure], kind: str, reach: float = NEAR) -> float | None:
    """The figure that a wrong number means: of the kind that its column names, and near to it."""
    number = abs(runs.rounding(text)[0])
    ours = [f for f in figures if not f.meaning.foreign]
    values = [x for f in ours if not kind or f.meaning.kind == kind for x in units_of(f.value)]
    close = [x for x in values if abs(x - number) <= reach * number] if kind else []
    return min(close, key=lambda x: abs(x - number)) if close else None


def check_line(findings: Findings, evidence: Evidence, known: Known, line: str) -> list[str]:
    """A line of prose: one of results must repeat known figures. Returns what nothing tells."""
    texts = [t for t in known.tokens(line) if len(re.sub(r"\D", "", t)) >= 3 and not known.has(t)]
    scores = [t for t in texts if re.fullmatch(r"[0-9]\.[0-9]{4,}", t) and float(t) > 0.02]
    headline = HEADLINE.match(line)
    if not (RESULT.match(line) or headline) or ABROAD.search(line):
        return scores
    wrong = {}
    for text in scores:
        kinds = ("bpb", "loss") if re.search(rf"{re.escape(text)}\W{{0,4}}nats", line) else ("bpb",)
        near = next((x for kind in kinds if (x := nearest(text, [*evidence.over, *evidence.figures], kind))), None)
        if near is not None and not (headline and text == headline[1]):
            wrong[text] = near
    for text, near in wrong.items():
        findings.error(f"README.md: {text} is in no other file: {line.strip()[:80]}; the figures have {near:.6g}")
    return [t for t in scores if t not in wrong]


def headlines(page: str) -> Iterator[tuple[str, str]]:
    """Each val_bpb that a page states as its own, with its line up to there; those of other people are left out."""
    for pattern, most in ((HEADLINE, 50), (TITLE, 20), (INLINE, 50)):
        for match in itertools.islice(pattern.finditer(page), most):
            before = page[page.rfind("\n", 0, match.start(1)) + 1 : match.start(1)].lstrip("#| ")
            around = before[-40:] + " " + page[match.end(1) : match.end(1) + 25].partition("\n")[0]
            if not ABROAD.search(re.sub("record", "", around, flags=re.I)):
                yield match[1], before


def check_headline(folder: Folder, findings: Findings, evidence: Evidence) -> None:
    """The val_bpb that a page states must be a figure of the folder; submission.json's must stand on the page."""
    page = folder.page[:500_000]
    scores = [f for f in (*evidence.figures, *evidence.over) if f.meaning.kind == "bpb"]
    told = [leaf.value for leaf in evidence.leaves if leaf.meaning.kind == "bpb"]
    for text, before in headlines(page):
        seed = NAMED_SEED.search(before)
        if seed and not evidence.by_seed.get(int(seed[1])):
            continue  # of a run without a log
        if any(stands(text, x) or stands(claims.text_of(x), float(text)) for x in told):
            continue
        found = [f for f in scores if stands(text, f.value, f.slack)]
        near = nearest(text, scores, "bpb")
        if not found and near is not None:
            findings.error(f"README.md: val_bpb {text}, and the logs have {near:.6g}", cause="score")
        final = [run.final.bpb for run in folder.logs if run.final and run.final_stage != "pre_quant"]
        early = found and all(f.meaning.part == "pre" or f.label.strip().startswith("val_bpb") for f in found)
        if early and final and not claims.score_part(set(claims.words_of(before))):
            findings.warning(
                f"README.md: val_bpb {text} is of before the quantization, and the last score is {final[-1]:.6g}",
                cause="score",
            )
    mean = folder.content.get("val_bpb")
    if isinstance(mean, float) and math.isfinite(mean):
        exact = [t.lstrip("+-−") for t in TOKEN.findall(page) if len(t.partition(".")[2]) >= 3]
        if exact:
            own = claims.text_of(mean)
            findings.require(
                any(stands(text, mean) or stands(own, float(text.replace(",", ""))) for text in exact),
                f"README.md: does not say submission.json's val_bpb {own}",
            )


def check_deviations(folder: Folder, findings: Findings, evidence: Evidence) -> None:
    """A deviation that a page states must be the sample's, and the population's only if it says so."""
    page = folder.page[:500_000]
    over = [f for f in evidence.over if f.meaning.kind in ("bpb", "loss")]
    sample, population = ([f for f in over if f.meaning.statistic == name] for name in ("std", "pstd"))
    named = "population" in page.lower() or "ddof=0" in page
    told = [x.value for x in evidence.leaves if x.meaning.statistic == "std"]
    for match in itertools.islice(DEVIATION.finditer(page), 100):
        text = match[1]
        line = page[page.rfind("\n", 0, match.start()) + 1 : match.end()]
        labels = own_labels(line, over)
        right = [f for f in sample if f.label in labels]
        stated = any(stands(text, f.value, f.slack, cut=False) for f in right or sample)
        if stated or any(stands(text, x) for x in told):
            continue
        wrong = [f for f in population if stands(text, f.value, f.slack, cut=False)]
        if wrong and not named:
            value = next((f.value for f in sample if f.label == wrong[0].label), 0.0)
            findings.error(
                f"README.md: std {text} and the seeds' sample deviation {value:.4g} (it is the population's)",
                cause="statistics",
            )
        elif right and not wrong and not ABROAD.search(line.lstrip("#")[-60:]):
            value = min((f.value for f in right), key=lambda x: abs(x - float(text)))
            findings.error(f"README.md: std {text} and the seeds' sample deviation {value:.4g}", cause="statistics")


def own_labels(line: str, over: list[Figure]) -> set[str]:
    """The labels of the figures whose mean over seeds a line states."""
    texts = [text for text in TOKEN.findall(line) if re.fullmatch(r"[0-9]\.[0-9]{3,10}", text)]
    return {f.label for f in over if f.meaning.statistic == "mean" and any(stands(t, f.value, f.slack) for t in texts)}


def check_seeds(folder: Folder, findings: Findings, rows: set[int]) -> None:
    """A table of seeds must have those of submission.json; other rows are other runs', and named."""
    if not folder.seeds:
        return
    extra = sorted(rows - set(folder.seeds))
    absent = sorted(set(folder.seeds) - rows)
    claimed = [s for s in absent if folder.seeds[s].row]
    if extra:
        said = ", ".join(map(str, extra[:10]))
        findings.warning(f"README.md: has rows of seeds {said}, which submission.json and the logs have not")
    if rows and claimed and not extra:
        findings.warning(f"README.md: its table has no row of seed {', '.join(map(str, claimed[:10]))}")
    if not rows:
        findings.note("README.md: has no table with a row for each seed")
