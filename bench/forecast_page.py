"""What bench/forecast.py prints and writes: a table of the parts, and docs/forecast.md. All figures are its JSON's."""

from __future__ import annotations

from typing import Any

Content = dict[str, Any]
LINKS = ("quantize.json", "strict.json", "budget.json", "hint.md", "h100.json")


def number(x: float) -> str:
    """A change in bits per byte. A zero has no sign."""
    return f"{x:+.4f}" if round(x, 4) else "0.0000"


def three(of: dict[str, float]) -> list[str]:
    return [number(of[end]) for end in ("low", "mid", "high")]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [row(titles), "|" + "---|" * len(titles), *(row(cells) for cells in rows)]


def parts_table(content: Content) -> list[str]:
    """A line for each part, and the sum."""
    start, of = content["start"]["published"], content["forecast"]["estimated"]
    lines = [[part["part"], *three(part["estimated"])] for part in content["parts"]]
    lines.append(["**forecast**", *(f"**{of[end]:.4f}**" for end in ("low", "mid", "high"))])
    published = [f"published by the peer: {start:.4f}", "", "", ""]
    return table(["part", "low, estimated", "middle, estimated", "high, estimated"], [published, *lines])


def verdict(content: Content) -> list[str]:
    """The goal against the interval."""
    of, goal = content["forecast"]["estimated"], content["goal"]
    chance = content["probability_of_goal"]["estimated"]
    if goal < of["low"]:
        where = "below the interval: these measurements do not support it"
    elif goal < of["mid"]:
        where = "inside the interval, and better than its middle: it is possible, but less likely than not"
    elif goal <= of["high"]:
        where = "inside the interval, and worse than its middle: it is more likely than not"
    else:
        where = "above the interval: these measurements support it"
    gap = content["gap_to_goal"]
    lines = [
        f"Forecast, estimated: {of['mid']:.4f} bits per byte, 95% between {of['low']:.4f} and {of['high']:.4f}.",
        f"The goal of {goal:.3f} lies {where}. Its probability by this model is {chance:.1%}, estimated.",
    ]
    if gap["estimated"] > 0:
        lines += [
            f"The middle lacks {gap['estimated']:.4f}, estimated. By the slope of public runs that is the worth of "
            f"{gap['steps']:.2f} times the steps."
        ]
    return lines


def summary(content: Content) -> list[str]:
    """For the terminal."""
    return [*parts_table(content), "", *verdict(content)]


def shown(value: Any) -> str:
    """A constant as it stands in the code."""
    if isinstance(value, (list, tuple)):
        return ", ".join(f"({shown(x)})" if isinstance(x, (list, tuple)) else shown(x) for x in value)
    return f"{value:,}"


def details(content: Content) -> list[str]:
    """A section for each part."""
    lines: list[str] = []
    for part in content["parts"]:
        low, middle, high = three(part["estimated"])
        lines += [f"### {part['part'].capitalize()}: {middle} ({low} to {high}), estimated", ""]
        lines += ["Measured:", "", *(f"- {line}" for line in part["measured"]), ""]
        lines += [f"Carried: {part['rule']}.", "", f"Falsified by: {part['falsified_by']}.", ""]
    return lines


def idea_lines(content: Content) -> list[str]:
    """The rows of the laboratory."""
    lines = ["## Rows of the laboratory", ""]
    words = dict(gain="gain", width="0 in the middle, and its width")
    if content["ideas"]:
        rows = [
            [
                i["row"],
                f"*{i['verdict']}*",
                i["measured"],
                words.get(i["counted"], i["counted"]),
                *three(i["estimated"]),
            ]
            for i in content["ideas"]
        ]
        ends = ["low, estimated", "middle, estimated", "high, estimated"]
        titles = ["row", "verdict", "measured, bpb", "counts as", *ends]
        lines += ["Estimates are those of a row alone at full size, before any are put together.", ""]
        lines += [*table(titles, rows), ""]
    else:
        lines += ["No row has a result yet: the recipe counts as 0.", ""]
    if content["not_measured"]:
        lines += ["Not measured yet, and counted as 0: " + "; ".join(content["not_measured"]) + ".", ""]
    return lines


