"""The table of what each part of a step costs, from what was seen of its graphs and of its eager operators."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

# Measured on H100s (SXM): the largest bf16 product at 798 TFLOP/s, and copies at 3.0 TB/s.
FLOPS_PER_SECOND = 798e12
FLOAT8_SPEEDUP = 2.0  # of FP8 products over bf16: by the data sheet, not measured
BYTES_PER_SECOND = 3.0e12


@dataclasses.dataclass
class Row:
    """One part of a step on one GPU. Every figure is an estimate; none was measured on a GPU."""

    use: str
    part: str
    launches: int
    matrix_flops: int  # matrix products, of libraries and of hand-written kernels
    attention_flops: int
    bytes_read: int
    bytes_written: int
    float8_flops: int = 0  # of the matrix FLOPs, those of FP8 inputs

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Time at the ceilings: of the arithmetic, and of the memory."""
        flops = self.matrix_flops + self.attention_flops - self.float8_flops * (1 - 1 / FLOAT8_SPEEDUP)
        return 1e3 * flops / FLOPS_PER_SECOND, 1e3 * (self.bytes_read + self.bytes_written) / BYTES_PER_SECOND


def graph_row(graph: Any, calls: int) -> Row:
    """A graph that runs so many times in a step."""
    products = graph.flops["matrix products"] + graph.flops["hand-written"]
    return Row(
        graph.use,
        graph.part,
        calls * sum(graph.launches.values()),
        calls * products,
        calls * graph.flops["attention"],
        calls * graph.bytes_read,
        calls * graph.bytes_written,
        calls * graph.flops["float8"],
    )


def table_rows(results: Sequence[Any], graphs: Sequence[Any], costs: dict[str, Any]) -> list[Row]:
    """Rows of each use: its graphs, and then what runs eagerly. Of graphs for several shapes, the first counts."""
    rows = []
    for result in results:
        seen = set()
        for graph in graphs:
            if graph.use == result.use and graph.part not in seen:
                seen.add(graph.part)
                rows.append(graph_row(graph, result.micro_steps))
        for name, cost in costs.items():
            use, _, part = name.rpartition(", ")
            if result.use in (name, use):
                part = "eager" if name == result.use else part
                rows.append(Row(result.use, part, cost.launches, cost.flops, 0, cost.bytes_read, cost.bytes_written))
    return rows


def term_rows(results: Sequence[Any], graphs: Sequence[Any]) -> list[dict[str, Any]]:
    """Costs of each use's graphs by term, as often as they run in a step; for TTT at several windows."""
    rows = []
    for result in results:
        seen = set()
        for graph in graphs:
            if graph.use != result.use or graph.part in seen:
                continue
            seen.add(graph.part)
            windows = [(list(result.shapes[0][:3]) if result.shapes else [], graph.terms), *graph.windows]
            for window, terms in windows:
                for term in terms:
                    counts = dataclasses.asdict(term)
                    counts |= {k: v * result.micro_steps for k, v in counts.items() if isinstance(v, int)}
                    rows.append(dict(use=result.use, part=graph.part, window=list(window), **counts))
    return rows


def graph_rows(graphs: Sequence[Any]) -> list[dict[str, Any]]:
    """What compiling costs: nodes, launches and different kernels of each graph."""
    return [
        dict(use=g.use, part=g.part, nodes=g.nodes, kernels=len(g.kernels), launches=sum(g.launches.values()))
        for g in graphs
    ]


def peak_memory(result: Any, graphs: Iterable[Any]) -> int:
    """Bytes at the peak of a step: what stands, gradients, and the larger of both passes."""
    own = [g for g in graphs if g.use == result.use]
    forward = max((g.peak_bytes for g in own if g.part != "backward"), default=0)
    backward = max((g.peak_bytes for g in own if g.part == "backward"), default=0)
    accumulated = result.gradient_bytes if result.micro_steps > 1 else 0
    return result.standing_bytes + accumulated + max(forward, backward)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def report(rows: Sequence[Row], memory: dict[str, dict[str, int]], remark: str) -> str:
    """The table in Markdown. Sums of a use stand under its parts."""
    head = (
        "use",
        "part",
        "launches",
        "TFLOP",
        "of it attention",
        "of it FP8",
        "GB read",
        "GB written",
        "ms at 798 TFLOP/s",
        "at 3 TB/s",
    )
    lines, body = ["# A step on one H100, estimated without one", "", remark, ""], []
    by_use: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        by_use[row.use].append(row)
    for use, parts in by_use.items():
        total = Row(use, "**sum**", *(sum(getattr(r, f.name) for r in parts) for f in dataclasses.fields(Row)[2:]))
        for row in (*parts, total):
            flops = (row.matrix_flops + row.attention_flops, row.attention_flops, row.float8_flops)
            cells = [f"{x / 1e12:.2f}" for x in flops] + [f"{x / 1e9:.1f}" for x in (row.bytes_read, row.bytes_written)]
            body.append((row.use, row.part, row.launches, *cells, *(f"{ms:.1f}" for ms in row.milliseconds)))
    lines += markdown(head, body)
    lines += ["", "Memory in GB: what stands between steps, what forward saves for backward, and the peak.", ""]
    cells = [(use, *(f"{size / 1e9:.2f}" for size in sizes.values())) for use, sizes in memory.items()]
    lines += markdown(("use", "standing", "saved", "peak"), cells)
    return "\n".join(lines) + "\n"
