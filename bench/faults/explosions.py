"""Rates without measure and poisoned numbers: a finite score, or one line that names step and tensor."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

import train_gpt as t
from faults.inputs import MODELS
from faults.trials import LOST, MISREPORTED, Trial

VALUES = (float("nan"), float("inf"), -float("inf"), 1e38, 1e30, 1e12)
RATES = (
    "MATRIX_LR",
    "SCALAR_LR",
    "TIED_EMBED_LR",
    "MUON_MOMENTUM",
    "MUON_WD",
    "EMBED_WD",
    "EMA_DECAY",
    "Z_LOSS_WEIGHT",
)
ABSURD = ("1e9", "1e30", "1e300", "-1", "nan", "inf", "0", "1e-300", "", "1e", "0x10", "٣")


def poison(where: str, step: int, value: float, pick: int) -> None:
    """Puts a value into a weight, a gradient's product or the optimizer before a step of this process's training."""
    real = t.Trainer.step

    def poisoned(trainer, progress, *variant, **more):
        if progress.step == step:
            with torch.no_grad():
                tensors = [p for _, p in trainer.model.named_parameters()]
                if where == "state":
                    floats = [v for v in trainer.state().values() if v.is_floating_point() and v.numel()]
                    tensors = floats or tensors
                chosen = tensors[pick % len(tensors)]
                chosen.reshape(-1)[pick % chosen.numel()] = value
        return real(trainer, progress, *variant, **more)

    setattr(t.Trainer, "step", poisoned)  # noqa: B010  # a type checker knows what it replaces


def explosions(trial: Trial) -> None:
    """An absurd rate, or a number that is not finite, or far too large, in a weight or in the optimizer's state."""
    model = trial.draw.choice(list(MODELS))
    folder = trial.folder / "run"
    knobs = trial.inputs.settings(model, "plain", ARTIFACT_DIR=folder, ITERATIONS=12)
    before: Callable[[], None] | None = None
    if trial.draw.random() < 0.5:
        name, value = trial.draw.choice(RATES), trial.draw.choice(ABSURD)
        knobs[name] = value
        trial.note(f"{model}: {name}={value}")
    else:
        where, step = trial.draw.choice(("weights", "state")), trial.draw.randint(0, 11)
        number, pick = trial.draw.choice(VALUES), trial.draw.randrange(10**6)
        trial.note(f"{model}: {number} in {where} {pick} before step {step}")

        before = functools.partial(poison, where, step, number, pick)

    ended = trial.inputs.start(knobs, trial.folder / "attempt", before=before).wait(120)
    if not trial.judge_end(ended, (0, 2)):
        return
    if ended.code == 0:
        summary = json.loads((folder / "summary.json").read_text(), parse_constant=lambda word: math.nan)
        figures = [summary[name] for name in ("val_bpb", "val_loss", "val_bpb_pre_quant", "val_bpb_quantized")]
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in figures)
        trial.expect(finite, MISREPORTED, f"the summary has the scores {figures}")
    elif "training loss" in ended.err:
        judge_line(trial, ended.err, folder, knobs)


def judge_line(trial: Trial, text: str, folder: Path, knobs: dict) -> None:
    """The line names the step and a tensor; the checkpoint that it names can be gone on from with sane rates."""
    named = re.search(r"at step (\d+)", text) and "'" in text
    trial.expect(named, MISREPORTED, f"the line names no step or tensor: {text[:400]!r}")
    kept = re.search(r"RESUME=(\S+)", text)
    files = sorted((folder / "checkpoint").glob("step-*.safetensors"))
    trial.expect(
        bool(kept) == bool(files), MISREPORTED, f"{len(files)} checkpoints are kept, and the line says: {text[:400]!r}"
    )
    if not kept:
        return
    sane = {**knobs, **{name: value for name, value in t_defaults().items() if name in knobs}}
    sane |= dict(ARTIFACT_DIR=folder.with_name("second"), RESUME=kept[1])
    ended = trial.inputs.start(sane, trial.folder / "second-process").wait(120)
    if trial.judge_end(ended, (0, 2), what="the run from the checkpoint that the line names"):
        going = ended.code == 0 or "training loss" in ended.err  # large weights explode again
        trial.expect(going, LOST, f"the checkpoint that the line names is of no use: {ended.describe()}")


def t_defaults() -> dict[str, str]:
    """Rates of a baseline."""
    return dict(zip(RATES, ("0.03", "0.02", "0.03", "0.95", "0", "0", "0", "0"), strict=True))
