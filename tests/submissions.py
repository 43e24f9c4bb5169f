"""Invented submissions in the forms that people publish: other names, units, roundings, nestings and logs."""

import json
import random
import re
import statistics
from dataclasses import dataclass, field

SEEDS = (42, 314, 1337)
RATIO = 1.6934  # nats per token for each bit per byte
SETTINGS = dict(
    num_layers="11",
    model_dim="512",
    matrix_lr="0.022",
    qk_gain_init="5.25",
    lora_rank="96",
    logit_softcap="30.0",
    warmup_steps="20",
    log_every="500",
    ttt_lr="0.005",
    ttt_epochs="3",
    ema_decay="0.9965",
    iterations="20000",
)
SCRIPT = """import os
import numpy as np
import torch

class Hyperparameters:
""" + "".join(f'    {name} = os.environ.get("{name.upper()}", "{value}")\n' for name, value in SETTINGS.items())
SCRIPT += '    seed = int(os.environ.get("SEED", 1337))\n    run_id = os.environ.get("RUN_ID", "")\n'
SCRIPT += '    data_path = os.environ.get("DATA_PATH", "")\n    gptq_reserve_seconds = 12.0\n' + "# a comment\n" * 2500


@dataclass
class Truth:
    """What one seed's run did."""

    seed: int
    pre: float
    quant: float
    sliding: float
    ttt: float
    steps: int
    step_ms: float
    model: int
    eval_ms: dict = field(default_factory=dict)
    settings: dict = field(default_factory=lambda: dict(SETTINGS, gptq_reserve_seconds="12.0"))
    shards: int = 80

    @property
    def code(self):
        return len(SCRIPT)

    @property
    def total(self):
        return self.code + self.model

    @property
    def train_ms(self):
        return round(self.steps * self.step_ms)


def truths(draw):
    """Three seeds of one configuration."""
    centre = draw.uniform(1.05, 1.14)
    found = []
    for seed in SEEDS:
        ttt = centre + draw.uniform(-0.0012, 0.0012)
        step_ms = draw.uniform(85, 125)
        found.append(
            Truth(
                seed,
                pre=round(ttt + 0.012 + draw.uniform(0, 0.001), 8),
                quant=round(ttt + 0.021 + draw.uniform(0, 0.001), 8),
                sliding=round(ttt + 0.003 + draw.uniform(0, 0.0005), 8),
                ttt=round(ttt, 8),
                steps=int(588_000 / step_ms),
                step_ms=step_ms,
                model=15_900_000 + draw.randrange(30_000),
                eval_ms=dict(
                    pre=6000 + draw.randrange(999),
                    quant=7000 + draw.randrange(999),
                    sliding=90_000 + draw.randrange(9999),
                    ttt=370_000 + draw.randrange(9999),
                ),
            )
        )
    return found


