"""bench/against.py: ratios of what two versions measured, and its errors."""

import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import against  # noqa: E402


def test_rates_and_ratios():
    train = dict(
        rows=[dict(order="plain", part="whole step", tokens_per_second=8.0), dict(order="looped", part="step")]
    )
    assert against.rates(train) == {"plain whole step": 8.0}
    assert against.rates(dict(rows=[dict(name="phased", targets_per_second=3)])) == {"phased": 3.0}
    rounds = [({"a": 6.0, "b": 1.0}, {"a": 2.0}), ({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 4.0})]
    assert against.ratios(rounds) == {"a": [3.0, 0.5]}


def test_trees_take_turns(monkeypatch, tmp_path):
    order = []

    def measure(tree, command, file):
        order.append((command[0], tree == against.ROOT))
        return {"x": 2.0 if tree == against.ROOT else 1.0}

    monkeypatch.setattr(against, "measure", measure)
    found = against.compare(tmp_path / "other", 2)
    assert found == {"training: x": [2.0, 2.0], "evaluation: x": [2.0, 2.0]}
    assert [own for name, own in order if name == "bench/train.py"] == [True, False, False, True]


@pytest.mark.parametrize(
    "arguments, words", [(["no-such-commit"], "no-such-commit"), (["HEAD", "--rounds", "0"], "--rounds 0")]
)
def test_errors_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        against.main(arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_benchmark_that_fails_ends_the_comparison(tmp_path):
    with pytest.raises(SystemExit, match="missing.py"):
        against.measure(tmp_path, ["missing.py"], tmp_path / "result.json")
