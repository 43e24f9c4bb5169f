"""Machines without a GPU: the CPU build of torch, pip's own settings, systems without fcntl, Apple's GPUs."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT, clean_environment, run_command

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
    code = "import sys, runpy; sys.modules['fcntl'] = None; sys.path[0] = sys.argv[2]; runpy.run_path(sys.argv[1], run_name='__main__')"
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