def block_log(t):
    """A log with a block of settings and scores named in words."""
    rule = "=" * 100
    lines = [rule, "Hyperparameters:"]
    lines += [
        f"  {name}: {value}" for name, value in sorted(dict(t.settings, seed=t.seed, run_id=f"r{t.seed}").items())
    ]
    lines += [rule, f"train_shards: {t.shards}", "val_tokens: 40540160", "model_params:35944602"]
    lines += [f"gptq:reserving {t.settings['gptq_reserve_seconds']}s", "warmup_step: 1/20"]
    lines += ["0/20000 val_loss: 9.0090 val_bpb: 3.4877"]
    for step in range(500, t.steps, 500):
        minutes = step * t.step_ms / 60000
        lines += [f"{step}/20000 train_loss: {3 - step / 9000:.4f} train_time: {minutes:.1f}m tok/s: 6700{step}"]
    lines += [f"{t.steps}/20000 val_loss: {t.pre * RATIO + 0.002:.4f} val_bpb: {t.pre + 0.0012:.4f}"]
    lines += [f"stopping_early: wallclock_cap train_time: {t.train_ms}ms step: {t.steps}/20000"]
    lines += ["peak memory allocated: 39045 MiB reserved: 39120 MiB", "ema:applying EMA weights"]

    def score(name, bpb, ms):
        return f"{name} val_loss:{bpb * RATIO:.8f} val_bpb:{bpb:.8f} eval_time:{ms}ms"

    lines += [score("pre-quantization post-ema", t.pre, t.eval_ms["pre"])]
    lines += ["Serialized model: 135431033 bytes", f"Code size: {t.code} bytes"]
    lines += [f"Serialized model quantized+brotli: {t.model} bytes"]
    lines += [f"Total submission size quantized+brotli: {t.total} bytes"]
    lines += [score("quantized", t.quant, t.eval_ms["quant"])]
    lines += [score("quantized_sliding_window", t.sliding, t.eval_ms["sliding"])]
    lines += [score("quantized_ttt", t.ttt, t.eval_ms["ttt"]), f"total_eval_time:{sum(t.eval_ms.values())}ms"]
    return "\n".join(lines) + "\n"


def line_log(t, last="sliding"):
    """A log whose settings stand in lines, and whose scores have an exact line each."""
    s = t.settings
    lines = [f"train_loader:dataset:fineweb10B_sp1024 train_shards:{t.shards}"]
    lines += ["val_loader:shards pattern=/data/fineweb_val_*.bin tokens:62021632", "model_params:26829913"]
    lines += ["world_size:8 grad_accum_steps:1", f"num_layers:{s['num_layers']} model_dim:{s['model_dim']}"]
    lines += [f"matrix_lr:{s['matrix_lr']} logit_softcap:{s['logit_softcap']} lora_rank:{s['lora_rank']}"]
    lines += ["train_batch_tokens:524288 iterations:20000 max_wallclock_seconds:600.000", f"seed:{t.seed}"]
    lines += [f"warmup_step:{i}/20" for i in range(1, 21)]
    for step in range(1000, t.steps, 1000):
        ms = step * t.step_ms
        lines += [
            f"step:{step}/20000 train_loss:{3 - step / 9000:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms"
        ]
    lines += [
        f"step:{t.steps}/20000 val_loss:{t.pre * RATIO:.4f} val_bpb:{t.pre:.4f} train_time:{t.train_ms}ms "
        f"step_avg:{t.train_ms / t.steps:.2f}ms",
        f"stopping_early: wallclock_cap train_time:{t.train_ms}ms step:{t.steps}/20000",
        "peak memory allocated: 10184 MiB reserved: 10358 MiB",
        "Serialized model: 67220567 bytes",
        f"Code size: {t.code} bytes",
        f"Serialized model int6+zstd: {t.model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)",
        f"Total submission size int6+zstd: {t.total} bytes",
    ]
    for name, stage in (("final_int6_zstd_roundtrip", "quant"), ("final_int6_sliding_window", "sliding")):
        bpb, ms = getattr(t, stage), t.eval_ms[stage]
        lines += [f"{name} val_loss:{bpb * RATIO:.4f} val_bpb:{bpb:.4f} eval_time:{ms}ms"]
        lines += [f"{name}_exact val_loss:{bpb * RATIO:.8f} val_bpb:{bpb:.8f}"]
    return "\n".join(lines) + "\n"


def stamped(text):
    return "".join(f"[05:{i // 60 % 60:02d}:{i % 60:02d}] {line}\n" for i, line in enumerate(text.splitlines()))


def mean(values):
    return statistics.fmean(values)


WHO = dict(author="A. Uthor", github_id="author", name="A method", blurb="A method on 8 GPUs.", date="2026-04-09")


# ------------------------------------------------------------------------------------------------------------ schemas


