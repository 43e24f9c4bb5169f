"""What guards a score is an exception and no `assert`: `python -O` removes every `assert`, and must change nothing.

Run as a script, it plants one violation in an evaluation and prints what came of it.
"""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import SCRIPT, TINY, fork, launch, tg
from test_legality import CHUNK, PHASED, evaluate, evaluator_of, stream

OPTIMIZED = dict(PYTHONOPTIMIZE=1)


def test_the_script_has_no_assert_statement():
    tree = ast.parse(SCRIPT.read_text())
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert found == [], f"assert statements in lines {found}"


def test_the_guards_raise_illegal_score():
    """Every guard of the ledger and of the evaluator is a `raise IllegalScore`, in the classes that keep the scores."""
    tree = ast.parse(SCRIPT.read_text())
    raising = {
        f"{owner.name}.{function.name}"
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for function in owner.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == "IllegalScore"
    }
    assert raising == {"ScoreLedger.score", "ScoreLedger.train_on", "ScoreLedger.close", "Evaluator.__init__"}


# ------------------------------------------------------------------------------------------------ planted, under -O


def scores_a_batch_twice():
    evaluate_batch = tg.PhasedTTT.score_and_adapt
    tg.PhasedTTT.score_and_adapt = lambda ttt, documents: [evaluate_batch(ttt, documents) for _ in range(2)]


def adapts_before_it_scores():
    """The ledger is told of a chunk's scores only when the whole batch is done."""
    score, evaluate_batch, held = tg.ScoreLedger.score, tg.PhasedTTT.score_and_adapt, []
    tg.ScoreLedger.score = lambda ledger, *entry: held.append(entry)

    def score_and_adapt(ttt, documents):
        evaluate_batch(ttt, documents)
        while held:
            score(ttt.ledger, *held.pop(0))

    tg.PhasedTTT.score_and_adapt = score_and_adapt


def trains_on_documents_to_come():
    train = tg.PhasedTTT.train_full_model
    tg.PhasedTTT.train_full_model = lambda ttt, documents: train(ttt, ttt.order[: len(documents) + 3])


def trains_on_the_next_chunk():
    step = tg.FullModelSGD.step
    tg.FullModelSGD.step = lambda sgd, positions, lr: step(sgd, np.minimum(positions + 24, len(sgd.tokens) - 2), lr)


def leaves_a_batch_out():
    batches = tg.LengthOrderTTT.batches
    tg.LengthOrderTTT.batches = lambda ttt, begin, end: list(batches(ttt, begin, end))[begin == 0 :]


def leaves_a_window_out():
    windows = tg.evaluation_windows
    tg.evaluation_windows = lambda *arguments: windows(*arguments)[1:]


def nothing():
    pass


SLIDING = dict(TTT_MODE="none", EVAL_SEQ_LEN=16, EVAL_STRIDE=5)
TWICE, BEFORE = "a target was scored twice", "a target would be trained on before it was scored"
PLANTED = {
    "nothing, phased": (nothing, PHASED, ""),
    "nothing, chunk": (nothing, CHUNK, ""),
    "a batch twice": (scores_a_batch_twice, PHASED, TWICE),
    "adapts first": (adapts_before_it_scores, PHASED, BEFORE),
    "documents to come": (trains_on_documents_to_come, PHASED, BEFORE),
    "the next chunk": (trains_on_the_next_chunk, CHUNK, BEFORE),
    "a batch left out": (
        leaves_a_batch_out,
        dict(PHASED, PHASED_TTT_PREFIX_DOCS=0),
        "targets were not scored exactly once",
    ),
    "a window left out": (leaves_a_window_out, SLIDING, "the windows of the evaluation do not cover every target once"),
}


@pytest.fixture(scope="module", params=[{}, OPTIMIZED], ids=["plain", "-O"])
def outcomes(request, tmp_path_factory):
    """(whether Python kept `assert`, what came of every planted violation), in a process of its own."""
    start = launch if request.param else fork  # -O needs an interpreter of its own
    done = start(Path(__file__), {"OMP_NUM_THREADS": 1, **request.param}, tmp_path_factory.mktemp("guards"))
    assert done.returncode == 0, done.stderr[-3000:]
    kept, found = json.loads(done.stdout.splitlines()[-1])
    assert kept == (not request.param)
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_ends_the_evaluation_with_or_without_asserts(name, outcomes):
    message = PLANTED[name][2]
    kind, text = outcomes[name]
    assert kind == ("IllegalScore" if message else "none") and message in text


def test_a_run_under_python_o_gives_the_same_artifact_and_scores(brief, tmp_path):
    """The real script from shards to test-time training, with PYTHONOPTIMIZE=1 and without."""
    values = dict(TINY, DATA_PATH=brief, ITERATIONS=3, NUM_LAYERS=2, RUN_ID="run", **PHASED)
    values |= dict(TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=32, TTT_BATCH_SIZE=8, GLOBAL_TTT_CHUNK_TOKENS=100)
    ends = []
    for name, more in (("plain", {}), ("optimized", OPTIMIZED)):
        (tmp_path / name).mkdir()
        done = (launch if more else fork)(SCRIPT, {**values, **more}, cwd=tmp_path / name)
        assert done.returncode == 0 and not done.stderr, done.stderr
        folder = tmp_path / name / "logs" / "run"
        summary = json.loads((folder / "summary.json").read_text())
        scores = {key: value for key, value in summary.items() if key.startswith("val_")}
        ends.append((scores, (folder / "model.pgolf").read_bytes()))
    assert ends[0] == ends[1] and ends[0][0]["val_bpb_ttt"] != ends[0][0]["val_bpb_quantized"]


def outcome(name, folder):
    """(type of the exception, its message) of an evaluation with a planted violation; what was planted is undone."""
    plant, knobs, _ = PLANTED[name]
    owners = (tg, tg.PhasedTTT, tg.LengthOrderTTT, tg.FullModelSGD, tg.ScoreLedger)
    before = [dict(vars(owner)) for owner in owners]
    try:
        plant()
        evaluator, model = evaluator_of(stream(), folder, TINY, knobs)
        evaluate(evaluator, model)
    except tg.IllegalScore as error:
        return "IllegalScore", str(error)
    finally:
        for owner, names in zip(owners, before, strict=True):
            for key, value in names.items():
                if vars(owner)[key] is not value:
                    setattr(owner, key, value)
    return "none", ""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print()
    print(json.dumps([__debug__, {name: outcome(name, folder) for name in PLANTED}]))
