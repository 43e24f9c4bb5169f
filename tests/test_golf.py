"""golf.py: a run's folder is all that its model needs, and a text's score is the one that an evaluation computes."""

import ast
import inspect
import json
import shutil

import numpy as np
import pytest
import torch

import golf
from helpers import (
    POLY_LIKE,
    RECORD_LIKE,
    ROOT,
    TINY,
    build_model,
    built_once,
    config,
    launch,
    snapshot,
    strings,
    tg,
    working_folder,
    write_shard,
)
from runs import UserError
from test_generate import caseops_tokenizer

RUN = dict(TINY, ITERATIONS=2, NUM_LAYERS=2, RUN_ID="run", SAVE_WEIGHTS=1, DATA_PATH="data", GPTQ_CALIBRATION_BATCHES=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A folder with data and logs/run, which was started there with a relative path."""

    def build(folder):
        shutil.copytree(data, folder / "data")
        with working_folder(folder):
            assert tg.main([], strings(RUN)) == 0

    return built_once(tmp_path_factory, "kept_model", build)


def write_run(folder, c, tokenizer):
    """A run's folder with a random model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    (folder / "model.pgolf").write_bytes(tg.pack(tg.quantize(weights, tg.Calibration({}), c), c))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def load(path, **knobs):
    return tg.load_model(path, **{"device": "cpu", "cpu_threads": 1, **knobs})


# ---------------------------------------------------------------------------------------------- what a run's folder has


def test_a_runs_folder_holds_its_tokenizer_and_names_its_data_from_there(trained, data):
    folder = trained / "logs" / "run"
    assert (folder / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["data_path"] == "../../data" and settings["tokenizer_path"] == ""


@pytest.mark.parametrize("how", ["its own tokenizer", "the data it names", "an older run's data", "an absolute path"])
def test_a_model_is_found_from_any_folder(how, trained, data, tmp_path, monkeypatch):
    shutil.copytree(trained / "logs" / "run", tmp_path / "a" / "run")
    folder, elsewhere = tmp_path / "a" / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    if how != "its own tokenizer":
        (folder / "tokenizer.model").unlink()
        place = tmp_path / "data" if how == "the data it names" else elsewhere / "data"
        shutil.copytree(data, place)
        paths = {"the data it names": "../../data", "an older run's data": "data"}
        settings["data_path"] = paths.get(how, str(place))
        (folder / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(elsewhere)
    before = snapshot(tmp_path)
    model, tokenizer = load(folder)
    assert tokenizer.encode("the river")[0] == tg.BOS_ID and model.generate("the", tokens=2).startswith("the")
    assert snapshot(tmp_path) == before


def test_paths_are_recorded_by_where_the_folder_really_is(tmp_path, monkeypatch):
    (tmp_path / "far" / "logs").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "logs").symlink_to(tmp_path / "far" / "logs")
    monkeypatch.chdir(tmp_path / "here")
    found = tg.recorded(tg.Path("logs/run"), config(DATA_PATH="data", TOKENIZER_PATH="/abs/t.model"))
    assert found["data_path"] == "../../../here/data" and found["tokenizer_path"] == "/abs/t.model"


def test_a_tokenizer_that_is_there_already_is_left_alone(trained, data, tmp_path):
    """The run's folder may be the data's own."""
    shutil.copytree(data, tmp_path / "data")
    other = caseops_tokenizer()
    (tmp_path / "data" / "tokenizer.model").write_bytes(other)
    values = dict(RUN, TOKENIZER_PATH=data / "tokenizer.model", ARTIFACT_DIR="data", SAVE_WEIGHTS=0)
    with working_folder(tmp_path):
        assert tg.main([], strings(values)) == 0
    assert (tmp_path / "data" / "tokenizer.model").read_bytes() == other


def test_save_weights_keeps_what_the_quantization_began_with(trained):
    found, settings = tg.read_tensors(trained / "logs" / "run" / "weights.safetensors")
    model, _ = load(trained / "logs" / "run")
    own = dict(model.gpt.named_parameters())
    assert {name: w.shape for name, w in found.items()} == {name: p.shape for name, p in own.items()}
    assert settings == json.loads(tg.to_json(tg.dataclasses.asdict(model.gpt.config)))
    assert all(w.dtype == torch.float32 for w in found.values())
    for name in tg.BANKS:  # near what the artifact holds, and finer than its grid
        error = (found[name] - own[name]).abs().mean() / found[name].abs().mean()
        assert 0 < error < 0.3, name  # GPTQ moves weights by more than their rounding
        assert len(found[name].unique()) > len(own[name].unique())


def test_weights_that_cannot_be_written_cost_the_run_nothing_else(data, tmp_path, capfd, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg, "write_tensors", refuse)
    with working_folder(tmp_path):
        code = tg.main([], strings(dict(RUN, DATA_PATH=data, CHECKPOINT_EVERY_SECONDS=0)))
    errors = capfd.readouterr().err
    assert code == tg.EXIT_ELSEWHERE and errors.count("weights.safetensors") == 1 and "No space left" in errors
    assert {"model.pgolf", "summary.json"} <= {p.name for p in (tmp_path / "logs" / "run").iterdir()}


# ------------------------------------------------------------------------------------------------------------ the score


@pytest.mark.parametrize("stride", [0, 8])
@pytest.mark.parametrize("base", [RECORD_LIKE, POLY_LIKE, TINY])
def test_a_texts_score_is_that_of_an_evaluation(base, stride, data, tmp_path, capfd):
    """MODE=eval on validation text of this one document: the same bits per byte."""
    text = "the river was quiet, and the café of the captain — 1999 — opened. " * 5
    c = config(base)
    folder = write_run(tmp_path / "logs" / "run", c, (data / "tokenizer.model").read_bytes())
    ids = tg.Vocabulary.read(data / "tokenizer.model")[0].EncodeAsIds(text)
    shards = tmp_path / "data"
    shards.mkdir()
    shutil.copyfile(data / "tokenizer.model", shards / "tokenizer.model")
    write_shard(shards / "fineweb_val_000000.bin", np.array([tg.BOS_ID, *ids], np.uint16))
    values = dict(PRESET="baseline", MODE="eval", TTT_MODE="none", DEVICE="cpu", COMPUTE_DTYPE="float32", CPU_THREADS=1)
    values |= dict(DATA_PATH=shards, RUN_ID="run", EVAL_SEQ_LEN=0, EVAL_STRIDE=stride, VAL_BATCH_SIZE=64)
    with working_folder(tmp_path):
        assert tg.main([], strings(values)) == 0, capfd.readouterr().err
    (folder / "eval_config.json").rename(folder / "config.json")  # it says the stride
    s = json.loads((folder / "eval_summary.json").read_text())
    model, tokenizer = load(folder)
    assert s["val_tokens"] == len(ids) > 3 * model.config.eval_context and s["val_bytes"] == len(text.encode())
    assert model.score(text) == pytest.approx(s["val_bpb"], abs=1e-6)
    assert model.config.eval_step == (stride or 32) and tokenizer.decode([1, *ids]) == text


def test_a_text_with_case_operators_counts_its_own_bytes(tmp_path):
    folder = write_run(tmp_path / "run", config(TINY), caseops_tokenizer())
    model, tokenizer = load(folder)
    text = "The HTTP server of McDonald — “Åse” \ue001 and MORE"
    ids = tokenizer.encode(text)
    assert tokenizer.caseops and tokenizer.decode(ids) == text
    assert tokenizer.target_bytes(np.array(ids)).sum() == len(text.encode())
    nats = model.losses(ids).sum()
    assert model.score(text) == pytest.approx(nats / np.log(2) / len(text.encode()))


def test_losses_are_those_of_the_logits(trained):
    model, tokenizer = load(trained / "logs" / "run")
    ids = tokenizer.encode("the river was quiet and the")
    rows = torch.log_softmax(model.logits(ids).double(), -1)
    expected = -rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert model.losses(ids) == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.isnan(model.score("")) and len(model.losses([1])) == 0


def test_a_generated_text_follows_its_seed(trained):
    model, _ = load(trained / "logs" / "run")
    texts = [model.generate("the", tokens=12, temperature=2.0, top_k=0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0] == "".join(
        model.stream("the", tokens=12, temperature=2.0, top_k=0, seed=1)
    )


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda m: m.logits([]), "1 to 32 tokens"),
        (lambda m: m.logits([1] * 33), "1 to 32 tokens"),
        (lambda m: m.logits([1, 384]), "from 0 to 383"),
        (lambda m: m.logits([1, -1]), "from 0 to 383"),
        (lambda m: m.score("a\udc80"), "character 2"),
        (lambda m: m.generate("\ud800"), "character 1"),
    ],
)
def test_what_a_model_cannot_take(use, words, trained):
    model, _ = load(trained / "logs" / "run")
    with pytest.raises(UserError, match=words):
        use(model)