def flat(ts):
    """One run, the four figures of the first folders."""
    t = ts[0]
    s = dict(
        WHO, val_loss=f"{t.sliding * RATIO:.8f}", val_bpb=f"{t.sliding:.8f}", bytes_total=t.total, bytes_code=t.code
    )
    page = f"# A method\n\nval_bpb: **{t.sliding:.4f}**\n\nSeed {t.seed}; PR #549 has 1.1194, the baseline 1.2244.\n"
    page += f"\n- steps: {t.steps}\n- step time: {t.train_ms / t.steps:.1f} ms\n- artifact {t.total / 1e6:.2f} MB\n"
    return s, page, {"train.log": line_log(t)}


def stages(ts):
    """Scores of each stage of the best run, sizes, and a nominal time."""
    t = min(ts, key=lambda t: t.sliding)
    s = dict(
        WHO,
        val_loss=f"{t.sliding * RATIO:.8f}",
        val_bpb=f"{t.sliding:.8f}",
        pre_quant_val_loss=f"{t.pre * RATIO:.4f}",
        pre_quant_val_bpb=f"{t.pre:.4f}",
        int6_zstd_val_loss=f"{t.quant * RATIO:.8f}",
        int6_zstd_val_bpb=f"{t.quant:.8f}",
        step_stop=t.steps,
        wallclock_seconds=600,
        bytes_total=t.total,
        bytes_model_int6_zstd=t.model,
        bytes_code=t.code,
        train_time_ms=t.train_ms,
        eval_time_seconds=f"{t.eval_ms['sliding'] / 1000:.1f}",
        model_params=26829913,
        peak_memory_mib=10184,
    )
    page = f"# 11 layers\n\n| Stage | val_bpb |\n|--|--|\n| pre-quant | {t.pre:.4f} |\n| int6 | {t.quant:.4f} |\n"
    page += f"| sliding | **{t.sliding:.4f}** |\n\nTraining took {t.train_ms / 1000:.0f} s, {t.steps} steps.\n"
    return s, page, {"train_log.txt": stamped(line_log(t))}


def by_seed(ts):
    """Rows by seed with the time of a step, and means beside them."""
    rows = {
        str(t.seed): dict(
            val_loss=f"{t.sliding * RATIO:.8f}",
            val_bpb=f"{t.sliding:.8f}",
            steps=t.steps,
            ms_per_step=f"{t.train_ms / t.steps:.2f}",
        )
        for t in ts
    }
    bpb = mean(t.sliding for t in ts)
    s = dict(WHO, track="10min_16mb", seed_results=rows, mean_val_loss=f"{bpb * RATIO:.8f}", mean_val_bpb=f"{bpb:.8f}")
    s |= dict(artifact_bytes=max(t.total for t in ts), code_bytes=ts[0].code)
    page = (
        f"# Record\n\n**Mean val_bpb: {bpb:.4f}** over seeds 42, 314 and 1337.\n\n| Seed | val_loss | val_bpb | Steps |"
    )
    page += " ms/step |\n|--|--|--|--|--|\n"
    for t in ts:
        page += f"| {t.seed} | {t.sliding * RATIO:.4f} | {t.sliding:.4f} | {t.steps:,} | {t.train_ms / t.steps:.1f} |\n"
    page += f"| **Mean** | {bpb * RATIO:.4f} | **{bpb:.4f}** | {mean(t.steps for t in ts):,.0f} | |\n"
    return s, page, {f"train_seed{t.seed}.log": line_log(t) for t in ts}


