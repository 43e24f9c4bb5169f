"""docs/tutorial.md is followed as it stands, in a copy of the repository, with a model that trains in seconds."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from helpers import ROOT, TINY, built_once, clean_environment, run_command

pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-tools.txt)")

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COPIED = (
    "train_gpt.py",
    "golf.py",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "bench",
    "data",
    "docs",
    "tools",
)
# The laboratory's smallest size, and its measurements, in small.
SMALL = (
    (
        "bench/lab_ideas.py",
        'Size("0.7M", 4, 128, 4, (1, 1), 3, 1536, 256, 26)',
        'Size("0.7M", 4, 64, 2, (1, 1), 3, 1536, 4, 1)',
    ),
    ("bench/lab.py", "STEPS_MEASURED, ROUNDS = 20, 3", "STEPS_MEASURED, ROUNDS = 2, 1"),
)


def commands():
    """The commands of the page's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def copy_of_the_project(folder):
    """What a clone has, with an environment that is this Python."""

    def ignored(where, names):
        scripts_alone = Path(where) == ROOT / "data"
        return [n for n in names if n == "__pycache__" or (scripts_alone and not n.endswith(".py"))]

    for path in [*(ROOT / name for name in COPIED), *ROOT.glob("requirements*.txt")]:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder / path.name)
    for name, before, after in SMALL:
        text = (folder / name).read_text()
        assert text.count(before) == 1
        (folder / name).write_text(text.replace(before, after))
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for name in ("installed", "tools", "data-tools"):  # after the requirements: make installs nothing
        (folder / ".venv" / name).touch()


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The copy in which the commands were given one by one, and what each printed."""

    def build(folder):
        copy_of_the_project(folder)
        tiny = {name: value for name, value in TINY.items() if name != "VOCAB_SIZE"}
        environment = clean_environment(tiny)
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "MAKEFLAGS"):
            environment.pop(name, None)
        plain = {name: value for name, value in environment.items() if name not in tiny}
        for number, command in enumerate(commands()):
            values = plain if "make lab" in command else environment
            done = run_command(["bash", "-c", "set -eo pipefail\n" + command], cwd=folder, env=values)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            (folder / f"printed-{number}").write_text(done.stdout)
            if command.startswith("sed "):
                shutil.copy(folder / "bench" / "lab_ideas.py", folder / "with-the-idea.py")

    return built_once(tmp_path_factory, "tutorial", build)


def printed(followed, part):
    """What the commands printed that hold these words."""
    found = [(followed / f"printed-{n}").read_text() for n, command in enumerate(commands()) if part in command]
    assert found
    return found


def test_a_folder_of_texts_becomes_a_sample(followed):
    text = printed(followed, "make mine")[0]
    assert "taken: .md: " in text and "$ " in text and "logs/tutorial/model.pgolf" in text
    assert text.rpartition("tools/generate.py logs/tutorial")[2].count("\n") >= 1
    assert printed(followed, "generate.py")[0].startswith("The run")
    assert (followed / "report" / "report.html").is_file() and "tutorial" in printed(followed, "make report")[0]


def test_an_idea_becomes_a_row_of_the_laboratory(followed):
    assert '    "short context": Row(dict(TRAIN_SEQ_LEN=128)),\n' in (followed / "with-the-idea.py").read_text()
    plan, done = printed(followed, "make lab")
    assert "0.7M  run   short context: " in plan and "at most " in plan
    assert " short context 0.7M 42 " in done and "written: lab.md" in done
    assert "| short context | 0.7M | 1 |" in (followed / "lab.md").read_text()
    ideas = (followed / "bench" / "lab_ideas.py").read_text()
    assert "short context" not in ideas and not os.path.exists(followed / "bench" / "lab_ideas.py.before")


def test_the_page_is_short_and_says_where_it_is_tested():
    assert "tests/test_tutorial.py" in PAGE and len(commands()) == 10
