"""Machines without a GPU: the CPU build of torch, pip's own settings, systems without fcntl, Apple's GPUs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt as tg
from helpers import ROOT, TINY, clean_environment, run_command

PYTHON = """#!/bin/sh
printf '%s|%s\\n' "$PIP_USER$PIP_TARGET$PIP_PREFIX" "$*" >>"$CALLS"
case "$*" in
*torch.version.cuda*) exit 1 ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.fixture
def make_venv(tmp_path):
    """`make venv` with a Python that writes its arguments down; returns the process and the calls of pip."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments, **values):
        (tmp_path / "calls").write_text("")
        words = ["make", "-s", "venv", f"PYTHON={tmp_path / 'python'}", f"VENV={tmp_path / 'my-venv'}", *arguments]
        environment = {"PATH": os.environ["PATH"], "CALLS": str(tmp_path / "calls"), **values}
        done = run_command(words, cwd=ROOT, env=environment)
        calls = [line.split("|", 1) for line in (tmp_path / "calls").read_text().splitlines()]
        return done, [(setting, words) for setting, words in calls if words.startswith("-m pip")]

    return run


def test_the_cpu_build_of_torch_comes_first_and_from_its_own_index(make_venv):
    done, calls = make_venv("TORCH=cpu")
    pinned = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2 and calls[0][1].endswith(f"--index-url https://download.pytorch.org/whl/cpu {pinned}")
    assert "--no-deps" in calls[0][1] and "--index-url" not in calls[1][1]
    done, calls = make_venv("TORCH=cpu")
    assert done.returncode == 0 and calls == []  # what is installed stays


def test_without_a_word_torch_is_the_indexs_own(make_venv):
    done, calls = make_venv()
    assert done.returncode == 0 and len(calls) == 1 and "--index-url" not in calls[0][1]


def test_another_build_of_torch_is_refused(make_venv):
    done, calls = make_venv("TORCH=rocm")
    assert done.returncode == 2 and "error: TORCH=rocm: must be cpu, cuda or empty" in done.stderr and calls == []


@pytest.mark.parametrize("given", [{"PIP_USER": "1"}, {"PIP_TARGET": "/nowhere", "PIP_PREFIX": "/nowhere"}])
def test_pips_settings_for_other_places_do_not_reach_the_environment(make_venv, given):
    done, calls = make_venv(**given)
    assert done.returncode == 0 and [setting for setting, _ in calls] == ["0"]
    done, _ = make_venv(*(f"{name}={value}" for name, value in given.items() if name == "PIP_USER"))
    assert done.returncode == 0


@pytest.mark.parametrize("script", ["train_gpt.py", "data/prepare.py", "tools/generate.py", "tools/mine.py"])
def test_a_system_without_fcntl_gets_one_line(script):
    """As on Windows. A module that is None in sys.modules is one that cannot be imported."""
    code = "import sys, runpy; sys.modules['fcntl'] = None; "
    code += "sys.path[0] = sys.argv[2]; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / script), str((ROOT / script).parent)],
        capture_output=True,
        text=True,
        env=clean_environment({}),
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: fcntl: is missing; this program needs Linux or macOS, and on Windows WSL"
    ]


# -------------------------------------------------------------------------------------------------------- Apple's GPUs


@pytest.fixture
def apple(monkeypatch):
    """PyTorch says that there is an Apple GPU. There is none: nothing here has run on one."""
    monkeypatch.setattr(tg, "mps_available", lambda: True)


def test_settings_on_an_apple_gpu_are_those_of_plain_torch(apple):
    c = tg.config_from_env({"DEVICE": "mps", "PRESET": "demo"}, False)[0]
    assert (c.device, c.compute_dtype, c.compile, c.triton_kernels) == ("mps", "float32", "0", "0")
    name, why = tg.choose_attention(c)
    assert name == "sdpa" and "takes bfloat16 on CUDA only" in why and not tg.float8_supported(c)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(COMPILE=1), "COMPILE=1: is for CUDA and CPUs"),
        (dict(COMPUTE_DTYPE="float64"), "COMPUTE_DTYPE=float64: Apple's GPUs have no float64"),
        (dict(TRITON_KERNELS=1), "TRITON_KERNELS=1: needs a CUDA device"),
        (dict(TTT_CUDA_GRAPHS=1), "TTT_CUDA_GRAPHS=1: needs a CUDA device"),
        (dict(ATTENTION="fa3"), "ATTENTION=fa3: cannot run here"),
    ],
)
def test_what_an_apple_gpu_cannot_do_is_refused(apple, values, message):
    with pytest.raises(tg.ConfigError, match=message):
        environment = {name: str(value) for name, value in values.items()}
        tg.choose_attention(tg.config_from_env({"DEVICE": "mps", "PRESET": "demo", **environment}, False)[0])


def test_without_an_apple_gpu_one_line_says_so():
    with pytest.raises(tg.ConfigError, match="DEVICE=mps: PyTorch sees no Apple GPU"):
        tg.config_from_env({"DEVICE": "mps"}, False)


def test_several_ranks_on_an_apple_gpu_are_refused(apple):
    c = tg.config_from_env({"DEVICE": "mps", "PRESET": "demo"}, False)[0]
    with pytest.raises(tg.ConfigError, match="takes one rank, and there are 2"):
        tg.start_run(c, {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int64), np.ones(3, bool)])
def test_arrays_reach_a_device_that_is_not_cuda(array):
    meta = torch.device("meta")  # any device that is neither the CPU nor CUDA
    assert tg.send_array(array, meta).device == meta
    batch = tg.to_device(*(np.zeros((1, 4), np.int64) for _ in range(3)), meta)
    assert {tensor.device for tensor in (*batch[:2], *batch.documents)} == {meta}


class Float64(TorchDispatchMode):
    """Notes the operations that make a float64 tensor, while `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [item for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        if self.on and any(item.dtype == torch.float64 for item in made):
            self.found.add(str(function))
        return result


def test_a_training_for_apple_gpus_makes_no_float64_and_ends_on_the_cpu(apple, data, tmp_path, monkeypatch):
    """The whole run with the settings of DEVICE=mps, on a CPU that stands in for the GPU."""
    monkeypatch.chdir(tmp_path)
    watcher, moves = Float64(), []
    monkeypatch.setattr(tg, "first_device", lambda config, local: torch.device("cpu"))
    step, move = tg.Trainer.step, tg.move_to_cpu

    def watched(*arguments, **options):
        watcher.on = True
        try:
            return step(*arguments, **options)
        finally:
            watcher.on = False

    monkeypatch.setattr(tg.Trainer, "step", watched)
    monkeypatch.setattr(tg, "move_to_cpu", lambda trainer: (moves.append(trainer.run.stage), move(trainer)))
    values = {name: str(value) for name, value in {**TINY, "COMPUTE_DTYPE": "auto", "RUN_ID": "apple"}.items()}
    values |= dict(DATA_PATH=str(data), DEVICE="mps", MAX_WALLCLOCK_SECONDS="60", GPTQ_RESERVE_SECONDS="-1")
    with watcher:
        code = tg.main([], values)
    monkeypatch.undo()
    assert code == 0 and watcher.found == set() and moves == ["warmup", "train"]
    summary = json.loads((tmp_path / "logs" / "apple" / "summary.json").read_text())
    assert summary["attention"] == "sdpa" and summary["val_bpb_quantized"] > 0
