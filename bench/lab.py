"""A laboratory of training ideas: each against the best recipe so far, paired by seed, at three sizes of model.

    make lab                                     everything that is missing, and the report
    make lab ARGS="--only NorMuon --seeds 42 0"  some rows, some seeds
    make lab ARGS="--hours 4"                    no run starts after four hours; the next call goes on
    make lab ARGS="--dry"                        what would run, and for how long

The ideas are the table in bench/lab_ideas.py, the rules of the verdicts and the report are in bench/lab_report.py. Runs
use train_gpt.py's own configuration, training loop and evaluation on the built-in corpus, by steps, so that they are
deterministic. Before an idea is trained, the FLOPs and the CPU seconds of its training steps are measured beside the
control's in one process: STEPS_MEASURED steps spread over the training. It then trains for as many steps as fit the
control's FLOPs, and as many as fit the control's seconds; one run serves both where both are within 1% of the control's
steps. FLOPs are those of matrix products, forward, backward and optimizer, by torch's counter.

Rates that an idea may change are tried at the smallest size, with a seed of their own, and the best factor is kept for
all sizes. All rows come first at the smallest size. Of larger sizes, a row is run only if it is not hopeless yet; rows
that look best come first. Results are lines of bench/results/lab.jsonl. What a line there has is never run again: the
same settings that differ from the defaults, the same data.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]
import lab_ideas as ideas  # noqa: E402
import lab_report  # noqa: E402
import processes  # noqa: E402
import train_gpt as t  # noqa: E402

CONTROL = lab_report.CONTROL
SEEDS = (42, 0, 314)
TUNING_SEED = 7  # not one of the seeds above: choosing a rate by them would flatter the idea
STEPS_MEASURED, ROUNDS = 20, 3
NEAR = 0.01  # numbers of steps this close to the control's are taken for the same
# Settings that change where a run computes, or what happens after its score: not what was trained.
OUTSIDE = (*t.OPERATIONAL, "preset", "data_path", "mode", "gptq_calibration_batches")

# ----------------------------------------------------------------------------------------------- in a worker process


def train_once(environment: dict[str, str], with_bytes: bool) -> dict[str, Any]:
    """One run of the script's own stages: bits per byte of the averaged weights, without quantization.

    A training that diverges has no `bpb`, and `error` says why.
    """
    config = t.config_from_env(environment, False)[0]
    run = t.start_run(config, {})
    result: dict[str, Any] = dict(bpb=None, bytes=None, parameters=t.parameter_count(config))
    loader, evaluator = t.TrainLoader(config, run), t.make_evaluator(config, run)
    try:
        trained = t.train_model(config, run, loader, evaluator)
    except t.ConfigError as error:
        return result | dict(error=str(error))
    seconds = trained.end.seconds
    result |= dict(bpb=trained.score.bpb, train_seconds=seconds, total_seconds=sum(run.seconds.values()))
    if with_bytes:
        weights = {name: p.detach() for name, p in trained.model.named_parameters()}
        result["bytes"] = len(t.make_artifact(weights, trained.calibration, 0, config, run.log))
    return result


class Steps:
    """A training of which single steps are computed, in order, at points spread over its whole length."""

    def __init__(self, config: t.Config, run: t.Run):
        self.config, self.tokens = config, 0
        self.trainer = t.Trainer(t.new_model(config), t.TrainLoader(config, run), config, run)
        forward = self.trainer.forward

        def counted(ids: Any, *rest: Any, **more: Any) -> Any:
            self.tokens += ids.numel()
            return forward(ids, *rest, **more)

        self.trainer.forward = counted
        self.step(0.0)  # allocates the optimizers' state
        self.tokens = 0

    def step(self, fraction: float) -> None:
        progress = t.Progress(int(fraction * self.config.iterations), 0.0)
        self.trainer.step(progress, *t.step_variant_at(progress, self.config))

    def seconds(self, fraction: float) -> float:
        """CPU seconds of the step: those of other processes do not count."""
        begin = time.process_time()
        self.step(fraction)
        return time.process_time() - begin


def points(count: int) -> list[float]:
    """The middles of equal parts of the training: each stands for its part, whatever schedule changes on the way."""
    return [(i + 0.5) / count for i in range(count)]


def measure(control: dict[str, str], idea: dict[str, str], count: int, rounds: int) -> dict[str, Any]:
    """FLOPs and tokens of a mean step of both, and the ratio of the idea's seconds to the control's in each round."""
    from torch.utils.flop_counter import FlopCounterMode

    configs = [t.config_from_env(environment, False)[0] for environment in (control, idea)]
    run = t.start_run(configs[0], {})
    flops, tokens = [], []
    for config in configs:
        steps = Steps(config, run)
        with FlopCounterMode(display=False) as counter:
            for fraction in points(count):
                steps.step(fraction)
        flops.append(counter.get_total_flops() / count)
        tokens.append(steps.tokens / count)
    ratios = []
    for number in range(rounds):
        pair = [Steps(config, run) for config in configs]
        spent = [0.0, 0.0]
        for fraction in points(count):
            for which in (0, 1) if number % 2 else (1, 0):
                spent[which] += pair[which].seconds(fraction)
        ratios.append(spent[1] / spent[0])
        seconds = [total / count for total in spent]
    return dict(flops=flops, tokens=tokens, ratios=ratios, seconds=seconds)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker process does for a job, as JSON."""
    if job["what"] == "cost":
        return measure(job["control_environment"], job["environment"], job["points"], job["rounds"])
    return train_once(job["environment"], job["with_bytes"])


# ------------------------------------------------------------------------------------------------------- what to run


class NotPossible(Exception):
    """A row that this version of train_gpt.py, or this size, does not have. The text says why."""


class Job(NamedTuple):
    """One thing for a worker to do. `record`: what its line in the results says besides the outcome."""

    key: str
    record: dict[str, Any]
    order: dict[str, Any]  # for `work`
    seconds: float  # expected


def digest(value: Any) -> str:
    """A short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def data_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the shards and the tokenizer. The manifest has more: when they were made."""
    files = sorted([*folder.glob("*.bin"), *folder.glob("tokenizer.model")])
    return digest([(path.name, t.sha256_of(path)) for path in files])


def configured(environment: dict[str, str]) -> t.Config:
    """The configuration of an environment. Errors: NotPossible for a knob or value that this version does not have."""
    known = {field.name.upper() for field in dataclasses.fields(t.Config)}
    unknown = sorted(set(environment) - known)
    if unknown:
        raise NotPossible("not in this version: " + ", ".join(unknown))
    try:
        return t.config_from_env(environment, False)[0]
    except t.ConfigError as error:
        raise NotPossible(f"not in this version: {error}") from None


def trained_settings(config: t.Config) -> dict[str, Any]:
    """All that decides a run and is not a default. So a new knob, left at its default, repeats nothing."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {n: v for n, v in values.items() if n not in OUTSIDE and v != defaults[n]}


def equal_steps(control: int, ratio: float) -> int:
    """Steps that cost what `control` steps of the control cost, where one step costs `ratio` times as much.

    Within 1% of the control's steps, they are the control's.
    """
    steps = max(1, round(control / ratio))
    return control if abs(steps - control) <= NEAR * control else steps