def full(ts):
    """Rows, means, deviations, a comparison in bits and nats, sizes and times."""
    rows = {
        str(t.seed): dict(
            val_loss=f"{t.ttt * RATIO:.8f}",
            val_bpb=f"{t.ttt:.8f}",
            artifact_bytes=t.total,
            steps=t.steps,
            step_avg_ms=f"{t.train_ms / t.steps:.1f}",
            eval_time_s=f"{t.eval_ms['ttt'] / 1000:.1f}",
        )
        for t in ts
    }
    bpb, deviation = mean(t.ttt for t in ts), statistics.stdev(t.ttt for t in ts)
    sizes, gain = [t.total for t in ts], 1.1810 - bpb
    s = dict(
        WHO,
        track="10min_16mb",
        val_loss=f"{bpb * RATIO:.8f}",
        val_bpb=f"{bpb:.8f}",
        val_loss_std=f"{deviation * RATIO:.5f}",
        val_bpb_std=f"{deviation:.5f}",
        seeds=list(SEEDS),
        seed_results=rows,
        comparison_baseline_bpb="1.1810",
        delta_vs_leaderboard_bpb=f"{-gain:.5f}",
        delta_vs_leaderboard_nats=f"{-gain * RATIO:.5f}",
        artifact_bytes_mean=round(mean(sizes)),
        artifact_bytes_max=max(sizes),
        bytes_total=max(sizes),
        train_steps_mean=f"{mean(t.steps for t in ts):.2f}",
        step_avg_ms_mean=f"{mean(t.train_ms / t.steps for t in ts):.1f}",
        hardware="8xH100 80GB SXM",
    )
    page = (
        f"# Record\n\n**val_bpb = {bpb:.4f}** (3-seed mean, std {deviation:.5f}) | **~{max(sizes) / 1e6:.2f} MB**\n\n"
    )
    page += (
        "| Seed | Steps | Pre-quant BPB | Quantized BPB | **TTT BPB** | TTT gain | Artifact | PR #1019 |\n" + "|--" * 8
    )
    page += "|\n"
    for t in ts:
        page += f"| {t.seed} | {t.steps} | {t.pre:.5f} | {t.quant:.5f} | **{t.ttt:.5f}** | {t.ttt - t.quant:+.5f} | "
        page += f"{t.total:,} | 1.1147 |\n"
    page += f"| **Mean** | | {mean(t.pre for t in ts):.5f} | {mean(t.quant for t in ts):.5f} | **{bpb:.5f}** | "
    page += (
        f"{mean(t.ttt - t.quant for t in ts):+.5f} | {mean(sizes):,.0f} | 1.1147 |\n| **Std** | | | | {deviation:.5f} |"
    )
    page += f" | | |\n\nMerged record (PR #1019): **1.1810 BPB**, delta **{-gain:.4f}**, which clears 0.005 nats.\n"
    return s, page, {f"train_seed{t.seed}.log": block_log(t) for t in ts}


def nested(ts):
    """Results in an object of runs named seed_N, times in ms, and the commands' variables."""
    rows = {
        f"seed_{t.seed}": dict(
            val_bpb=f"{t.ttt:.8f}",
            val_loss=f"{t.ttt * RATIO:.8f}",
            pre_quant_bpb=f"{t.pre:.8f}",
            post_quant_bpb=f"{t.quant:.8f}",
            quant_gap_bpb=f"{t.quant - t.pre:.6f}",
            ttt_gain_bpb=f"{t.quant - t.ttt:.6f}",
            artifact_bytes=t.total,
            train_steps=t.steps,
            ttt_eval_ms=t.eval_ms["ttt"],
            train_time_ms=t.train_ms,
        )
        for t in ts
    }
    bpb = mean(t.ttt for t in ts)
    results = dict(
        rows,
        mean_val_bpb=f"{bpb:.5f}",
        std_val_bpb=f"{statistics.stdev(t.ttt for t in ts):.5f}",
        competition_sota="1.1194",
        improvement_over_sota=f"{1.1194 - bpb:.5f}",
    )
    s = dict(record_name="a", track="track_10min_16mb", author="a.uthor", description="A method.", results=results)
    s |= dict(environment=dict(gpus="8x NVIDIA H100", torch="2.9.1+cu128"))
    s |= dict(env_vars=dict(TTT_EPOCHS=3, LORA_RANK=96, NUM_LAYERS=11))
    page = "# TTT\n\n```bash\nTTT_EPOCHS=3 LORA_RANK=96 torchrun train_gpt.py\n```\n\n"
    page += "| | seed 42 | seed 314 |\n|--|--|--|\n"
    page += f"| bpb | {ts[0].ttt:.4f} | {ts[1].ttt:.4f} |\n\nMean {bpb:.5f} against 1.1194 of PR #549.\n"
    return s, page, {f"logs/epochs3_seed{t.seed}.txt": block_log(t) for t in ts}


