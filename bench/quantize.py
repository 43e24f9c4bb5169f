"""What each quantization method loses at equal bytes, on models of several sizes and trainings.

    python bench/quantize.py [--models demo,long,small,large] [--methods before,trellis16] [--seeds 3] [--json FILE]
    python bench/quantize.py --untrained [--json FILE]

It trains the models that are not in the folder yet, minutes each on two cores, on the built-in text. For each model and
each calibration seed, the reference is a public peer's pipeline (PR #2163 of openai/parameter-golf): GPTQ on a uniform
grid with its clip ranges, its low-rank corrections, and its arrangement for lrzip. Where there is no lrzip, `pergroup`
packs its integers, which makes it smaller than it is. Every other method gets as many bytes as the peer took.

Lost is what quantization adds to bits per byte on validation text, in float32. It is noisy; the divergence
KL(float model || quantized model), in the same unit, is not. Predicted is half the sum of rows[r] E_r H E_r^T over all
matrices, from calibration alone. Intervals are 95%, over calibration seeds.

With --untrained nothing is trained, and only times are measured: random weights and Hessians of PRESET=record, or as
knobs in the environment say, take the way of a run from weights to an artifact and back.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import intervals  # noqa: E402
import pack as coders  # noqa: E402
import train_gpt as t  # noqa: E402

DEMO = dict(PRESET="demo", DATA_PATH="data/builtin_sp4096", MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=0)
SMALL_RECORD = dict(
    DEMO,
    PRESET="record",
    TTT_MODE="none",
    TRAIN_SEQ_LEN=256,
    MICRO_BATCH_TOKENS=4096,
    WARMUP_STEPS=1,
    VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=4096,
    EVAL_STRIDE=128,
    EMA_DECAY=0.99,
    MUON_MOMENTUM_WARMUP_STEPS=100,
    ITERATIONS=320,
)
MODELS = {
    "demo": dict(DEMO, ITERATIONS=280),
    "long": dict(DEMO, ITERATIONS=1120),
    "small": dict(
        SMALL_RECORD,
        DATA_PATH="data/builtin_sp1024",
        VOCAB_SIZE=1024,
        NUM_LAYERS=6,
        MODEL_DIM=192,
        NUM_HEADS=3,
        NUM_KV_HEADS=3,
        TRAIN_BATCH_TOKENS=4096,
        PARALLEL_START_LAYER=4,
        LOOP_START=2,
        LOOP_END=3,
        XSA_LAST_N=6,
    ),
    "large": dict(
        SMALL_RECORD,
        VOCAB_SIZE=4096,
        ITERATIONS=1280,
        NUM_LAYERS=8,
        MODEL_DIM=256,
        NUM_HEADS=4,
        NUM_KV_HEADS=2,
        TRAIN_BATCH_TOKENS=2048,
        PARALLEL_START_LAYER=6,
        LOOP_START=3,
        LOOP_END=5,
        XSA_LAST_N=8,
    ),
}
CALIBRATION_TOKENS = 1 << 17  # for each weight, a fifth to a half of what `record` reads at full size
PEER = dict(
    QUANTIZER="uniform",
    EMBED_BITS=7,
    COLUMN_STEPS=0,
    SCALE_GRID=0,
    TARGET_BYTES=0,
    LQER_ENABLED=1,
    LQER_SELECT="norm",
    LQER_ASYM_ENABLED="1",
)
BLIND = {name.upper(): int(value) for name, value in t.WITHOUT_GRADIENTS.items()}
BLIND |= dict(TARGET_BYTES=1, TUNE_STEPS=0, SCALE_GRID=16, FP16_ELEMENTS=65_536)
BEFORE = dict(BLIND, QUANTIZER="trellis", TRELLIS_STATES=16, COLUMN_STEPS=0.75, LQER_ENABLED=1)
OF_RECORD = (*t.WITHOUT_GRADIENTS, "column_steps", "gptq_damp", "scale_grid", "fp16_elements")
SENSITIVE = dict(BEFORE, LQER_ENABLED=0) | {name.upper(): t.PRESETS["record"][name] for name in OF_RECORD}
METHODS: dict[str, dict[str, Any]] = {
    "before": BEFORE,  # steps by the weights' spread alone
    "uniform": dict(SENSITIVE, QUANTIZER="uniform"),
    "rows": dict(SENSITIVE, GPTQ_ROW_GROUPS=0),  # errors of rows are independent
    "trellis8": dict(SENSITIVE, TRELLIS_STATES=8),
    "trellis16": SENSITIVE,
    "tuned": dict(SENSITIVE, TUNE_STEPS=60),
}


def knobs_of(environment: dict[str, Any]) -> t.Config:
    """The Config of knobs as in an environment; relative data paths are those of the project."""
    values = {name: str(value) for name, value in environment.items()}
    values["DATA_PATH"] = str(ROOT / values["DATA_PATH"])
    return t.config_from_env(values, torch.cuda.is_available())[0]


class Bench(NamedTuple):
    """A trained model and what is needed to quantize and to measure it."""

    trainer: t.Trainer
    step: int  # at which training ended
    weights: dict[str, Tensor]
    environment: dict[str, Any]


def training_settings(config: t.Config) -> dict[str, Any]:
    """What decides the trained weights, but for the place of the data: of JSON's types."""
    stages = list(t.Observed)
    training = stages[stages.index(t.Observed.PARAMETERS) : stages.index(t.Observed.BYTES)]
    fields = [f for f in dataclasses.fields(config) if f.metadata["observed"] in training and f.name != "data_path"]
    return json.loads(json.dumps({f.name.upper(): getattr(config, f.name) for f in fields}))


