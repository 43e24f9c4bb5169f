"""Fixtures of the whole suite."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; see train_gpt.py
import torch  # noqa: E402

import reproduce  # noqa: E402
from helpers import (  # noqa: E402
    TINY,
    built_once,
    environment,
    forking,
    working_folder,
    write_brief_data,
    write_data,
)

# A suite in the background, or under nohup, ignores these signals, and so would what it starts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

# `make test-fast` leaves out the tests that use these fixtures, which train, and those that this file lists.
SLOW_FIXTURES = {"reproduced", "whole_run", "followed"}
SLOW_LIST = Path(__file__).with_name("slow.txt")
FAST_SECONDS = 120  # of one idle core, for all the others together
# `make test` leaves out what this file lists, which `make test-thorough` runs.
THOROUGH_LIST = Path(__file__).with_name("thorough.txt")


def pytest_addoption(parser):
    parser.addoption(
        "--write-slow", action="store_true", help="write tests/slow.txt anew; for a whole run on idle cores"
    )


def pytest_collection_modifyitems(config, items):
    """Marks thorough tests, and slow ones: of the file only where it is not just being measured which these are."""
    left_out = thorough_tests(items, THOROUGH_LIST.read_text())
    for item in items:
        if item.nodeid in left_out:
            item.add_marker(pytest.mark.thorough)
    listed = set() if config.option.write_slow else set(SLOW_LIST.read_text().splitlines())
    for item in items:
        if function_of(item.nodeid) in listed or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def thorough_tests(items, listed):
    """The node ids of the tests that a list names: all values of a function, or all but every so many-th."""
    every = {name: int(number[0]) if number else 0 for name, *number in thorough_rules(listed)}
    seen, found = Counter(), set()
    for item in items:
        name = function_of(item.nodeid)
        if name in every:
            if not every[name] or seen[name] % every[name]:
                found.add(item.nodeid)
            seen[name] += 1
    return found


def thorough_rules(listed):
    """The lines of a list, each as its words: a test function and perhaps a number."""
    return [line.split() for line in listed.splitlines() if line and not line.startswith("#")]


def function_of(nodeid):
    """A test's file and function, without its parameters and its folder."""
    return nodeid.split("[")[0].split("/")[-1]


def pytest_configure(config):
    if config.option.write_slow and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SlowList())


class SlowList:
    """Adds up what each test function takes, and lists the longest until the rest fits into FAST_SECONDS."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        if not {"slow", "thorough"} & set(report.keywords):  # what `make test-fast` leaves out anyway
            self.seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        left, slow = sum(self.seconds.values()), []
        for name, seconds in self.seconds.most_common():
            if left <= FAST_SECONDS:
                break
            left -= seconds
            slow.append(name)
        SLOW_LIST.write_text("".join(f"{name}\n" for name in sorted(slow)))


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def own_signals():
    """Tests begin with the process's own signal handlers: data/prepare.py, run in a test, leaves those of a command."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run in parallel processes that share the cores. A run in this process takes all of them, for good.

    With as many threads as cores in each process, small operations wait for each other ten times as long.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_products_are_exact():
    """Products of float32 in float32: a run in this process lets GPUs round their operands to TF32, for good."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", autouse=True)
def scripts_are_packed_once(tmp_path_factory):
    """What tests/startup does in the processes that tests start."""
    folder = built_once(tmp_path_factory, "packed_once", lambda folder: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKED_ONCE", str(folder))
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("startup")), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a tokenizer of 384 tokens, shards of some 60,000 tokens and a manifest. Not to be changed."""
    return built_once(tmp_path_factory, "data", write_data)


@pytest.fixture(scope="session")
def brief(tmp_path_factory, data):
    """Such a folder with some 1,000 tokens of validation text, for runs that are not about its size."""
    return built_once(tmp_path_factory, "brief", lambda folder: write_brief_data(folder, data))


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
        arguments = ["--work", "work", "--out", "out", "--baseline", "baseline.json", "--with-artifacts", "--author"]
        with environment(values), working_folder(folder), forking():
            assert reproduce.main([*arguments, "A. Author"]) == 0

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
