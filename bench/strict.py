"""Gain of test-time training in stream order, which is strictly causal, against length order, on trained artifacts.

    python bench/strict.py RUN... [--data data/builtin_sp4096] [--first N] [--documents N] [--set NAME=VALUE ...]
                           [--json FILE]

Each RUN is a folder with model.pgolf and config.json, as MODE=train leaves it. Runs of one preset and shape are seeds
of one model. Each artifact scores the same windows of the same validation documents three times:

- without learning
- in length order, with 3,000 documents and 4 phases, as in PR #2163
- in stream order, with the defaults of train_gpt.py

The built-in text has few documents, so all rows take higher learning rates, smaller steps and a lower LoRA rank than
the presets (SMALL). --set overrides them, and an empty value restores the preset's. The table has bits per byte, the
gain over no learning, and targets/s. A mean has its 95% confidence interval by Student's t, over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402

import intervals  # noqa: E402
import train_gpt as t  # noqa: E402
from streams import write_shard  # noqa: E402

SMALL = dict(
    TTT_BATCH_SIZE="32",
    TTT_LORA_RANK="16",
    TTT_LORA_ALPHA="18",
    TTT_LORA_LR="1e-3",
    GLOBAL_TTT_CHUNK_TOKENS="4096",
    GLOBAL_TTT_LR="0.01",
)
ORDERS = {
    "length": dict(TTT_ORDER="length", PHASED_TTT_PREFIX_DOCS="3000", PHASED_TTT_NUM_PHASES="4"),
    "stream": dict(TTT_ORDER="stream"),
}


def write_part(data: Path, folder: Path, first: int, documents: int) -> np.ndarray:
    """Writes a validation shard of some documents of `data`. Returns their lengths in tokens.

    Errors: ValueError if there are not so many.
    """
    shards = [np.fromfile(path, "<u2")[512:] for path in sorted(data.glob("fineweb_val_[0-9]*.bin"))]
    tokens = np.concatenate(shards) if shards else np.empty(0, "<u2")
    begins = np.append(np.flatnonzero(tokens == t.BOS_ID), len(tokens))
    if len(begins) <= first + documents:
        raise ValueError(f"{data} has {len(begins) - 1} validation documents, not {first + documents}")
    bounds = begins[first : first + documents + 1]
    part = tokens[bounds[0] : bounds[-1] + 1]  # with the next BOS, which is the last document's last target
    write_shard(folder / "fineweb_val_000000.bin", part)
    return np.diff(bounds)


def score(run_folder: Path, environment: dict[str, str], learn: bool = True) -> dict[str, Any]:
    """Scores a run's artifact on a validation folder: bits per byte, phases, targets/s."""
    c, explicit, _ = t.config_from_env(environment, False)
    run = t.start_run(c, {})
    model, c = t.load_artifact((run_folder / "model.pgolf").read_bytes(), c, explicit, run.device)
    evaluator = t.Evaluator(c, run)
    method = cast(type[t.PhasedTTT], t.ttt_method(c))
    plain = t.score_plain(evaluator, model) if learn and c.ttt_plain_weight else None
    begin = time.perf_counter()
    phased = method(evaluator, model, adapt=learn)
    result = phased()
    if plain is not None:
        result, _ = t.mix_with_plain(evaluator, phased.ledger, plain, result)
    seconds = time.perf_counter() - begin
    return dict(bpb=result.bpb, targets_per_second=result.tokens / seconds, phase_ends=phased.phase_ends)


def model_of(folder: Path) -> tuple[str, int]:
    """A run's preset and shape, as tables name them, and its seed."""
    trained = json.loads((folder / "config.json").read_text())
    return f"{trained['preset']}, {trained['num_layers']} layers of {trained['model_dim']}", trained["seed"]


def environment_of(folder: Path, part: Path, data: Path) -> dict[str, str]:
    """The settings with which a run's artifact scores the documents in `part` by test-time training."""
    return dict(
        PRESET=json.loads((folder / "config.json").read_text())["preset"],
        MODE="eval",
        TTT_MODE="phased",
        DEVICE="cpu",
        DATA_PATH=str(part),
        TOKENIZER_PATH=str(data / "tokenizer.model"),
        EVAL_BUDGET_SECONDS="0",
    )


def measure(folder: Path, part: Path, data: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The three rows of a run."""
    common = settings | environment_of(folder, part, data)
    name, seed = model_of(folder)
    found: dict[str, Any] = dict(model=name, seed=seed)
    found["off"] = score(folder, common | ORDERS["stream"], learn=False)
    for order, changes in ORDERS.items():
        found[order] = score(folder, common | changes)
        print(f"{name}, seed {seed}: {order} {found['off']['bpb'] - found[order]['bpb']:.4f}", flush=True)
    return found


def gain(row: dict[str, Any], order: str) -> float:
    """Bits per byte that learning in an order gains over no learning."""
    return row["off"]["bpb"] - row[order]["bpb"]


def mean_and_interval(values: list[float]) -> str:
    """Mean of the seeds with the half-width of its confidence interval, where there are 2 to 6."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {intervals.half_width(values):.4f}" if 2 <= len(values) <= 6 else mean


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with a mean for each model."""
    lines = [
        "| model | seed | learning off | gain, length order | gain, stream order | difference | targets/s, length | "
        "targets/s, stream |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for row in own:
            length, stream = gain(row, "length"), gain(row, "stream")
            speeds = " | ".join(f"{row[order]['targets_per_second']:.0f}" for order in ORDERS)
            lines.append(
                f"| {model} | {row['seed']} | {row['off']['bpb']:.4f} | {length:.4f} | {stream:.4f} | "
                f"{stream - length:+.4f} | {speeds} |"
            )
        length, stream = ([gain(row, order) for row in own] for order in ORDERS)
        difference = [b - a for a, b in zip(length, stream, strict=True)]
        means = " | ".join(map(mean_and_interval, ([row["off"]["bpb"] for row in own], length, stream, difference)))
        lines.append(f"| {model} | mean | {means} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with model.pgolf and config.json")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "builtin_sp4096", help="folder of the validation set"
    )
    parser.add_argument("--first", type=int, default=0, help="number of validation documents to leave out at the start")
    parser.add_argument("--documents", type=int, default=64, help="number of validation documents to score")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all rows")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    settings = SMALL | dict(pair.split("=", 1) for pair in options.set)
    rows = []
    with tempfile.TemporaryDirectory() as part:
        lengths = write_part(options.data, Path(part), options.first, options.documents)
        print(f"{len(lengths)} documents, {lengths.sum()} tokens, the longest {lengths.max()}", flush=True)
        for folder in options.runs:
            rows.append(measure(folder, Path(part), options.data, settings))
            if options.json:  # after each run, so that a stopped comparison keeps what it has
                result = dict(
                    rows=rows,
                    table=table(rows).splitlines(),
                    settings=settings,
                    first=options.first,
                    documents=len(lengths),
                    tokens=int(lengths.sum()),
                    cpu=t.cpu_info("model name"),
                    threads=t.torch.get_num_threads(),
                    versions=t.versions(),
                )
                t.write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