def check_kept(done: Path, kept: dict[str, Any], config: t.Config) -> None:
    """Ends the program where a kept model was trained with other settings: a preset may have changed since."""
    for name, value in training_settings(config).items():
        was = kept.get("settings", {}).get(name, "unknown")
        if was != value:
            print(
                f"error: {done}: trained with {name}={was}, not {value}: remove it, or give another --folder",
                file=sys.stderr,
            )
            sys.exit(2)


def open_model(name: str, folder: Path, artifacts: str) -> Bench:
    """A model from the folder, or trained and saved there. It computes in float32."""
    environment = dict(MODELS[name], COMPUTE_DTYPE="float32")
    file, done = folder / f"{name}.npz", folder / f"{name}.json"
    config = knobs_of(environment)
    fast = knobs_of(MODELS[name])
    run = t.start_run(config, dict(ARTIFACT_DIR=artifacts))
    if not done.is_file():
        print(f"training {name}: {config.iterations} steps", flush=True)
        trainer = t.Trainer(t.new_model(fast).to(run.device), t.TrainLoader(fast, run), fast, run)
        end = t.train(trainer, lambda: None)  # pyright: ignore[reportArgumentType] # never validates
        trainer.use_average()
        trainer.loader.ahead.close()
        folder.mkdir(parents=True, exist_ok=True)
        arrays: Any = {n: p.detach().float().cpu().numpy() for n, p in trainer.model.named_parameters()}
        np.savez(file, **arrays)
        t.write_atomic(done, json.dumps(dict(step=end.step, settings=training_settings(fast))))
    kept = json.loads(done.read_text())
    check_kept(done, kept, fast)
    model = t.new_model(config).to(run.device)
    saved = np.load(file)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.from_numpy(saved[n]))
    trainer = t.Trainer(model, t.TrainLoader(config, run), config, run)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return Bench(trainer, kept["step"], weights, environment)


