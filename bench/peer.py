"""Preset `frontier` against the peer's script, both in small: whole runs at equal steps, equal seconds and equal bytes.

    python bench/peer.py [--sizes 0.7M 2M] [--seeds 42 0 314] [--report bench/results/peer.md]

A run trains, quantizes, packs, reads back and scores with test-time training, on sizes and text of the laboratory
(bench/lab_ideas.py). The peer is PRESET=record ORIGINAL=1, which computes what the script of PR #2163 computes; that
script itself is slower on CPUs. It reads the text as one stream, which costs batches as small as these far more than
large ones. So a second peer differs in DATA_ORDER=rows alone. `frontier` gets the bytes of the smaller of both
artifacts. Learning rates, warmdown, EMA and calibration batches are the same for all, and so are the rates and sizes of
test-time training that bench/strict.py takes for a short text.

Seconds are CPU seconds of training steps on one thread, measured in turns. Where `frontier` takes others than the peer,
it runs once more with as many steps as fit the peer's seconds. Calibration is not among them. A finished run is not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch  # noqa: E402

import demo  # noqa: E402
import lab  # noqa: E402
import lab_ideas as ideas  # noqa: E402
import strict  # noqa: E402
import train_gpt as t  # noqa: E402
from demo import cell  # noqa: E402

PEERS = PEER, IN_ROWS = "peer", "peer, rows"
OURS, IN_TIME = "frontier", "frontier, equal seconds"
ORIGINAL = dict(PRESET="record", ORIGINAL=1, **strict.ORDERS["length"])
# Of the rate that all others get for a short text, `frontier` takes the same share as of the peer's at full size.
AT_FULL_SIZE = t.PRESETS["frontier"]
FRONTIER = dict(
    PRESET="frontier",
    TTT_LORA_LR=float(strict.SMALL["TTT_LORA_LR"]) * AT_FULL_SIZE["ttt_lora_lr"] / t.Config.ttt_lora_lr,
    TTT_LORAPLUS_LR_RATIO=AT_FULL_SIZE["ttt_loraplus_lr_ratio"],
)
SYSTEMS: dict[str, dict[str, Any]] = {
    PEER: ORIGINAL,
    IN_ROWS: dict(ORIGINAL, DATA_ORDER="rows"),
    OURS: FRONTIER,
    IN_TIME: FRONTIER,
}
OF_THE_PRESETS = ("PRESET", "TARGET_BYTES", "TTT_MODE")  # what BASE switches off for the laboratory
COMMON = {name: value for name, value in ideas.BASE.items() if name not in OF_THE_PRESETS}
COMMON |= strict.SMALL | dict(GPTQ_CALIBRATION_BATCHES=16)
FIGURES = {
    "val_bpb": "val_bpb",
    "learned": "val_bpb_ttt",
    "quantized": "val_bpb_quantized",
    "before": "val_bpb_pre_quant",
    "bytes": "artifact_bytes",
    "steps": "steps",
}
POINTS, ROUNDS = 8, 5  # steps that are measured in a round


def environment(system: str, size: ideas.Size, seed: int, options: argparse.Namespace) -> dict[str, str]:
    """The settings of a system's run."""
    knobs = COMMON | size.knobs() | SYSTEMS[system] | dict(SEED=seed, DATA_PATH=options.data)
    return {name: str(value) for name, value in knobs.items()}


def run_of(system: str, size: ideas.Size, seed: int, options: argparse.Namespace, **more: int) -> dict[str, float]:
    """The figures of one run, after running it if need be. Errors: RuntimeError."""
    folder = options.folder / f"{system}-{size.name}-{seed}".replace(" ", "-").replace(",", "")
    variables = environment(system, size, seed, options) | {name: str(value) for name, value in more.items()}
    label = f"{system}, {size.name}, seed {seed}"
    summary = demo.summary_of(label, variables, folder)
    found = {name: summary[key] for name, key in FIGURES.items()}
    print(f"{label}: {found}", flush=True)
    return found