def constants(content: Content) -> list[str]:
    published = [[name, shown(c["value"]), c["source"]] for name, c in content["published"].items()]
    judged = [[name, shown(c["value"]), c["why"]] for name, c in content["assumed"].items()]
    slope, steps = content["slope_in_small"], content["slope_at_full_size"]
    return [
        "## Figures of others",
        "",
        *table(["figure", "value", "source"], published),
        "",
        "## Assumptions",
        "",
        "Least, most likely, most. Nobody measured them.",
        "",
        *table(["assumption", "value", "why"], judged),
        "",
        "## What a step is worth",
        "",
        f"- In small: {slope['mean']:.3f} ± {slope['error']:.3f} bpb (standard error) for each e-fold of steps, by "
        f"{slope['source']}.",
        f"- At full size: {steps['mid']:.4f} ({steps['low']:.4f} to {steps['high']:.4f}), between neighbouring lengths "
        "of the public runs above.",
        *(
            f"- From size {size} to full size, training FLOPs double {times:.1f} times, estimated."
            for size, times in content["doublings_to_full_size"].items()
        ),
        "",
    ]


METHOD = """
- It starts at the mean of SOURCE. Each part changes that.
- A part is a distribution, drawn DRAWS times with a fixed seed. Low and high enclose 95% of the draws.
- Parts are taken to be independent, but for two things. The slope at full size is one draw for data order, recipe and
  speed. The share of the recipe is one draw for all its rows: what would make one of them fail on another text, or in a
  model that is trained enough, would make others fail too.
- A gain in small counts as the steps that would have gained the same in small. So it shrinks as steps lose their worth.
  What a training of eight times the length left of a gain is left again with each further factor of eight in tokens
  for each parameter. A gain that shrinks over the sizes goes on shrinking as a power of compute, by the same share with
  each doubling. None is taken to grow.
- Of equal FLOPs and equal seconds, that counts at which a row gains less at its largest size.
- *Unclear* rows count 0 in the middle and widen the interval. Rows that are not measured count 0.
- Rows that pay were chosen by the same figures, so these are a little too good. The share stands for that, too.
- Of rows that set the same knob, one counts: that with the best verdict, then with the largest gain.
- Rows that only choose another value for what peers have tuned at full size count 0, whatever they gain in small:
  learning rates (`MATRIX_LR`, `SCALAR_LR`, `TIED_EMBED_LR`), `QK_GAIN_INIT`, `EMA_DECAY`, `LN_SCALE`, `NUM_LOOPS`,
  `ENABLE_LOOPING_AT`, `Z_LOSS_WEIGHT`, `SMEAR_GATE_TYPE`, `VOCAB_SIZE`.
- Windows of attention (`WINDOW_ATTN_SIZE`) and wider heads (`NUM_HEADS`) are there for a GPU's seconds. What they save
  is in the speed, by the budget. What they cost at equal FLOPs, in the laboratory's longest training, is the price of
  speed; where they seem to gain there, they count 0.
- Bytes are not in it: an idea with more parameters must pay for them out of what quantization saves.
- Hints and progressive context count only if the preset takes them: `HINT_ENABLED`, `TRAIN_SEQ_SCHEDULE`.
  `make forecast ARGS="--without hints context"` shows the sum without them.
- Chunks of test-time training count if the preset's are not the peer's: `TTT_CHUNK_SIZE`.
- The laboratory has a built-in text, and models that see less than one token for each parameter, but for the one that
  trains for eight times as long, which sees four. No interval covers what another kind of text may do. The share of the
  recipe, from nearly nothing to all, stands for it.
"""


def page(content: Content) -> str:
    """docs/forecast.md."""
    links = ", ".join(f"[{name}](../bench/results/{name})" for name in LINKS)
    head = content["published"]["head of the leaderboard"]
    method = METHOD.replace("SOURCE", content["start"]["source"]).replace("DRAWS", f"{content['draws']:,}")
    lines = [
        "# A forecast of the score on 8 H100s",
        "",
        "Made by `make forecast` (bench/forecast.py) from committed measurements. None of them is from a GPU: every",
        "change and every sum here is *estimated*. Only the start is published.",
        "",
        *verdict(content),
        f"The head of the public leaderboard has {head['value']} ({head['source']}).",
        "",
        *parts_table(content),
        "",
        "Changes are in bits per byte of FineWeb's validation text: below 0 is better. The middles do not quite add up",
        "to the forecast's: it is the middle of the sums.",
        "",
        "## How it is made",
        method,
        f"Measurements: {links}, and the laboratory's lab.jsonl, reported in [lab.md](../bench/results/lab.md).",
        "",
        "## Each part",
        "",
        *details(content),
        *idea_lines(content),
        *constants(content),
    ]
    return "\n".join(lines).rstrip() + "\n"
