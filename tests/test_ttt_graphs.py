"""TTT_CUDA_GRAPHS without a GPU: what a CUDA graph repeats is emulated, operation by operation, on the same memory."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import TINY, tg
from test_ttt import PHASED, RECORD, method_of, stream
from test_ttt import prepared as prepared_in

TOKENS = stream((120, 7, 90, 1, 100, 45, 8, 24))
STREAM = dict(PHASED, TTT_ORDER="stream", TTT_LORA_LR=0.05, PHASED_TTT_PREFIX_DOCS=3)
CASES = {
    "cache": (RECORD, dict(STREAM, TTT_RECOMPUTE_TOKENS=7)),
    "cache, two steps": (TINY, dict(STREAM, TTT_RECOMPUTE_TOKENS=3, TTT_GRAD_STEPS=2)),
    "whole contexts": (RECORD, STREAM),
    "hints": (TINY, dict(STREAM, TTT_RECOMPUTE_TOKENS=3, HINT_ENABLED=1)),
    "no second moments": (TINY, dict(STREAM, TTT_RECOMPUTE_TOKENS=3, TTT_BETA2=0.0)),
    "by length": (RECORD, PHASED),
}


def written(func, args, kwargs):
    """The tensors that an operation changes in place."""
    kwargs = kwargs or {}
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, torch.Tensor))


class Recording(TorchDispatchMode):
    """Operations with the tensors that they take and give. Like CUDA, it forgets all that Python did between them.

    Unlike CUDA, it lets Python look at numbers, as code for CPUs does; `make check-h100` counts that for a GPU.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.undo = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.undo += [(x, x.clone()) for x in written(func, args, kwargs)]
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def take_back(self):
        """A recorded computation has not happened."""
        for x, before in reversed(self.undo):
            if x.shape == before.shape:  # else an operation has made it anew
                x.copy_(before)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                shared = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in shared:
                        old.copy_(new)


def recorded(compute):
    with Recording() as recording:
        compute()
    with torch.no_grad():
        recording.take_back()
    return recording


class Recorder:
    """Stands for `CUDAGraphRecorder`."""

    def record(self, compute):
        return recorded(compute).replay


def prepared(folder, data, case):
    folder.mkdir(exist_ok=True)
    base, knobs = CASES[case]
    return prepared_in(folder, data, base, TOKENS, **knobs, ATTENTION="sdpa")


def run(folder, data, case, adapt=True, graphs=False):
    """The method of the settings after it has scored everything."""
    evaluator, model = prepared(folder, data, case)
    ttt = method_of(evaluator.config)(evaluator, model, adapt)
    ttt.graphs.enabled = graphs
    ttt()
    return ttt


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(tg, "CUDAGraphRecorder", Recorder)
    monkeypatch.setattr(tg, "GRAPH_AFTER", 2)


def assert_same(found, expected):
    np.testing.assert_allclose(found.ledger.nll, expected.ledger.nll, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.ledger.log_q, expected.ledger.log_q, rtol=0, atol=1e-12)
    for key in expected.phase_a if expected.adapters else ():
        torch.testing.assert_close(found.phase_a[key], expected.phase_a[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_window_scores_and_learns_as_a_plain_one(tmp_path, data, emulated, case):
    expected, found = (run(tmp_path / str(graphs), data, case, graphs=graphs) for graphs in (False, True))
    assert expected.graphs.replayed == 0 and found.graphs.replayed > 7 and found.graphs.enabled
    assert_same(found, expected)


def test_without_learning_too(tmp_path, data, emulated):
    expected, found = (run(tmp_path / str(on), data, "cache", adapt=False, graphs=on) for on in (False, True))
    assert found.graphs.replayed > 7
    assert_same(found, expected)


def test_a_graph_is_kept_for_later_batches(tmp_path, data, emulated):
    found = run(tmp_path, data, "cache", graphs=True)
    assert found.graphs.replayed > 3 * len(found.graphs.graphs) > 0


@pytest.mark.parametrize("case", ["cache", "whole contexts"])
def test_windows_of_many_documents_and_shapes_that_change_are_not_recorded(tmp_path, data, emulated, monkeypatch, case):
    monkeypatch.setattr(tg, "GRAPH_DOCUMENTS", 1)  # windows have two rows at least
    assert run(tmp_path / "many", data, case, graphs=True).graphs.replayed == 0
    monkeypatch.setattr(tg, "GRAPH_DOCUMENTS", 32)
    monkeypatch.setattr(tg, "GRAPH_AFTER", 100)
    assert run(tmp_path / "rare", data, case, graphs=True).graphs.replayed == 0


def idle(compute):
    recorded(compute)
    return lambda: None


def without_learning(compute):
    recording = recorded(compute)
    recording.operations = [x for x in recording.operations if "adamw" not in str(x[0])]
    return recording.replay


def impossible(compute):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (idle, "a replay does not give what the plain pass does"),
        (without_learning, "a replay does not give what the plain pass does"),
        (impossible, "CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_a_graph_that_fails_is_left_out_and_changes_no_score(
    tmp_path, data, emulated, monkeypatch, capsys, record, why
):
    expected = run(tmp_path / "plain", data, "hints")
    monkeypatch.setattr(Recorder, "record", lambda self, compute: record(compute))
    found = run(tmp_path / "graphs", data, "hints", graphs=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert lines == [f"ttt: no CUDA graphs from here on: {why}"]
    assert not found.graphs.enabled and found.graphs.replayed == 0
    assert_same(found, expected)
