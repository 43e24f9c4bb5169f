"""The ways to eight GPUs: the pinned environment, the image, the SkyPilot task and the Slurm script.

Nothing is rented, queued or built. Each file is parsed by its own tool where that is installed, and the scripts run
with stand-ins for make, srun, sky and rsync that write down how they were called.
"""

import fnmatch
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import train_gpt as tg
from helpers import ROOT, run_command

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
GPUS_PAGE = (ROOT / "docs" / "gpus.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.M)[1].split()


def pins(name):
    """The packages of a requirements file and their versions. Each line must fix one."""
    lines = (line.partition(";")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert [line for line in found if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    return dict(line.split("==") for line in found)


# --------------------------------------------------------------------------------------------------- the environment


def test_the_gpu_environment_is_the_tested_one_and_every_version_is_fixed():
    gpu, tested = pins("requirements-gpu.txt"), pins("requirements.txt")
    assert "-r requirements.txt" in (ROOT / "requirements-gpu.txt").read_text().splitlines()
    assert not {*gpu} & {*tested} and gpu["triton"] == pins("requirements-test.txt")["triton"]
    assert gpu["cuda-toolkit"].startswith("13.0.") and any(name.startswith("nvidia-nccl") for name in gpu)


def test_the_page_has_an_install_line_of_flash_attention_for_each_pinned_torch():
    """The wheels of version 2 name torch's version; the one of version 3 fits all, and the Makefile takes it."""
    wheel = re.search(r"^FLASH_ATTENTION \?= (\S+)$", MAKEFILE, flags=re.M)[1]
    assert f"pip install --no-deps {wheel}\n" in GPUS_PAGE
    for name in ("requirements.txt", "requirements-h100.txt"):
        version = pins(name)["torch"]
        minor = version.rpartition(".")[0]
        assert f"torch {version}" in GPUS_PAGE and re.search(rf"pip install \S+/flash_attn-\S+torch{minor}-", GPUS_PAGE)


@pytest.fixture
def fake_venv(tmp_path):
    """Runs `make venv-gpu` on an environment whose Python writes its arguments down; returns the process and them."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$*" >>"$CALLS"\n'
        'case $* in -c*) exit "${WITHOUT_CUDA:-0}" ;; *--no-deps*) exit "${NO_WHEEL:-0}" ;; esac\n'
    )
    python.chmod(0o755)
    (folder / "installed").touch()

    def run(*arguments, **values):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {"PATH": os.environ["PATH"], "CALLS": str(calls), **values}
        done = run_command(["make", "-s", "venv-gpu", f"VENV={folder}", *arguments], cwd=ROOT, env=environment)
        return done, calls.read_text().splitlines(), (folder / "gpu").exists()

    return run


def test_make_venv_gpu_installs_torch_and_flash_attention(fake_venv):
    done, calls, complete = fake_venv()
    assert (done.returncode, done.stderr, complete) == (0, "", True)
    assert calls[0].endswith("-r requirements-gpu.txt") and "torch.version.cuda" in calls[1]
    assert calls[2].endswith("x86_64.whl") and len(calls) == 3
    assert fake_venv()[1] == []  # nothing is left to do


def test_make_venv_gpu_goes_without_flash_attention(fake_venv):
    done, calls, complete = fake_venv(NO_WHEEL="1")
    assert done.returncode == 0 and not complete and done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: venv-gpu: goes on without FlashAttention") and len(calls) == 3
    done, calls, complete = fake_venv("FLASH_ATTENTION=")
    assert (done.returncode, done.stderr, len(calls), complete) == (0, "", 2, True)


def test_make_venv_gpu_refuses_a_torch_without_cuda(fake_venv):
    done, calls, complete = fake_venv(WITHOUT_CUDA="1")
    assert done.returncode and "error: venv-gpu: the index serves a build of torch without CUDA" in done.stderr
    assert len(calls) == 2 and not complete


@pytest.mark.parametrize("name", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"])
def test_flash_attention_3_is_found_under_both_of_its_names(name, tmp_path, monkeypatch):
    file = tmp_path / (name.replace(".", "/") + ".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("def flash_attn_varlen_func(*arguments, causal):\n    return arguments[0], causal\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    for module in [name, *(["flash_attn_3"] if "." in name else [])]:
        monkeypatch.setitem(sys.modules, module, None)  # what the test imports is taken out again at its end
        monkeypatch.delitem(sys.modules, module)
    assert tg.flash_attention("fa3")("q", "k", "v", "bounds", 9, 0) == "q"
    with pytest.raises(TypeError, match="window_size"):  # a build without windows, which attention_fault finds
        tg.flash_attention("fa3")("q", "k", "v", "bounds", 9, 5)


def test_a_broken_flash_attention_3_says_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    with pytest.raises(ImportError, match="a_library_that_is_missing"):
        tg.flash_attention("fa3")


# ---------------------------------------------------------------------------------------------------------- the image


def ignored(path):
    """Whether .dockerignore leaves a path out: the last rule that names it or a folder above it decides."""
    out = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        parts = Path(path).parts
        names = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        patterns = [pattern, pattern.removeprefix("**/")]
        # A star does not cross folders.
        if any(fnmatch.fnmatch(n, p) and n.count("/") == p.count("/") for n in names for p in patterns):
            out = not rule.startswith("!")
    return out


def test_the_image_holds_the_sources_and_neither_data_nor_results():
    for path in (
        "train_gpt.py",
        "Makefile",
        "data/prepare.py",
        "tools/reproduce.py",
        "launch/job.sh",
        "bench/train.py",
    ):
        assert not ignored(path) and (ROOT / path).exists(), path
    for path in (".git/config", ".venv/bin/python", "data/sp8192/fineweb_val_000000.bin", "logs/log.txt", "results/x"):
        assert ignored(path), path
    assert ignored("__pycache__/x.pyc")


@pytest.fixture(scope="module")
def instructions():
    """The Dockerfile as (instruction, value), by a parser."""
    parser = pytest.importorskip(
        "dockerfile_parse", reason="dockerfile-parse is not installed (requirements-tools.txt)"
    )
    dockerfile = parser.DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
    return [(step["instruction"], step["value"]) for step in dockerfile.structure if step["instruction"] != "COMMENT"]


def test_the_dockerfile_is_pinned_and_ends_as_an_ordinary_user(instructions):
    known = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ARG", "ENV", "CMD"}
    names = [name for name, _ in instructions]
    assert {*names} == known and names[0] == "FROM" and names[-1] == "CMD"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", instructions[0][1])
    assert [value for name, value in instructions if name == "USER"] == ["golf"]
    command = json.loads(instructions[-1][1])
    assert os.access(ROOT / command[0], os.X_OK)


def test_what_the_dockerfile_copies_and_makes_exists(instructions):
    copied = set()
    for name, value in instructions:
        if name == "COPY":
            words = [word for word in value.split() if not word.startswith("--")]
            assert all((ROOT / word).exists() and not ignored(word) for word in words[:-1] if word != "."), value
            copied |= {*words[:-1]}
        if name == "RUN" and value.startswith("make "):
            goals = value.partition("&&")[0].split()[1:]
            files = {goal.replace(".venv/", "$(VENV)/") for goal in goals if goal not in TARGETS}
            assert "venv-gpu" in goals and all(f"\n{file}: " in MAKEFILE for file in files)
            # What these targets install from is there already.
            rules = re.findall(r"^\$\(VENV\)/([\w-]+): (.*)$", MAKEFILE, flags=re.M)
            needed = {
                w
                for goal, needs in rules
                if goal in ("installed", "gpu") or f"$(VENV)/{goal}" in files
                for w in needs.split()
            }
            assert {word for word in needed if word.startswith("requirements")} <= copied
    assert {"Makefile", "."} <= copied


# ------------------------------------------------------------------------------------------------------ their own tools


def shellcheck():
    """The program, from this environment or the path; skips the test where neither has it."""
    here = Path(sys.executable).with_name("shellcheck")
    found = str(here) if here.exists() else shutil.which("shellcheck")
    return found or pytest.skip("shellcheck is not installed (requirements-tools.txt)")


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shells_and_shellcheck_accept_the_scripts(script):
    assert os.access(script, os.X_OK)
    done = run_command(["bash", "-n", script])
    assert (done.returncode, done.stderr) == (0, "")
    done = run_command([shellcheck(), "--severity=style", script])
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shells_and_shellcheck_accept_the_tasks_commands(part, tmp_path):
    script = tmp_path / "part.sh"
    script.write_text("#!/usr/bin/env bash\n" + TASK[part])
    done = run_command(["bash", "-n", script])
    assert (done.returncode, done.stderr) == (0, "")
    done = run_command([shellcheck(), script])
    assert (done.returncode, done.stdout) == (0, "")


def test_the_task_asks_for_eight_h100s_and_ends_by_itself():
    assert {*TASK} <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert TASK["workdir"] == "." and TASK["envs"]["LAUNCH"] in ("first-hour", "seeds")
    assert all(isinstance(value, str) and value for value in TASK["envs"].values())  # an empty one would be required
    resources = TASK["resources"]
    assert resources["accelerators"] == "H100:8" and resources["autostop"] == {"idle_minutes": 60, "down": True}
    assert (
        "launch/job.sh" in TASK["run"] and TASK["setup"].startswith("set -e\n") and TASK["run"].startswith("set -e\n")
    )


def test_skypilot_reads_the_task(tmp_path):
    """SkyPilot is large and has an environment of its own; importing it writes to the home folder."""
    python = os.environ.get("SKYPILOT_PYTHON") or sys.executable
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('sky') is None)"
    if run_command([python, "-c", probe], env=environment, cwd=tmp_path).returncode:
        pytest.skip("skypilot 0.14.1 is not installed; SKYPILOT_PYTHON names the Python that has it")
    code = (
        "import json, sky; t = sky.Task.from_yaml('launch/skypilot.yaml'); r = next(iter(t.resources)); "
        "print(json.dumps([t.name, t.num_nodes, r.accelerators, r.disk_size, r.autostop_config.down, t.envs, t.run]))"
    )
    done = run_command([python, "-c", code], env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "golf",
        1,
        {"H100": 8},
        TASK["resources"]["disk_size"],
        True,
        TASK["envs"],
        TASK["run"],
    ]


def slurm_options():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sh").read_text(), flags=re.M)
    return dict(lines)


def test_slurm_is_asked_for_one_whole_node_of_eight_gpus():
    options = slurm_options()
    assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("1", "8", "1")
    assert options["mem"] == "0" and "exclusive" in options and re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    assert options["signal"] == "B:TERM@300" and len(options) == 10
    # Slurm stops reading options at the first command.
    text = (LAUNCH / "slurm.sh").read_text()
    assert text.rindex("#SBATCH") < text.index("\nset -euo pipefail")


@pytest.mark.skipif(not shutil.which("sbatch"), reason="sbatch is not installed")
def test_sbatch_accepts_the_script():
    done = run_command(["sbatch", "--test-only", LAUNCH / "slurm.sh"], cwd=ROOT)
    assert done.returncode == 0 or "invalid partition" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------- stand-ins

MAKE = """#!/bin/sh
printf '%s\\n' "make $* DEVICE=$DEVICE DATA_PATH=$DATA_PATH PRESET=$PRESET PYTHON=$PYTHON" >>"$CALLS"
folder=$(printf '%s' "$2" | sed -n 's/.*--out \\(results[^ ]*\\|\\/[^ ]*\\).*/\\1/p')
case $1 in first-hour | reproduce) mkdir -p "$folder" && echo "$1" >"$folder/report.md" ;; esac
if [ "$1" = "$TERM_DURING" ]; then kill -TERM "$BATCH"; sleep 1; fi
if [ "$1" = "$FAIL" ]; then exit 3; fi
"""
SRUN = """#!/bin/sh
printf '%s\\n' "srun $*" >>"$CALLS"
while case $1 in --*) true ;; *) false ;; esac; do shift; done
BATCH=$PPID exec "$@"
"""
SKY = """#!/bin/sh
printf '%s\\n' "sky $*" >>"$CALLS"
case $1 in launch) exit "${JOB:-0}" ;; esac
"""
RSYNC = """#!/bin/sh
printf '%s\\n' "rsync $*" >>"$CALLS"
[ -z "$NO_RESULTS" ] || exit 12
shift; echo report >"$2/report.md"
"""
UV = '#!/bin/sh\nprintf \'%s\\n\' "uv $*" >>"$CALLS"\necho /an/interpreter\n'


@pytest.fixture
def place(tmp_path):
    """A folder with launch/ alone, and a function that runs a command there with the stand-ins first on the path."""
    root, programs, calls = tmp_path / "golf", tmp_path / "bin", tmp_path / "calls"
    shutil.copytree(LAUNCH, root / "launch")
    programs.mkdir()
    for name, text in dict(make=MAKE, srun=SRUN, sky=SKY, rsync=RSYNC, uv=UV).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "scratch").mkdir()

    class Place:
        folder = root
        scratch = tmp_path / "scratch"

        @staticmethod
        def run(*command, cwd=root, **values):
            calls.write_text("")
            environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls)}
            done = run_command(command, cwd=cwd, env={**environment, **values})
            return done, calls.read_text().splitlines()

        @staticmethod
        def batch(**values):
            """As Slurm starts a script: a copy of it, from a folder of its own."""
            copy = tmp_path / "spool" / "slurm_script"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(LAUNCH / "slurm.sh", copy)
            slurm = dict(
                SLURM_SUBMIT_DIR=str(root), SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="64", SCRATCH=str(Place.scratch)
            )
            return Place.run("bash", copy, cwd=copy.parent, **slurm, **values)

    return Place


SETTINGS = "DEVICE=cuda DATA_PATH=data/sp8192 PRESET={} PYTHON="
DATA = "make data ARGS=sp8192-caseops --train-shards {} --out data/sp8192 " + SETTINGS.format("")
VENV = "make venv-gpu " + SETTINGS.format("")
HOUR = "make first-hour ARGS=--out results/first-hour/first-hour " + SETTINGS.format("")
SEEDS = (
    "make reproduce ARGS=--nproc 8 --work results/seeds/runs --out results/seeds/submission --with-artifacts "
    + SETTINGS.format("record")
)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, [VENV, DATA.format(20), HOUR]),
        ({"LAUNCH": "seeds"}, [VENV, DATA.format(80), SEEDS]),
        ({"LAUNCH": "seeds", "TRAIN_SHARDS": "3", "GPUS": "4"}, [VENV, DATA.format(3), SEEDS.replace("c 8", "c 4")]),
        ({"PREPARE": "0"}, [HOUR]),
    ],
)
def test_a_job_prepares_runs_and_keeps_its_results(values, expected, place):
    done, calls = place.run("launch/job.sh", **values)
    assert done.returncode == 0 and calls == expected
    results = place.folder / "results" / values.get("LAUNCH", "first-hour")
    report = results / ("submission" if "LAUNCH" in values else "first-hour") / "report.md"
    assert report.exists() and (results / "launch.log").read_text() == done.stdout
    assert [line.split()[2] for line in done.stdout.splitlines()] == [call.split()[1] for call in calls]


@pytest.mark.parametrize("failing, count", [("venv-gpu", 1), ("data", 2), ("first-hour", 3)])
def test_a_failing_step_ends_the_job_and_is_named(failing, count, place):
    done, calls = place.run("launch/job.sh", FAIL=failing)
    assert done.returncode == 3 and len(calls) == count
    log = (place.folder / "results" / "first-hour" / "launch.log").read_text()
    assert re.fullmatch(rf"error: exit code 3 of: make {failing}\b.*", log.splitlines()[-1])


def test_an_unknown_launch_is_refused(place):
    done, calls = place.run("launch/job.sh", LAUNCH="everything")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == "error: LAUNCH=everything: must be first-hour or seeds\n"


def test_slurm_brings_the_results_back(place):
    done, calls = place.batch(LAUNCH="seeds")
    assert done.returncode == 0 and done.stderr == ""
    assert calls[0] == "srun --ntasks=1 --cpus-per-task=64 --cpu-bind=none launch/job.sh"
    assert [call.split()[1] for call in calls[1:]] == ["venv-gpu", "data", "reproduce"]
    back = place.folder / "results" / "seeds-7"
    assert done.stdout.endswith(f"results: {back}\n")
    assert (back / "submission" / "report.md").read_text() == "reproduce\n"
    assert "make reproduce" in (back / "launch.log").read_text() and list(place.scratch.iterdir()) == []


def test_slurm_brings_the_results_of_a_failed_job_back(place):
    done, calls = place.batch(FAIL="first-hour")
    back = place.folder / "results" / "first-hour-7"
    assert done.returncode == 3 and (back / "first-hour" / "report.md").exists()
    assert "error: exit code 3 of: make first-hour" in (back / "launch.log").read_text() and len(calls) == 4


def test_slurm_brings_the_results_back_at_the_time_limit(place):
    """TERM reaches the batch script, as Slurm sends it some minutes before the end."""
    done, _ = place.batch(TERM_DURING="first-hour")
    back = place.folder / "results" / "first-hour-7"
    assert done.returncode == 143 and (back / "first-hour" / "report.md").read_text() == "first-hour\n"


def test_slurm_keeps_the_results_where_they_cannot_be_brought_back(place):
    (place.folder / "results").write_text("in the way\n")
    done, _ = place.batch()
    assert done.returncode == 1 and "error: the results are still in" in done.stderr
    assert len(list(place.scratch.glob("golf-7-*/results/first-hour/report.md"))) == 1


def test_slurms_script_needs_sbatch(place):
    done, calls = place.run("launch/slurm.sh")
    assert done.returncode and "run this with sbatch" in done.stderr and calls == []


def test_the_task_runs_the_job_with_its_own_python(place):
    done, calls = place.run("bash", "-c", TASK["run"], **TASK["envs"])
    assert done.returncode == 0 and calls[0] == "uv python find 3.11"
    assert calls[1:] == [
        call.removesuffix("PYTHON=") + "PYTHON=/an/interpreter" for call in (VENV, DATA.format(20), HOUR)
    ]


@pytest.mark.parametrize("job", [0, 100])
def test_skypilot_brings_the_results_back_and_ends_the_machine(job, place):
    done, calls = place.run("launch/skypilot.sh", "--infra", "gcp", LAUNCH="seeds", TARGET="back", JOB=str(job))
    assert done.returncode == job and done.stdout == "results: back\n"
    assert calls == [
        "sky launch --yes --cluster golf --env LAUNCH=seeds --infra gcp launch/skypilot.yaml",
        "rsync -az golf:sky_workdir/results/seeds/ back/",
        "sky down --yes golf",
    ]
    assert (place.folder / "back" / "report.md").exists()


@pytest.mark.parametrize("job, code", [(0, 1), (100, 100)])
def test_skypilots_machine_stays_where_no_results_came(job, code, place):
    done, calls = place.run("launch/skypilot.sh", JOB=str(job), NO_RESULTS="1", TARGET="back", CLUSTER="mine")
    assert done.returncode == code and "error: no results came from mine" in done.stderr
    assert [call.split()[:2] for call in calls] == [["sky", "launch"], ["rsync", "-az"]]
