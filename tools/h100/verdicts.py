"""What the checks say: one line for each that fails."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Kernels that may spill: a pattern of their names, the most bytes a thread, and why. Local memory is cached, so some
# bytes cost little; hundreds in a kernel that runs in every layer do not.
KNOWN_SPILLS: list[tuple[str, int, str]] = [
    # 720 bytes in `record`, 776 with signed bigrams.
    ("_fused_rms_norm_backward_", 776, "Inductor fuses the backward of norm, skip blend and residual mix, with sums"),
]
RESERVED = 8  # bytes of a thread's local memory that ptxas takes at times where nothing spills
# Waits that must be: a pattern of their lines, and why.
KNOWN_WAITS: list[tuple[str, str]] = []


def of_results(results: Sequence[Any]) -> Iterator[str]:
    """Errors, among them graph breaks; recompilations; gradients."""
    for r in results:
        if r.error:
            yield f"{r.use}: does not run: {r.error}"
        elif r.graphs > r.allowed:
            yield f"{r.use}: {r.graphs} graphs were compiled where {r.allowed} should serve: something recompiles"
        elif r.allowed and not r.graphs:
            yield f"{r.use}: nothing was compiled"
        for gradient in r.gradients:
            yield f"{r.use}: gradient not contiguous float32: {gradient}"


def of_graphs(graphs: Sequence[Any]) -> Iterator[str]:
    """What graphs hold that they should not, and what Inductor could not compile."""
    for g in graphs:
        if g.error:
            yield f"{g.use}: Inductor fails on the {g.part} graph: {g.error}"
        for finding in g.findings:
            yield f"{g.use}: in the {g.part} graph: {finding}"


def of_kernels(graphs: Sequence[Any], known: Sequence[tuple[str, int, str]]) -> Iterator[str]:
    """Kernels without a cubin, and kernels that spill more than is known."""
    for g in graphs:
        for kernel in g.kernels:
            if kernel.error:
                yield f"{g.use}: no cubin for {kernel.name} ({g.part}): {kernel.error}"
            allowed = max((most for pattern, most, _ in known if re.search(pattern, kernel.name)), default=RESERVED)
            if kernel.stack > allowed:
                spilled = f"{kernel.stack} bytes a thread spilled, {allowed} are known"
                yield f"{g.use}: {kernel.name} ({g.part}): {spilled} ({kernel.registers} registers)"


def of_waits(waits: Sequence[Any], known: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Places inside a step where the host waits for the device."""
    counted = collections.Counter((w.part.split(", ")[0], str(w)) for w in waits)
    for (use, wait), times in counted.items():
        if not any(re.search(pattern, wait) for pattern, _ in known):
            yield f"{use}: the host waits for the device: {wait} ({times} times)"


def failures(session: Any) -> list[str]:
    """All checks that fail, a line each."""
    graphs = session.recorder.graphs
    lines = [
        *of_results(session.results),
        *of_graphs(graphs),
        *of_kernels(graphs, KNOWN_SPILLS),
        *of_waits(session.costs.waits, KNOWN_WAITS),
    ]
    return list(dict.fromkeys(lines))