def ratio_of(size: ideas.Size, seed: int, options: argparse.Namespace) -> list[float]:
    """CPU seconds of a step of `frontier` over one of the peer's, in each of several rounds."""
    file = options.folder / f"seconds-{size.name}.json"
    if not file.is_file():
        pair = [environment(system, size, seed, options) for system in (IN_ROWS, OURS)]
        file.parent.mkdir(parents=True, exist_ok=True)
        t.write_atomic(file, json.dumps(lab.measure(pair[0], pair[1], POINTS, ROUNDS)["ratios"]))
    return json.loads(file.read_text())


def measure(size: ideas.Size, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of a size: figures by system and seed, and the ratios of seconds."""
    ratios = ratio_of(size, options.seeds[0], options)
    steps = lab.equal_steps(size.steps, lab.time_ratio(ratios))
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for seed in options.seeds:
        for system in PEERS:
            found[system].append(run_of(system, size, seed, options))
        limit = int(min(found[system][-1]["bytes"] for system in PEERS))
        found[OURS].append(run_of(OURS, size, seed, options, TARGET_BYTES=limit))
        same = steps == size.steps
        found[IN_TIME].append(
            found[OURS][-1] if same else run_of(IN_TIME, size, seed, options, TARGET_BYTES=limit, ITERATIONS=steps)
        )
    return dict(size=size.name, ratios=ratios, runs=found)


def size_lines(found: dict[str, Any]) -> list[str]:
    """The rows of a size: figures, and the score less each peer's with the same seed, in standard errors as well."""
    lines = []
    for system, runs in found["runs"].items():
        column = {name: [run[name] for run in runs] for name in FIGURES}
        less = []
        for peer in PEERS:
            change = [run["val_bpb"] - other["val_bpb"] for run, other in zip(runs, found["runs"][peer], strict=True)]
            error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
            errors = f", {abs(statistics.mean(change)) / error:.0f} standard errors" if error else ""
            less.append("" if system == peer else cell(change, 4, "+") + errors)
        cells = [cell(column[name], 4) for name in ("val_bpb", "learned", "quantized", "before")]
        cells += [cell(column[name], 0) for name in ("bytes", "steps")]
        lines.append(f"| {found['size']} | {system} | {' | '.join((*cells, *less))} |")
    return lines


def report(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The page."""
    machine = t.hardware(t.Run(0, 1, 1, torch.device("cpu")))
    lines = [
        "# `frontier` against the peer, both in small",
        "",
        "Made by `bench/peer.py`, whose first lines say what is compared. "
        f"Seeds {', '.join(map(str, options.seeds))}; "
        "± is the 95% interval over them, by Student's t. *Before* is before quantization, *quantized* is read back "
        "from the artifact, *learned* is after test-time training, and val_bpb after hints, which the peer does not "
        "have. "
        f"{machine}, torch {torch.__version__}.",
        "",
        "The text is the built-in corpus, which repeats itself far more than web text: hints gain from that.",
        "",
        "| size | system | val_bpb | learned | quantized | before | bytes | steps | val_bpb less the peer's | "
        "less that in rows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for of_size in found:
        lines += size_lines(of_size)
    lines += ["", "CPU seconds of a training step over the peer's, median (least to most):", ""]
    for of_size in found:
        ratios = of_size["ratios"]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(f"- {of_size['size']}: {statistics.median(ratios):.3f} ({spread})")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    sizes = {size.name: size for size in ideas.SIZES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(sizes), default=["0.7M", "2M"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 0, 314])
    parser.add_argument("--data", type=Path, default=ROOT / "data/builtin_lab_1024", help="with 1,024 pieces")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs/bench-peer")
    parser.add_argument("--report", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    try:
        found = [measure(sizes[name], options) for name in options.sizes]
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = report(found, options)
    if options.report:
        t.write_atomic(options.report, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