def listed(ts):
    """Runs as a list, a summary by statistic, sizes in MB, and the key settings."""
    rows = [
        dict(
            seed=t.seed,
            sliding_bpb=f"{t.sliding:.6f}",
            ttt_bpb=f"{t.ttt:.6f}",
            train_time_s=f"{t.train_ms / 1000:.1f}",
            eval_time_ms=t.eval_ms["ttt"],
            artifact_mb=f"{t.total / 1e6:.3f}",
            model_bytes=t.model,
            steps_completed=t.steps,
        )
        for t in ts
    ]
    values = [t.ttt for t in ts]
    bpb = dict(
        mean=f"{mean(values):.6f}",
        std=f"{statistics.stdev(values):.7f}",
        min=f"{min(values):.6f}",
        max=f"{max(values):.6f}",
    )
    s = dict(
        WHO,
        val_bpb=f"{mean(values):.6f}",
        runs=rows,
        summary=dict(val_bpb=bpb, train_time_ms=dict(mean=f"{mean(t.train_ms for t in ts):.1f}"), num_seeds=3),
    )
    s |= dict(key_settings=dict(num_layers=11, model_dim=512, matrix_lr=0.022, ema_decay=0.9965), world_size=8)
    page = f"# A list\n\n- val_bpb: {mean(values):.6f}\n- std: {statistics.stdev(values):.5f}\n\nSeeds: 42/314/1337\n\n"
    page += "| Seed | Sliding | TTT | Train (s) | Eval (s) | Size (MB) |\n|--|--|--|--|--|--|\n"
    for t in ts:
        page += (
            f"| {t.seed} | {t.sliding:.5f} | {t.ttt:.5f} | {t.train_ms / 1000:.1f} | {t.eval_ms['ttt'] / 1000:.0f} |"
        )
        page += f" {t.total / 1e6:.2f} |\n"
    return s, page, {f"seed_{t.seed}/train.log": block_log(t) for t in ts}


def seeds_as_rows(ts):
    """Rows under seeds, older rows that are superseded, and scores cut off after four decimals."""

    def cut(value):
        return re.match(r"[0-9]+\.[0-9]{4}", f"{value:.8f}")[0]

    rows = {str(t.seed): dict(val_bpb=f"{t.ttt:.4f}", artifact_bytes=t.total) for t in ts}
    old = {str(t.seed): dict(val_bpb=f"{t.ttt + 0.0019:.4f}", artifact_bytes=16_025_731) for t in ts}
    values = [t.ttt for t in ts]
    s = dict(
        WHO,
        val_bpb=f"{mean(values):.4f}",
        bytes_total=max(t.total for t in ts),
        bytes_code=ts[0].code,
        seeds=rows,
        mean_val_bpb=f"{mean(values):.4f}",
        std_val_bpb=f"{statistics.stdev(values):.4f}",
        verification=dict(sliding_bpb=cut(ts[0].sliding), baseline_no_cache_bpb="1.1477"),
        superseded_seeds_v1_0=old,
    )
    page = (
        f"# Rows\n\nResult: {mean(values):.4f} ± {statistics.stdev(values):.4f}\n\nFirst version: 1.1477 without.\n\n"
    )
    page += "| Seed | val_bpb | Δ vs #549 | Size |\n|--|--|--|--|\n"
    page += "".join(f"| {t.seed} | {cut(t.ttt)} | {t.ttt - 1.1194:+.4f} | {t.total:,} |\n" for t in ts)
    return s, page, {f"log_seed{t.seed}_v1.1.txt": block_log(t) for t in ts}


