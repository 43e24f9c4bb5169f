"""Speed and memory of a training step: tokens/s, ms, FLOPs and, on CUDA, peak memory and utilization (MFU).

    python bench/train.py [--repeats 10] [--warmup 3] [--json FILE]
    MICRO_BATCH_TOKENS=131072 COMPILE=0 python bench/train.py
    torchrun --standalone --nproc_per_node=8 bench/train.py

With CUDA the model is PRESET=record, and a step is one micro-batch on each rank. Without CUDA it is the same
architecture at a small shape. On several ranks a step takes as long as on the slowest of them. Knobs come from the
environment, as for train_gpt.py. The data are random tokens, in documents as long as web pages, in a temporary folder.

Two parts are measured of each variant that a training runs: plain, looped (after depth recurrence starts), and what
else the preset has. The whole `Trainer.step` is reading the batch, forward, backward, clipping, Muon, AdamW and EMA.
The other part ends after the backward pass. Parts take turns, so that changes of the machine's speed affect all.

For comparison, PR #2163's log has 1.03 million tokens/s for each H100 before recurrence starts (33% MFU), and 41.7 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

# For CPUs, where a step of `record` would take minutes: its whole architecture, but narrow.
SMALL = dict(
    PRESET="record",
    VOCAB_SIZE="1024",
    MODEL_DIM="128",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    TRAIN_SEQ_LEN="256",
    MICRO_BATCH_TOKENS="4096",
)
# Dense bfloat16 FLOP/s by CUDA's name of the chip, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
FORMULA = (
    "FLOPs/token = 6 * matmul parameters, times the number of passes, head and gates included, "
    "+ 12 * layers run * heads * head width * mean context, within a layer's window"
)
NOT_COUNTED = "not counted: elementwise work, norms, softmax, recomputation in the backward pass, optimizers"


def configuration(environment: dict[str, str], cuda: bool) -> tuple[t.Config, list[str]]:
    """The configuration, and warnings about it. If TRAIN_BATCH_TOKENS is not set, a rank's step is one micro-batch."""
    small = not cuda or environment.get("DEVICE") == "cpu"
    defaults = SMALL if small else dict(PRESET="record")
    if environment.get("PRESET"):
        defaults = {}
    given = {name: value for name, value in environment.items() if value}
    c, explicit, remarks = t.config_from_env({**defaults, **given}, cuda)
    if "train_batch_tokens" not in explicit:
        rows = max(1, c.micro_batch_tokens // c.train_seq_len) * t.rank_variable(environment, "WORLD_SIZE", 1)
        c = dataclasses.replace(c, train_batch_tokens=rows * c.train_seq_len)
    return c, remarks


def write_tokens(folder: Path, c: t.Config, count: int, document_tokens: float) -> None:
    """Writes a training shard of random tokens. Document lengths are lognormal with sigma 1 and this mean."""
    generator = np.random.default_rng(c.seed)
    tokens = generator.integers(min(4, c.vocab_size - 1), c.vocab_size, count, dtype=np.uint16)
    lengths = generator.lognormal(np.log(document_tokens) - 0.5, 1.0, 2 + int(4 * count / document_tokens))
    starts = np.cumsum(np.maximum(lengths.astype(np.int64), 2))
    tokens[starts[starts < count]] = tokens[0] = t.BOS_ID
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, count
    (folder / "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def layer_parameters(model: t.GPT) -> int:
    """Weights in the matrices of a layer."""
    return sum(getattr(model, bank).numel() for bank in t.BANKS) // model.config.num_layers


def matmul_parameters(model: t.GPT, looped: bool) -> int:
    """Weights that multiply a token: those of a layer once per pass, those outside of layers once."""
    layer = layer_parameters(model)
    gates = [sum(cast(t.Block, model.blocks[call.layer]).widths[3:]) for call in model.schedules[looped]]
    once = (model.embedding if model.head is None else model.head).numel()
    once += 0 if model.smear is None or model.smear.channel else model.smear.weight.numel()
    once += sum(part.projection.numel() for part in (model.bigram, model.value_embeds) if part is not None)
    return once + sum(layer + gate * model.config.model_dim for gate in gates)  # gates are as wide as what they gate


def attention_flops(c: t.ModelConfig, keys: float) -> float:
    """Of a token, forward and backward: scores and their product with the values, 2 FLOPs an element each, 3 times."""
    return 12 * c.num_heads * c.head_dim * keys


def flops_per_token(model: t.GPT, variant: t.StepVariant, context: float, nearby: float | None = None) -> float:
    """Of a training step. Layers that do not train need no gradients of their weights.

    context: mean number of keys of a query; nearby: in layers with a window, None: as many.
    """
    frozen = model.config.num_layers - variant.trainable_layers
    saved = 2 * frozen * layer_parameters(model)
    blocks = [cast(t.Block, model.blocks[call.layer]) for call in model.schedules[variant.looped]]
    keys = sum(context if nearby is None or not block.local else nearby for block in blocks)
    return 6 * matmul_parameters(model, variant.looped) - saved + attention_flops(model.config, keys)


class RandomPieces:
    """Replaces Vocabulary for random tokens: half of them begin with another one."""

    def __init__(self, c: t.Config):
        self.size = c.vocab_size

    def longest_prefixes(self) -> np.ndarray:
        pieces = np.arange(self.size)
        return np.where(pieces % 2, pieces // 2, -1)


def mean_context(loader: t.TrainLoader, steps: range, window: int = 0) -> float:
    """Mean number of keys of a query, itself included, in the batches of these steps; with a window, of those in it."""
    total = count = 0
    for step in steps:
        for micro in range(loader.layout.micro_steps):
            starts = loader.batch(step, micro).documents.starts
            keys = t.document_positions(starts) + 1
            keys = keys.clamp(max=window + 1) if window else keys
            total, count = total + keys.sum().item(), count + starts.numel()
    return total / count


class NoUpdate:
    """Replaces the optimizers to measure the forward and backward pass alone."""

    def __init__(self, model: t.GPT):
        self.model = model

    def step(self, beta: float, multiplier: float, trainable_layers: int) -> None:
        self.model.zero_grad(set_to_none=True)


class Bench:
    """The trainer with and without recurrence, and with and without an update."""

    def __init__(self, c: t.Config, run: t.Run):
        model = t.new_model(c)
        self.run, self.trainer = run, t.Trainer(model.to(run.device), t.TrainLoader(c, run), c, run)
        self.parts = {
            "forward+backward": (NoUpdate(model), None),
            "whole step": (self.trainer.optimizers, self.trainer.ema),
        }
        self.first_round_seconds = 0.0
        self.variants = [(variant, part) for variant in t.all_step_variants(c) for part in self.parts]

    def measure(self, step: int, variant: t.StepVariant, part: str) -> tuple[float, int]:
        """Seconds of one step and, on CUDA, its peak memory in bytes (otherwise 0: a process has only one peak)."""
        cuda = self.run.device.type == "cuda"
        self.trainer.optimizers, self.trainer.ema = self.parts[part]
        self.run.synchronize()
        self.run.barrier()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.trainer.step(t.Progress(step, 0.0), *variant)
        self.run.synchronize()
        return time.perf_counter() - start, self.run.peak_memory() if cuda else 0

    def samples(self, warmup: int, repeats: int) -> dict[tuple[t.StepVariant, str], list[tuple[float, int]]]:
        """Results of `measure` for each variant, in turns, without the warmup steps: the largest of all ranks."""
        start, rounds = time.perf_counter(), []
        for step in range(warmup + repeats):
            rounds.append({v: self.measure(step, *v) for v in self.variants})
            if not step:
                self.first_round_seconds = time.perf_counter() - start
        ranks = self.run.gather([[one[v] for one in rounds[warmup:]] for v in self.variants])
        together = [list(zip(*of_all, strict=True)) for of_all in zip(*ranks, strict=True)]  # variant, repeat, rank
        largest = [[(max(s for s, _ in one), max(m for _, m in one)) for one in each] for each in together]
        return dict(zip(self.variants, largest, strict=True))


def row(
    bench: Bench, measured: tuple[t.StepVariant, str], samples: list[tuple[float, int]], contexts: tuple[float, float]
) -> dict[str, Any]:
    """One row of the table, from the samples. contexts: as `flops_per_token` takes them."""
    c, (variant, part) = bench.trainer.config, measured
    seconds, memory = zip(*samples, strict=True)
    rate = c.train_batch_tokens / statistics.median(seconds)
    flops = flops_per_token(bench.trainer.model, variant, *contexts)
    peak = PEAK_FLOPS.get(chip(bench.run)) if c.compute_dtype == "bfloat16" else None
    return dict(
        order=variant.title(c),
        part=part,
        repeats=len(seconds),
        ms_per_step=1000 * statistics.median(seconds),
        ms_lowest=1000 * min(seconds),
        ms_highest=1000 * max(seconds),
        tokens_per_second=rate,
        flops_per_token=flops,
        mfu=rate * flops / (peak * bench.run.world) if peak else None,
        peak_memory_bytes=max(memory) or None,
    )


def chip(run: t.Run) -> str:
    return torch.cuda.get_device_name() if run.device.type == "cuda" else t.hardware(run)


def report(bench: Bench, rows: list[dict[str, Any]], contexts: tuple[float, float]) -> dict[str, Any]:
    """The JSON object: results, hardware, settings, and how FLOPs are counted."""
    c, layout = bench.trainer.config, bench.trainer.layout
    shape = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "hidden_dim", "train_seq_len")
    return dict(
        benchmark="train",
        preset=c.preset,
        chip=chip(bench.run),
        torch=torch.__version__,
        dtype=c.compute_dtype,
        cuda=torch.version.cuda if c.device == "cuda" else None,
        threads=torch.get_num_threads(),
        ranks=bench.run.world,
        backend=dict(attention=t.choose_attention(c)[0], compile=c.compile == "1", triton=c.triton_kernels == "1"),
        shape={name: getattr(c, name) for name in shape},
        parameters=t.parameter_count(c),
        layers_run=dict(plain=t.execution_order(c, False), looped=t.execution_order(c, True)),
        tokens_per_step=c.train_batch_tokens,
        first_round_seconds=bench.first_round_seconds,  # with what is compiled
        micro_steps=layout.micro_steps,
        micro_sequences=layout.micro_sequences,
        mean_context=contexts[0],
        mean_context_in_windows=contexts[1],
        formula=FORMULA,
        not_counted=NOT_COUNTED,
        peak_flops=PEAK_FLOPS.get(chip(bench.run)),
        process_peak_memory_bytes=bench.run.peak_memory(),
        rows=rows,
    )


def table(r: dict[str, Any]) -> str:
    """The report as text."""
    backend = r["backend"]
    lines = [
        f"{r['preset']}  {r['parameters']} parameters  {r['chip']}  torch {r['torch']}  {r['dtype']}  "
        f"attention {backend['attention']}  compile {backend['compile']:d}  triton {backend['triton']:d}",
        f"{r['tokens_per_step']} tokens a step in {r['micro_steps']} x {r['micro_sequences']} sequences of "
        f"{r['shape']['train_seq_len']}; mean context {r['mean_context']:.1f}",
        f"{'order':16s} {'part':17s} {'ms/step':>9s} {'lowest..highest':>18s} {'tokens/s':>10s} "
        f"{'MFLOPs/token':>13s} {'MFU':>6s} {'peak MiB':>9s}",
    ]
    for x in r["rows"]:
        mfu = "-" if x["mfu"] is None else f"{x['mfu']:.1%}"
        memory = "-" if x["peak_memory_bytes"] is None else f"{x['peak_memory_bytes'] / 2**20:.0f}"
        spread = f"{x['ms_lowest']:.1f}..{x['ms_highest']:.1f}"
        lines.append(
            f"{x['order']:16s} {x['part']:17s} {x['ms_per_step']:9.1f} {spread:>18s} "
            f"{x['tokens_per_second']:10.0f} {x['flops_per_token'] / 1e6:13.2f} {mfu:>6s} {memory:>9s}"
        )
    lines.append(f"the first round, in which all is compiled, took {r['first_round_seconds']:.1f} s")
    if r["ranks"] > 1:
        lines.append(f"{r['ranks']} ranks: tokens are those of all, memory and MFU those of one")
    lines += [f"median of {r['rows'][0]['repeats']} each; {r['formula']}", r["not_counted"]]
    if r["cuda"] is None:
        lines.append(f"the process's peak memory is {r['process_peak_memory_bytes'] / 2**20:.0f} MiB")
    if r["rows"][0]["mfu"] is None:
        lines.append(f"MFU is not given: the peak FLOP/s of this chip in {r['dtype']} is not in PEAK_FLOPS")
    return "\n".join(lines)


def measured(c: t.Config, run: t.Run, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the data, the same on every rank, runs the steps and returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), c, 16 * c.train_batch_tokens + 1, options.document_tokens)
        c = dataclasses.replace(c, data_path=folder)
        with mock.patch.object(t, "Vocabulary", RandomPieces):
            bench = Bench(c, run)
            samples = bench.samples(options.warmup, options.repeats)
            loader, steps = bench.trainer.loader, range(options.warmup, options.warmup + options.repeats)
            contexts = (mean_context(loader, steps), mean_context(loader, steps, c.window_attn_size))
    return report(bench, [row(bench, v, samples[v], contexts) for v in bench.variants], contexts)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. A wrong value ends the process with the usage and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10, help="measured steps of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="unmeasured steps of each variant before those")
    parser.add_argument("--document-tokens", type=float, default=800.0, help="mean length of the documents")
    parser.add_argument("--json", type=Path, help="file for the JSON object, which is also printed as the last line")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.warmup < 0 or not 2 <= options.document_tokens < 1e9:
        parser.error("--repeats must be at least 1, --warmup at least 0, --document-tokens from 2 to 1e9")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    return options


def main(arguments: list[str], environment: dict[str, str]) -> int:
    options = parse(arguments)
    try:
        c, remarks = configuration(environment, torch.cuda.is_available())
        for warning in (remark for remark in remarks if remark.startswith("warning")):
            print(warning, file=sys.stderr)
        run = t.start_run(c, environment)
        with run.guard():
            result = measured(c, run, options)
            run.leave()
        if run.is_main:
            print(table(result))
            print(json.dumps(result))
            if options.json:
                t.write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    except (t.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except t.RankError:
        return t.RANK_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
