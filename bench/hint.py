"""Hints from repetition: what they gain on trained artifacts, and the seconds that they take for a million targets.

    python bench/hint.py RUN... [--data DIR] [--text FILE ...] [--set NAME=VALUE ...] [--out FILE]

Each RUN is a folder with model.pgolf, config.json and summary.json, as MODE=train leaves it. Runs of rising quality
show whether the gain survives. Each artifact scores the validation set once, with sliding windows and without
learning. All variants take their probabilities from that pass:

- the defaults of train_gpt.py, with --set
- shorter and longer shortest matches, other chunks
- hints from the document's own prefix alone
- the public fixed form: matches of 15 tokens, w = 2.625, no learning

The seconds are those of finding the hints and of the scores with them, on --text: shards of real text, by default the
training shards of --data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402

import train_gpt as t  # noqa: E402

DEFAULT = "defaults"
OWN = "the document's own prefix alone"
FIXED = "fixed: matches of 15, w = 2.625"
PUBLIC_WEIGHT = 2.625
VARIANTS: dict[str, dict[str, int]] = {
    DEFAULT: {},
    "HINT_MIN_MATCH=4": dict(HINT_MIN_MATCH=4),
    "HINT_MIN_MATCH=5": dict(HINT_MIN_MATCH=5),
    "HINT_MIN_MATCH=12": dict(HINT_MIN_MATCH=12),
    "HINT_MIN_MATCH=16": dict(HINT_MIN_MATCH=16),
    "HINT_CHUNK_TOKENS=2048": dict(HINT_CHUNK_TOKENS=2048),
    "HINT_CHUNK_TOKENS=32768": dict(HINT_CHUNK_TOKENS=32768),
    OWN: {},
    FIXED: dict(HINT_MIN_MATCH=15, HINT_MAX_MATCH=15),
}


def config_of(values: dict[str, Any]) -> t.Config:
    """Settings with hints."""
    return t.config_from_env({name: str(value) for name, value in values.items()} | dict(HINT_ENABLED="1"), False)[0]


def hints_of(name: str, tokens: np.ndarray, documents: np.ndarray, config: t.Config) -> t.Hints:
    """The hints of a variant. In a stream of one chunk those of other documents are unknown."""
    if name == OWN:
        config = t.dataclasses.replace(config, hint_chunk_tokens=len(tokens))
    return t.find_hints(tokens, documents, config)


def fixed_scores(nll: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, hints: t.Hints) -> np.ndarray:
    """Scores [targets] with one weight for all hints."""
    there, right = hints.kinds > 0, hints.tokens == tokens[1:]
    nll = nll.astype(np.float64)
    raised = nll + np.log1p(np.exp(log_q.astype(np.float64)) * math.expm1(PUBLIC_WEIGHT)) - PUBLIC_WEIGHT * right
    return np.where(there, raised, nll)


def probabilities(model: t.GPT, evaluator: t.Evaluator, found: dict[str, t.Hints]) -> tuple[np.ndarray, dict]:
    """NLL [targets], and for each variant its hints' log-probabilities [targets], from one pass over the stream."""
    count = len(evaluator.tokens) - 1
    nll = np.zeros(count, np.float32)
    logs = {name: np.zeros(count, np.float32) for name in found}
    for sequences in evaluator.batches(evaluator.sequences):
        batch, scored = evaluator.batch(sequences, evaluator.windows)
        places = scored >= 0
        with t.torch.no_grad():
            p = model.log_probabilities(batch.ids, batch.documents, looped=evaluator.config.loops)
        rows = p.numpy()[places]
        own, positions = np.arange(len(rows)), scored[places]
        nll[positions] = -rows[own, evaluator.tokens[positions + 1]]
        for name, hints in found.items():
            logs[name][positions] = rows[own, hints.tokens[positions]]
    return nll, logs