class Text:
    """Validation text, with the float model's predictions on it."""

    def __init__(self, bench: Bench, tokens: int):
        config = bench.trainer.config
        self.model, self.looped = bench.trainer.model, config.loops
        stream, length = t.TokenStream(config, "val"), config.train_seq_len
        rows = np.stack([stream.read(i * length, (i + 1) * length + 1) for i in range(tokens // length)]).astype(
            np.int64
        )
        ids, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        self.tokens = targets.size
        self.bytes = int(t.Vocabulary(config).target_bytes(ids, targets).sum())
        starts = t.document_starts(ids.copy())
        self.batches = []
        for at in range(0, len(ids), 8):
            part = slice(at, at + 8)
            batch = t.to_device(ids[part], targets[part], starts[part], bench.trainer.run.device)
            self.batches.append((batch, self.predict(batch)))

    @torch.no_grad()
    def predict(self, batch: t.Batch) -> Tensor:
        """Logarithms of the next token's probabilities, by the model with its present weights."""
        return self.model.log_probabilities(batch.ids, batch.documents, looped=self.looped)

    @torch.no_grad()
    def compare(self, weights: dict[str, Tensor], float_weights: dict[str, Tensor]) -> tuple[float, float]:
        """(bits per byte lost, divergence in bits per byte) of these weights; the model gets its own ones back."""
        load(self.model, weights)
        lost = divergence = 0.0
        for batch, expected in self.batches:
            found = self.predict(batch)
            divergence += (expected.exp() * (expected - found)).sum().item()
            lost += (expected - found).gather(-1, batch.targets[..., None]).sum(dtype=torch.float64).item()
        load(self.model, float_weights)
        return t.Score(lost, self.tokens, self.bytes).bpb, t.Score(divergence, self.tokens, self.bytes).bpb


@torch.no_grad()
def load(model: t.GPT, weights: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(weights[name])


def predicted(stored: dict[str, t.Quantized], bench: Bench, calibration: t.Calibration) -> float:
    """Half of tr(G E H E^T) over all matrices with a Hessian, or of the sum of rows[r] E_r H E_r^T where there is no G,
    in nats per token.
    """
    total = 0.0
    for name, hessian in calibration.hessians.items():
        error = t.as_batch(bench.weights[name] - t.restore(stored[name]).to(hessian.device))
        outputs = calibration.outputs.get(name)
        if outputs is None:
            error = error * calibration.rows[name].sqrt()[..., None]
        total += t.weighted_error(error, hessian, outputs).sum().item()
    return total / 2


def peer_bytes(stored: dict[str, t.Quantized], config: t.Config) -> tuple[int, str]:
    """Bytes of an artifact whose integers are packed in the peers' arrangement, and by what."""
    data = t.pack(stored, config)
    if not shutil.which("lrzip"):
        return len(data), "pergroup"
    names = [name for name in coders.BANKS if name in stored and stored[name].scales is not None]
    banks = {name: t.as_batch(stored[name].codes).numpy() for name in names}
    sections = {f"{name}.codes" for name in names}
    ours = sum(s.packed_size for s in t.read_header(data)[0].sections if s.name in sections)
    return len(data) - ours + coders.peers_pack(banks)[1], "lrzip"


def tune(data: bytes, bench: Bench, config: t.Config, limit: int) -> bytes:
    """The artifact after TUNE_STEPS on training text, as a run does it."""
    trained = t.Trained(
        bench.trainer.model,
        t.Calibration({}),
        t.Progress(bench.step, 0.0),
        t.Score(0.0, 1, 1),
        0.0,
        bench.trainer.loader,
    )
    return t.tune_artifact(data, trained, limit, config, bench.trainer.run)


def measure(name: str, bench: Bench, text: Text, seed: int, methods: list[str]) -> list[dict[str, Any]]:
    """Rows of the peer's pipeline and of some methods, calibrated on the batches of a seed."""
    trainer = bench.trainer
    first = bench.step + 1000 * seed
    batches = round(CALIBRATION_TOKENS / trainer.config.train_batch_tokens)
    environment = {**bench.environment, "GPTQ_CALIBRATION_BATCHES": batches}
    config = knobs_of({**environment, **SENSITIVE})
    calibrations = {}
    for guided in (False, True):
        trainer.config = config if guided else dataclasses.replace(config, **t.WITHOUT_GRADIENTS)
        calibrations[guided] = t.calibrate(trainer, first)
    rows = []

    def add(method: str, stored: dict[str, t.Quantized], size: int, seconds: float, note: str = "") -> None:
        lost, divergence = text.compare(t.dequantize(stored), bench.weights)
        expected = t.Score(predicted(stored, bench, calibrations[True]) * text.tokens, text.tokens, text.bytes).bpb
        row = dict(model=name, seed=seed, method=method, bytes=size, bpb_lost=lost, divergence=divergence)
        rows.append(dict(row, predicted=expected, seconds=seconds, note=note))
        print(
            f"{name:6} seed {seed} {method:30} {size:9,} bytes  lost {lost:8.5f}  divergence {divergence:.5f}  "
            f"predicted {expected:.5f}  {seconds:5.1f} s  {note}",
            flush=True,
        )

    c = knobs_of({**environment, **BLIND, **PEER})
    start = time.perf_counter()
    stored = t.quantize(bench.weights, calibrations[False], c)
    limit, packer = peer_bytes(stored, c)
    add("peer", stored, limit, time.perf_counter() - start, packer)
    lines: list[str] = []
    for method in methods:
        c = knobs_of({**environment, **METHODS[method]})
        start = time.perf_counter()
        lines.clear()
        data = t.quantize_within(bench.weights, calibrations[c.takes_sensitivities], limit, c, lines.append)
        if c.tune_steps:
            data = tune(data, bench, c, limit)
        note = next(line.partition("scale ")[2] for line in lines if line.startswith("target:"))
        add(method, t.unpack(data)[1], len(data), time.perf_counter() - start, note)
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student); infinite for one value."""
    return statistics.mean(values), intervals.half_width(values) if len(values) > 1 else math.inf


def report(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown: means and intervals over seeds, and each method's divergence over the peer's."""
    lines = [
        "| model | method | bytes | bpb lost | divergence, bpb | over the peer's | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        peers = {row["seed"]: row["divergence"] for row in of_model if row["method"] == "peer"}
        for method in dict.fromkeys(row["method"] for row in of_model):
            own = [row for row in of_model if row["method"] == method]
            cells = [
                f"{m:.5f} ± {h:.5f}" for m, h in (interval([r[k] for r in own]) for k in ("bpb_lost", "divergence"))
            ]
            mean, half = interval([row["divergence"] / peers[row["seed"]] for row in own])
            size = statistics.mean(row["bytes"] for row in own)
            expected = statistics.mean(row["predicted"] for row in own)
            lines.append(
                f"| {name} | {method} | {size:,.0f} | {cells[0]} | {cells[1]} | {mean:.3f} ± {half:.3f} "
                f"| {expected:.5f} |"
            )
    return "\n".join(lines)


def random_calibration(weights: dict[str, Tensor], generator: torch.Generator) -> t.Calibration:
    """Hessians of correlated random inputs for each bank, log-normal sensitivities of their rows, and correlated
    gradients of the outputs.
    """
    hessians, sensitivities = {}, {}
    outputs: dict[str, Tensor] = {}
    for name in (*t.BANKS, "head" if "head" in weights else "embedding"):
        w = t.as_batch(weights[name])
        inputs = torch.randn(2 * w.size(-1), w.size(-1), generator=generator)
        inputs *= torch.logspace(-1, 1, w.size(-1))  # columns of very different sizes, as activations have
        inputs += 0.5 * inputs.roll(1, 1)
        one = (inputs.mT @ inputs / len(inputs)).to(w.device)
        hessians[name] = one.expand(len(w), -1, -1) * torch.exp(torch.randn(len(w), 1, 1, generator=generator)).to(
            w.device
        )
        rows = torch.exp(torch.randn(w.shape[:2], generator=generator)).to(w.device)
        sensitivities[name] = rows / rows.mean(1, keepdim=True)
        if name in t.BANKS:
            g = torch.randn(2 * w.size(1), w.size(1), generator=generator)
            g = (g + 0.5 * g.roll(1, 1)).to(w.device)
            g = g * sensitivities[name].sqrt()[:, None]
            outputs[name] = g.mT @ g / g.square().sum((1, 2), keepdim=True) * w.size(1)
    return t.Calibration(hessians, sensitivities, outputs)


class OperationCount(TorchDispatchMode):
    """Context manager that counts torch operations that compute: on a GPU each is a launch at least."""

    VIEWS = (
        *("view", "_unsafe_view", "as_strided", "alias", "detach", "expand", "permute", "transpose", "t", "unflatten"),
        *("select", "slice", "split", "split_with_sizes", "unbind", "squeeze", "unsqueeze", "diagonal"),
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.split("::")[1] not in self.VIEWS
        return func(*args, **(kwargs or {}))


def trellis_operations(c: t.Config) -> int:
    """Operations of one trellis pass over all matrices, with a GPU's chunks of rows; without data, on meta tensors."""
    make_trellis, weights = t.make_trellis, dict(t.meta_model(c).named_parameters())
    with (
        mock.patch.dict(t.TRELLIS_ROWS, meta=t.TRELLIS_ROWS["cuda"]),
        mock.patch.object(
            t, "make_trellis", lambda states, _device: t.Trellis(*(x.to("meta") for x in make_trellis(states)))
        ),
    ):
        total = 0
        for name in (*t.BANKS, "embedding"):
            w = t.as_batch(weights[name])
            matrices, rows, columns = w.shape
            u = torch.empty(matrices, columns, columns, device="meta")
            groups = c.gptq_row_groups if name in t.BANKS else 0
            sizes = collections.Counter(len(index) for index in t.row_groups(rows, groups or 1, torch.device("cpu")))
            for size, times in sizes.items():
                scales = torch.empty(matrices, size, device="meta")
                with OperationCount() as counted:
                    t.trellis_gptq(w[:, :size], u, scales, u[0].new_empty(matrices, columns), c)
                total += times * counted.count
    return total


def time_untrained(environment: dict[str, str]) -> dict:
    """Seconds of each part of quantization at PRESET's sizes, on random weights."""
    given = {name: value for name, value in environment.items() if value}
    c = t.config_from_env({"PRESET": "record", **given}, torch.cuda.is_available())[0]
    run, generator = t.start_run(c, {}), torch.Generator().manual_seed(c.seed)
    model = t.new_model(c).to(run.device)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in (*t.BANKS, "embedding"):
        w = weights[name]
        w.copy_(torch.randn(w.shape, generator=generator) * w.size(-1) ** -0.5)
    calibration, rows = random_calibration(weights, generator), []

    def timed(name: str, compute):
        run.synchronize()
        start = time.perf_counter()
        result = compute()
        run.synchronize()
        rows.append(dict(name=name, seconds=time.perf_counter() - start))
        print(f"{name:24} {rows[-1]['seconds']:9.2f} s", flush=True)
        return result

    print(f"{t.parameter_count(c)} random weights; torch {torch.__version__}, {t.hardware(run)}")
    factors = timed("factors of Hessians", lambda: t.plan_quantization(weights, calibration, c))
    stored = timed("one attempt", lambda: t.quantize(weights, calibration, c, factors=factors))
    data = timed("packing", lambda: t.pack(stored, c))
    back = timed("unpacking", lambda: t.unpack(data)[1])
    timed("dequantization", lambda: t.dequantize(back))
    limit = t.bytes_for_model(c)
    data = timed("the whole stage", lambda: t.make_artifact(weights, calibration, limit, c, print))
    operations = trellis_operations(c) if c.quantizer == "trellis" else 0
    if operations:
        print(f"{operations} torch operations in a trellis pass, each a launch at least on a GPU")
    print(f"{len(data)} bytes of {limit}; peak memory {run.peak_memory() / 2**20:.0f} MiB")
    return dict(
        rows=rows,
        bytes=len(data),
        limit=limit,
        parameters=t.parameter_count(c),
        hardware=t.hardware(run),
        torch=torch.__version__,
        peak_memory_bytes=run.peak_memory(),
        trellis_operations=operations,
    )


def run_models(names: list[str], methods: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints models in turn. The results so far are written after each seed."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = dict(rows=rows, tokens=options.tokens, torch=torch.__version__)
    for name in names:
        with tempfile.TemporaryDirectory() as artifacts:
            bench = open_model(name, options.folder, artifacts)
            found |= dict(hardware=t.hardware(bench.trainer.run))
            text = Text(bench, options.tokens)
            for seed in range(options.seeds):
                rows += measure(name, bench, text, seed, methods)
                if options.json:
                    t.write_atomic(options.json, json.dumps(found, indent=1) + "\n")
            bench.trainer.loader.ahead.close()
    print(report(rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="some of " + ", ".join(MODELS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quantize", help="where trained models are kept")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--tokens", type=int, default=65_536, help="validation tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", help="prints the table of results that --json wrote")
    parser.add_argument("--untrained", action="store_true", help="times alone, at PRESET's sizes")
    options = parser.parse_args()
    names, methods = options.models.split(","), options.methods.split(",")
    for option, given, known in (("models", names, MODELS), ("methods", methods, METHODS)):
        if not set(given) <= set(known):
            parser.error(f"--{option}: must be some of {', '.join(known)}")
    if options.report:
        print(report([row for file in options.report for row in json.loads(file.read_text())["rows"]]))
        return
    found = time_untrained(dict(os.environ)) if options.untrained else run_models(names, methods, options)
    if options.json:
        t.write_atomic(options.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