def test_another_tokenizer_is_refused(trained, tmp_path):
    (tmp_path / "other.model").write_bytes(caseops_tokenizer())
    with pytest.raises(tg.ConfigError, match="another tokenizer"):
        load(trained / "logs" / "run", tokenizer=tmp_path / "other.model")


# ------------------------------------------------------------------------------------------------------------- the page


def code_blocks(language):
    """The blocks of code of docs/model.md."""
    text = (ROOT / "docs" / "model.md").read_text()
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_page_shows_what_python_does(trained, tmp_path):
    """docs/model.md's first example, as it stands, from the repository's folder, with a run's name in it."""
    example = code_blocks("python")[0].replace("logs/RUN", str(trained / "logs" / "run"))
    assert "from train_gpt import load_model" in example and example.count("print(") >= 3
    (tmp_path / "example.py").write_text(example)
    done = launch(tmp_path / "example.py", dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) >= 3


def test_the_interface_is_small():
    """At most 60 lines of code: without imports, docstrings, comments and blank lines."""
    text = (ROOT / "golf.py").read_text()
    tree = ast.parse(text)
    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    said = [n.body[0] for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    said = [n for n in said if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    others = {line for n in (*imports, *said) for line in range(n.lineno, n.end_lineno + 1)}
    code = [line for number, line in enumerate(text.splitlines(), 1) if number not in others]
    assert len([line for line in code if line.strip() and not line.strip().startswith("#")]) <= 60
    assert len(said) == 10  # each of them is documented, but for __init__


def test_the_product_has_the_same_function():
    assert tg.load_model.__doc__ and inspect.getdoc(golf.load_model)