def measure(folder: Path, data: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The bits per byte of a run's artifact, without hints and with each variant."""
    trained = json.loads((folder / "config.json").read_text())
    common = dict(PRESET=trained["preset"], MODE="eval", DATA_PATH=data, TTT_MODE="none", DEVICE="cpu") | settings
    base, explicit, _ = t.config_from_env({k: str(v) for k, v in common.items()}, False)
    run = t.start_run(base, {})
    model, base = t.load_artifact((folder / "model.pgolf").read_bytes(), base, explicit, run.device)
    evaluator = t.Evaluator(base, run)
    configs = {name: config_of(common | more) for name, more in VARIANTS.items()}
    found = {name: hints_of(name, evaluator.tokens, evaluator.documents, c) for name, c in configs.items()}
    nll, logs = probabilities(model, evaluator, found)
    to_bits = 1 / math.log(2) / evaluator.bytes
    row: dict[str, Any] = dict(name=folder.name, bpb=float(nll.sum(dtype=np.float64)) * to_bits, variants={})
    summary = folder / "summary.json"
    row["steps"] = json.loads(summary.read_text()).get("steps") if summary.is_file() else None
    for name, hints in found.items():
        if name == FIXED:
            scores = fixed_scores(nll, logs[name], evaluator.tokens, hints)
        else:
            scores = t.with_hints(nll, logs[name], evaluator.tokens, hints, configs[name])
        there = hints.kinds > 0
        row["variants"][name] = dict(
            bpb=float(scores.sum(dtype=np.float64)) * to_bits,
            share=float(there.mean()),
            right=float((hints.tokens == evaluator.tokens[1:])[there].mean()) if there.any() else 0.0,
        )
    return row


def seconds(files: list[Path], settings: dict[str, str], most: int) -> dict[str, float]:
    """Seconds for a million targets: finding hints, and the scores with them, for probabilities at random."""
    tokens = np.concatenate([np.fromfile(file, "<u2")[512:] for file in files])[:most]
    tokens = tokens[int((tokens == t.BOS_ID).argmax()) :]
    config, documents = config_of(settings), t.document_offsets(tokens)
    draw = np.random.default_rng(0)
    nll, log_q = (draw.exponential(2.0, len(tokens) - 1).astype(np.float32) for _ in range(2))
    begin, cpu = time.perf_counter(), time.process_time()
    threads = t.available_cores()
    hints = t.find_hints(tokens, documents, config, threads)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    t.with_hints(nll, -log_q, tokens, hints, config)
    millions = (len(tokens) - 1) / 1e6
    return dict(
        targets=len(tokens) - 1,
        threads=threads,
        share=float((hints.kinds > 0).mean()),
        find=(middle - begin) / millions,
        score=(time.perf_counter() - middle) / millions,
        find_cpu=(cpu_middle - cpu) / millions,
        score_cpu=(time.process_time() - cpu_middle) / millions,
    )


def report(rows: list[dict[str, Any]], speed: dict[str, float], settings: dict[str, str]) -> str:
    """The results as Markdown."""
    names = [row["name"] for row in rows]
    first = rows[0]["variants"] if rows else {}
    lines = [
        "# Hints from repetition: gain and seconds",
        "",
        "Made by `bench/hint.py`; docs/evaluation.md says what a hint is. Bits per byte of each run's artifact with "
        "sliding windows, and what hints gain.",
        "",
        "| | " + " | ".join(names) + " | targets with a hint | hints that are right |",
        "|---" * (len(names) + 3) + "|",
        "| steps | " + " | ".join(str(row["steps"]) for row in rows) + " | | |",
        "| without hints | " + " | ".join(f"{row['bpb']:.4f}" for row in rows) + " | | |",
    ]
    for name, one in first.items():
        gains = " | ".join(f"{row['bpb'] - row['variants'][name]['bpb']:.4f}" for row in rows)
        lines.append(f"| {name} | {gains} | {one['share']:.1%} | {one['right']:.1%} |")
    lines += [
        "",
        f"Settings: {' '.join(f'{k}={v}' for k, v in settings.items()) or 'the defaults of train_gpt.py'}.",
        "",
        f"Seconds for a million targets, of {speed['targets']} targets of which {speed['share']:.1%} have a hint: "
        f"{speed['find']:.2f} to find hints on {speed['threads']} threads ({speed['find_cpu']:.2f} of processor time), "
        f"{speed['score']:.2f} for the scores on one ({speed['score_cpu']:.2f}). {t.cpu_info('model name')}, numpy "
        f"{np.__version__}.",
        "",
        "What these figures do not say: the built-in text is documentation, in which far more is repeated than in web "
        "text. The gain there does not carry over; its trend over the runs may.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder with model.pgolf and config.json")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_sp4096", help="folder with the shards")
    parser.add_argument("--text", nargs="*", type=Path, metavar="FILE", help="shards to measure the seconds on")
    parser.add_argument("--most", type=int, default=10_000_000, help="tokens of --text that are read")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as Markdown")
    options = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in options.set)
    rows = []
    for folder in options.runs:
        rows.append(measure(folder, options.data, settings))
        best = rows[-1]["variants"][DEFAULT]["bpb"]
        print(f"{folder.name}: {rows[-1]['bpb']:.4f}, with hints {best:.4f}", flush=True)
    files = options.text or sorted(options.data.glob("fineweb_train_[0-9]*.bin"))
    text = report(rows, seconds(files, settings, options.most), settings)
    print(text)
    if options.out:
        t.write_atomic(options.out, text.encode())


if __name__ == "__main__":
    main()