def parallel_lists(ts):
    """Lists in the order of the seeds."""
    values = [t.ttt for t in ts]
    s = dict(
        WHO,
        seeds=list(SEEDS),
        val_bpbs=[f"{v:.5f}" for v in values],
        artifact_bytes=[t.total for t in ts],
        steps=[t.steps for t in ts],
        val_bpb_mean=f"{mean(values):.5f}",
        val_bpb_std=f"{statistics.stdev(values):.2e}",
        val_bpb_best=f"{min(values):.5f}",
        val_bpb=f"{mean(values):.4f}",
        train_seconds_mean=f"{mean(t.train_ms for t in ts) / 1000:.1f}",
        val_loss=f"{mean(values) * RATIO:.4f}",
        bytes_total=max(t.total for t in ts),
        remaining_bytes=16_000_000 - max(t.total for t in ts),
    )
    page = f"# Lists\n\nval_bpb {mean(values):.4f}, std {statistics.stdev(values):.5f}, best {min(values):.5f}\n"
    return s, page, {f"train_s{t.seed}.log": block_log(t) for t in ts}


SCHEMAS = dict(
    flat=flat,
    stages=stages,
    by_seed=by_seed,
    full=full,
    nested=nested,
    listed=listed,
    seeds_as_rows=seeds_as_rows,
    parallel_lists=parallel_lists,
)


class Decimal(float):
    """A number that is written as its text."""

    def __new__(cls, text):
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __repr__(self):
        return self.text


def numbers(value):
    """The content with texts of decimals as numbers that are written so."""
    if isinstance(value, dict):
        return {key: inner if key in WHO else numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return Decimal(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+(e-?[0-9]+)?", value) else value


def dumps(value):
    """JSON with every decimal as it was written."""
    found = []

    def mark(x):
        if isinstance(x, dict):
            return {k: mark(v) for k, v in x.items()}
        if isinstance(x, list):
            return [mark(v) for v in x]
        if isinstance(x, Decimal):
            found.append(x.text.lstrip("+"))
            return f"@{len(found) - 1}@"
        return x

    text = json.dumps(mark(value), indent=1)
    return re.sub(r'"@([0-9]+)@"', lambda m: found[int(m[1])], text)


def write(folder, schema, draw=None, change=None):
    """Writes a good folder of a schema. `change` may alter the runs before. Returns the content of submission.json."""
    ts = truths(draw or random.Random(schema))
    if change:
        change(ts)
    content, page, logs = SCHEMAS[schema](ts)
    content = numbers(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "submission.json").write_text(dumps(content))
    (folder / "README.md").write_text(page)
    (folder / "train_gpt.py").write_text(SCRIPT)
    for name, text in logs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return content


def leaves(content, path=()):
    """The numbers of a submission.json with their paths, other than seeds."""
    if isinstance(content, dict):
        for key, inner in content.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(content, list):
        for place, inner in enumerate(content):
            yield from leaves(inner, (*path, place))
    elif (
        isinstance(content, (int, float))
        and not isinstance(content, bool)
        and not {"seed", "seeds"} & {path[-1], path[0] if len(path) == 2 and isinstance(path[1], int) else ""}
    ):
        yield path, content


def replaced(content, path, value):
    """A copy of the content with another number."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def off_by(value, part):
    """A number with an error of a part of it, in as many digits; None where they do not show it."""
    if isinstance(value, Decimal):
        if "e" in value.text:
            text = f"{value * (1 + part):.2e}"
        else:
            text = f"{value * (1 + part):.{len(value.text.partition('.')[2])}f}"
        return Decimal(text) if float(text) != value else None
    wrong = round(value * (1 + part)) if isinstance(value, int) else value * (1 + part)
    return wrong if wrong != value else None
