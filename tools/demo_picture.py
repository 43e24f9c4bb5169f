"""Draws README's picture: bits per byte of the runs in logs/, while they trained, as docs/demo.svg (`make docs`).

The picture is written as text, so that a browser shows its words sharply, and in the colours of a dark page too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import runs

WIDTH, HEIGHT = 860, 330
LEFT, RIGHT = 58, 700  # of the axes
TOP, BOTTOM = 50, 282
HIGHEST = 3.5  # bits per byte at the top: the first steps lie above
STYLE = """
  text { font: 13px Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #3b434e; }
  .back { fill: #ffffff; }
  .title { font-size: 15px; font-weight: bold; }
  .end { font-size: 14px; font-weight: bold; fill: #1a5fb4; }
  .grid { stroke: #8a93a0; stroke-opacity: .3; }
  .curve { fill: none; stroke: #1a5fb4; stroke-width: 1.6; stroke-linejoin: round; }
  .other { stroke: #b35900; stroke-dasharray: 6 4; stroke-width: 1.4; }
  .packer { fill: #b35900; }
  .score { fill: #1a5fb4; }
  .right { text-anchor: end; }
  .middle { text-anchor: middle; }
  @media (prefers-color-scheme: dark) {
    text { fill: #c9d1d9; }
    .back { fill: #1e2129; }
    .end, .score { fill: #79b8ff; }
    .curve { stroke: #79b8ff; }
    .other { stroke: #f0a050; }
    .packer { fill: #f0a050; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind and f" class={chr(34)}{kind}{chr(34)}"}>{words}</text>'


def line(x: float, y: float, x_end: float, y_end: float, kind: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x_end:.1f}" y2="{y_end:.1f}" class="{kind}"/>'


class Axes:
    """Where tokens and bits per byte lie in the picture."""

    def __init__(self, tokens: float, lowest: float):
        self.tokens, self.lowest = tokens, lowest

    def x(self, tokens: float) -> float:
        return LEFT + (RIGHT - LEFT) * tokens / self.tokens

    def y(self, bpb: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (bpb - self.lowest) / (HIGHEST - self.lowest)

    def grid(self) -> list[str]:
        """The lines behind the curves, with their numbers."""
        parts = []
        for half in range(math.ceil(2 * self.lowest), round(2 * HIGHEST) + 1):
            y = self.y(half / 2)
            parts += [line(LEFT, y, RIGHT, y, "grid"), text(LEFT - 8, y + 4, f"{half / 2:.1f}", "right")]
        for millions in range(round(self.tokens / 1e6) + 1):
            if (x := self.x(1e6 * millions)) <= RIGHT:
                parts += [text(x, BOTTOM + 18, f"{millions}M" if millions else "0", "middle")]
        return parts

    def curve(self, points: Sequence[tuple[float, float]]) -> str:
        """A curve of (tokens, bits per byte); what lies above the picture is left out."""
        places = (f"{self.x(tokens):.1f},{self.y(bpb):.1f}" for tokens, bpb in points if bpb <= HIGHEST)
        return f'<polyline class="curve" points="{" ".join(places)}"/>'


def demo_svg(curves: Sequence[report.Curve], submission: dict[str, Any], packed: float) -> str:
    """The picture. Arguments: the runs' curves, their submission.json, and bits per byte of xz on the same text."""
    lines = [[(step * (curve.run.tokens_per_step or 1), bpb) for step, bpb in curve.training] for curve in curves]
    last = max(tokens for points in lines for tokens, _ in points)
    axes = Axes(last, 0.5 * math.floor(2 * min(bpb for points in lines for _, bpb in points)))
    mean, _ = runs.mean_and_deviation([row["val_bpb"] for row in submission["seed_results"].values()])
    seconds = max(row["train_wallclock_ms"] for row in submission["seed_results"].values()) / 1000
    size = max(row["artifact_bytes"] for row in submission["seed_results"].values()) / 1e6
    y, score = axes.y(packed), axes.y(mean)
    end = RIGHT + 10
    where = submission["hardware"].replace(", 1 rank", "")
    how = f"{seconds / 60:.0f} minutes on {where}, {len(curves)} seeds"
    title = f"Bits per byte while it trains, less is better: {how}"
    # With a background of its own, it can be read where a page is dark and the browser is not.
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" class="back"/>']
    parts += [text(LEFT - 40, 24, title, "title"), *axes.grid()]
    parts += [text((LEFT + RIGHT) / 2, BOTTOM + 38, "tokens of the demo's corpus, trained on", "middle")]
    parts += [line(LEFT, y, RIGHT, y, "other"), text(end, y - 2, f"xz -9: {packed:.3f}", "packer")]
    parts += [text(end, y + 16, "on the same text")]
    parts += [axes.curve(points) for points in lines]
    parts += [f'<circle cx="{RIGHT}" cy="{score:.1f}" r="5" class="score"/>']
    parts += [text(end, score - 2, f"score: {mean:.3f}", "end"), text(end, score + 16, f"of a file of {size:.1f} MB")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">'
    return "\n".join((head, f'<title id="title">{title}</title>', f"<style>{STYLE}</style>", *parts, "</svg>", ""))


def demo_page(root: Path, old: str) -> str:
    """docs/demo.svg of the runs that submission.json reports; the old text where there are none. Errors: UserError."""
    if not (root / "submission.json").is_file() or not (root / "logs").is_dir():
        return old
    own = re.compile(r"train_seed\d+\.log")  # users have runs of their own in logs/, too
    found, _ = report.read([str(path) for path in sorted((root / "logs").iterdir()) if own.fullmatch(path.name)])
    curves = [curve for curve in map(report.curve_of, found) if curve and curve.training]
    if not curves:
        return old
    submission = runs.read_json(root / "submission.json")
    summary = runs.read_json(root / "logs" / f"summary_seed{min(submission['seed_results'], key=int)}.json")
    return demo_svg(curves, submission, summary["reference_compressors"]["xz -9"])
