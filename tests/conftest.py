"""Fixtures of the whole suite."""

import json
import shutil
import signal

import pytest
import torch

from helpers import ROOT, TINY, built_once, launch, write_data

torch.set_num_threads(1)  # the tests run in parallel processes that share the cores


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a tokenizer of 384 tokens, shards of some 60,000 tokens and a manifest. Not to be changed."""
    return built_once(tmp_path_factory, "data", write_data)


@pytest.fixture(scope="session")
def validation_texts(data):
    """The documents of the validation shards."""
    return json.loads((data / "validation.json").read_text())


@pytest.fixture(scope="session")
def tiny(data):
    """Settings of a run that takes seconds."""
    return dict(TINY, DATA_PATH=str(data))


@pytest.fixture(scope="session")
def baseline(tmp_path_factory):
    """A worse submission's file, to compare with."""

    def build(folder):
        rows = {str(seed): dict(val_bpb=bpb) for seed, bpb in ((1, 3.3), (2, 3.301), (3, 3.302))}
        (folder / "submission.json").write_text(json.dumps(dict(seed_results=rows)))

    return built_once(tmp_path_factory, "baseline", build) / "submission.json"


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory, data, baseline):
    """A folder with three seeds' runs (`work`) and their submission with its artifacts (`out`). Not to be changed.

    The data lie beside them, so that what is written names no folder of the test run.
    """

    def build(folder):
        shutil.copytree(data, folder / "shards")
        shutil.copy(baseline, folder / "baseline.json")
        values = dict(TINY, DATA_PATH="shards", ITERATIONS=8)
        del values["SEED"]
        done = launch(
            ROOT / "tools" / "reproduce.py",
            values,
            "--work",
            "work",
            "--out",
            "out",
            "--baseline",
            "baseline.json",
            "--with-artifacts",
            "--author",
            "A. Author",
            cwd=folder,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        (folder / "out.txt").write_text(done.stdout)

    return built_once(tmp_path_factory, "reproduced", build)


@pytest.fixture
def command(capfd):
    """Run data/prepare.py in this process: (exit code, stdout, stderr). Signal handlers are put back."""
    import prepare

    def run(*arguments):
        held = {number: signal.getsignal(number) for number in prepare.SIGNALS}
        try:
            code = prepare.main([str(argument) for argument in arguments])
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
