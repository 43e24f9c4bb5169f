"""The table of knobs, presets, errors, help, dry run; and what holds for the source of train_gpt.py as a whole."""

import ast
import dataclasses
import json
import re
import sys

import pytest

import train_gpt as tg
from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    clean_environment,
    config,
    knob_names,
    run_command,
    run_script,
    snapshot,
    strings,
    write_shard,
)

SOURCE = SCRIPT.read_text()
TREE = ast.parse(SOURCE)
FIELDS = dataclasses.fields(tg.Config)
WIDE = dict(TINY, MODEL_DIM=256, NUM_LAYERS=6, TRAIN_SEQ_LEN=256, TRAIN_BATCH_TOKENS=4096, MAX_WALLCLOCK_SECONDS=110)


def error_of(values, world=1):
    """The message for a wrong setting, up to the layout of the batch."""
    with pytest.raises(tg.ConfigError) as caught:
        tg.batch_layout(config(WIDE, **values), world)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- wrong values

# variable, settings, what the message must hold beside NAME=value
WRONG = [
    ("ITERATIONS", dict(ITERATIONS="ten"), "an integer"),
    ("ITERATIONS", dict(ITERATIONS="1e3"), "an integer"),
    ("NUM_LAYERS", dict(NUM_LAYERS="2.5"), "an integer"),
    ("MATRIX_LR", dict(MATRIX_LR="fast"), "number"),
    ("MATRIX_LR", dict(MATRIX_LR="nan"), "finite"),
    ("SCALAR_LR", dict(SCALAR_LR="inf"), "finite"),
    ("LN_SCALE", dict(LN_SCALE="maybe"), "0 or 1"),
    ("NUM_LAYERS", dict(NUM_LAYERS="0"), "from 1 to 256"),
    ("MATRIX_BITS", dict(MATRIX_BITS="9"), "from 2 to 8"),
    ("MATRIX_LR", dict(MATRIX_LR="-0.1"), "at least 0"),
    ("BETA2", dict(BETA2="1.0"), "from 0 to"),
    ("VOCAB_SIZE", dict(VOCAB_SIZE="70000"), "65536"),
    ("COMPRESSOR", dict(COMPRESSOR="rar"), "zstd, brotli, lzma"),
    ("MODE", dict(MODE="test"), "all, train, eval"),
    ("COMPUTE_DTYPE", dict(COMPUTE_DTYPE="float16"), "bfloat16, float32, float64"),
    ("PRESET", dict(PRESET="big"), "demo, baseline, record, poly5"),
    ("NUM_HEADS", dict(NUM_HEADS="7"), "MODEL_DIM=256"),
    ("NUM_HEADS", dict(NUM_HEADS="256"), "even"),
    ("NUM_KV_HEADS", dict(NUM_KV_HEADS="3"), "NUM_HEADS=4"),
    ("ROPE_DIMS", dict(ROPE_DIMS="15"), "even"),
    ("ROPE_DIMS", dict(ROPE_DIMS="128"), "64"),
    ("KEY_OFFSET", dict(KEY_OFFSET="1", ROPE_DIMS="64"), "from 2 to 62"),
    ("KEY_OFFSET", dict(KEY_OFFSET="1", ROPE_DIMS="0"), "from 2 to 62"),
    ("GATED_ATTN_ENABLED", dict(SPARSE_ATTN_GATE_ENABLED="1", GATED_ATTN_ENABLED="1"), "SPARSE_ATTN_GATE_ENABLED"),
    ("XSA_LAST_N", dict(XSA_LAST_N="99"), "NUM_LAYERS=6"),
    ("GATE_WINDOW", dict(GATE_WINDOW="300"), "MODEL_DIM=256"),
    ("LOOP_END", dict(NUM_LOOPS="1", LOOP_END="6"), "NUM_LAYERS=6"),
    ("LOOP_START", dict(NUM_LOOPS="1", LOOP_START="5", LOOP_END="4"), "LOOP_END=4"),
    ("PARALLEL_START_LAYER", dict(PARALLEL_START_LAYER="1"), "from 3 to 5"),
    ("PARALLEL_START_LAYER", dict(PARALLEL_START_LAYER="6"), "from 3 to 5"),
    ("PARALLEL_START_LAYER", dict(PARALLEL_START_LAYER="3", NUM_LOOPS="1", LOOP_START="2", LOOP_END="4"), "to 5"),
    ("TRAIN_BATCH_TOKENS", dict(TRAIN_BATCH_TOKENS="4097"), "TRAIN_SEQ_LEN=256"),
    ("EVAL_STRIDE", dict(EVAL_STRIDE="257"), "256"),
    ("GPTQ_RESERVE_SECONDS", dict(GPTQ_RESERVE_SECONDS="110"), "MAX_WALLCLOCK_SECONDS=110"),
    ("GPTQ_RESERVE_SECONDS", dict(GPTQ_RESERVE_SECONDS="-0.5"), "-1 to measure it"),
    ("MUON_MOMENTUM_WARMUP_START", dict(MUON_MOMENTUM_WARMUP_START="0.99"), "MUON_MOMENTUM=0.95"),
    ("MLP_MULT", dict(MLP_MULT="0.01", MODEL_DIM="16", NUM_HEADS="4"), "at least 1"),
    ("ARTIFACT_LIMIT_BYTES", dict(ARTIFACT_LIMIT_BYTES="16e6"), "an integer"),
    ("SMEAR_GATE_TYPE", dict(SMEAR_GATE_TYPE="wide"), "window, channel"),
    ("BIGRAM_VOCAB_SIZE", dict(BIGRAM_VOCAB_SIZE="1"), "at least 2"),
    ("BIGRAM_SIGNS", dict(BIGRAM_SIGNS="1"), "BIGRAM_VOCAB_SIZE above 0"),
    *(
        ("VE_LAYERS", dict(VE_DIM="8", VE_LAYERS=value), "below NUM_LAYERS=6")
        for value in ("9,10", "1,1", "1;2", "a", "-1", "1,,2", "9" * 5000)
    ),
    ("WINDOW_ATTN_SIZE", dict(WINDOW_ATTN_SIZE="-2"), "from 0 to 65536"),
    *(
        ("WINDOW_ATTN_LAYERS", dict(WINDOW_ATTN_SIZE="8", WINDOW_ATTN_LAYERS=value), "below NUM_LAYERS=6")
        for value in ("6", "1,1", "1;2", "a", "1,,2")
    ),
    *(
        ("PROGRESSIVE_DEPTH_SCHEDULE", dict(PROGRESSIVE_DEPTH_SCHEDULE=value), "rising order")
        for value in ("0.3,0.2", "0.2,0.2", "1", "0,0.5", "nan", "0.1;0.2", "0.1,,0.2")
    ),
    ("PROGRESSIVE_DEPTH_SCHEDULE", dict(PROGRESSIVE_DEPTH_SCHEDULE="0.1,0.2", NUM_LAYERS="2"), "NUM_LAYERS=2"),
    *(("MTP_WEIGHTS", dict(MTP_WEIGHTS=value), "above 0") for value in ("0", "0.5,,1", "-1", "nan", "1;2", "101")),
    ("MTP_WEIGHTS", dict(MTP_WEIGHTS="1,1", TRAIN_SEQ_LEN="2"), "TRAIN_SEQ_LEN=2"),
    ("WEIGHT_AVERAGE", dict(WEIGHT_AVERAGE="ema"), "EMA_DECAY"),
    ("WEIGHT_AVERAGE", dict(WEIGHT_AVERAGE="swa", EMA_DECAY="0.9"), "SWA_ENABLED=1"),
    ("COLUMN_STEPS", dict(QUANTIZER="gptq_lite", COLUMN_STEPS="0.5"), "QUANTIZER=gptq_lite"),
    ("TEMPERATURE", dict(TEMPERATURE="0"), "0.01"),
]


@pytest.mark.parametrize("name, values, allowed", WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_named_with_what_is_allowed(name, values, allowed):
    message = error_of(values)
    assert "\n" not in message
    value = values[name]
    assert re.match(rf"{name}=({re.escape(value)}|True)\b", message), message  # a switch is shown as Python shows it
    assert allowed in message


@pytest.mark.parametrize("world", range(2, 9))
def test_every_world_size_that_does_not_divide_the_sequences_is_refused(world):
    values = dict(TRAIN_SEQ_LEN="256", TRAIN_BATCH_TOKENS=str(256 * 840 + 256))  # 841 = 29 * 29 sequences
    message = error_of(values, world)
    assert message.startswith("TRAIN_BATCH_TOKENS=215296: ") and f"{world} ranks" in message
    assert str(world * 256) in message  # the multiple that is needed


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8])
def test_world_sizes_that_divide_share_all_sequences_out(world):
    layout = tg.batch_layout(config(TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=16 * 840, MICRO_BATCH_TOKENS=16 * 9), world)
    assert (
        layout.sequences == 840 == layout.world * layout.micro_steps * layout.micro_sequences and layout.world == world
    )
    assert 1 <= layout.micro_sequences <= 9
    # No larger micro-batch would do.
    assert not [n for n in range(layout.micro_sequences + 1, 10) if (840 // world) % n == 0]


def test_a_sequence_longer_than_the_micro_batch_is_computed_alone():
    layout = tg.batch_layout(config(MICRO_BATCH_TOKENS=8), 2)  # sequences of 32
    assert (layout.micro_sequences, layout.micro_steps) == (1, 12)
    assert str(layout) == "batch: 24 sequences = 2 ranks x 12 micro-steps x 1"
    assert str(tg.BatchLayout(8, 1, 1, 8)) == "batch: 8 sequences = 1 rank x 1 micro-step x 8"


# ------------------------------------------------------------------------------- the script's answer to wrong settings


def run_main(values, folder, capfd, monkeypatch, arguments=()):
    """main() in this process and folder: exit code, standard error."""
    monkeypatch.chdir(folder)
    capfd.readouterr()
    code = tg.main(list(arguments), strings(values))
    return code, capfd.readouterr().err


def refused(values, folder, capfd, monkeypatch, arguments=()):
    """Asserts exit code 2, one line, and an untouched folder; returns the line."""
    before = snapshot(folder)
    code, errors = run_main(values, folder, capfd, monkeypatch, arguments)
    assert code == 2
    assert len(errors.splitlines()) == 1 and "Traceback" not in errors, errors
    assert errors.startswith("error: ")
    assert snapshot(folder) == before
    return errors


def copy_data(data, folder, skip=()):
    """A data folder of links, without some of its files."""
    target = folder / "data"
    target.mkdir()
    for path in data.iterdir():
        if path.name not in skip:
            (target / path.name).symlink_to(path)
    return target


def test_a_missing_folder_of_shards(tiny, tmp_path, capfd, monkeypatch):
    line = refused(dict(tiny, DATA_PATH="no/such"), tmp_path, capfd, monkeypatch)
    assert "DATA_PATH=no/such" in line and "prepare.py" in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_shards_of_a_split(split, tiny, data, tmp_path, capfd, monkeypatch):
    names = [p.name for p in data.glob(f"fineweb_{split}_*")]
    folder = copy_data(data, tmp_path, names)
    line = refused(dict(tiny, DATA_PATH=folder), tmp_path, capfd, monkeypatch)
    assert f"DATA_PATH={folder}" in line and f"fineweb_{split}_[0-9]*.bin" in line and "prepare.py" in line


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["magic", "truncated", "short header", "empty", "too long"])
def test_a_damaged_shard(damage, split, tiny, data, tmp_path, capfd, monkeypatch):
    name = f"fineweb_{split}_000001.bin"
    folder, content = copy_data(data, tmp_path, [name]), (data / name).read_bytes()
    shard = folder / name
    shard.write_bytes(
        {
            "magic": b"\x00" + content[1:],
            "truncated": content[:-2],
            "short header": content[:600],
            "empty": b"",
            "too long": content + b"\x00\x00",
        }[damage]
    )
    line = refused(dict(tiny, DATA_PATH=folder), tmp_path, capfd, monkeypatch)
    assert str(shard) in line
    assert ("header" in line) if damage in ("magic", "short header", "empty") else ("tokens" in line)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_beyond_the_vocabulary(split, tiny, data, tmp_path, capfd, monkeypatch):
    name = f"fineweb_{split}_000001.bin"
    folder = copy_data(data, tmp_path, [name])
    tokens = tg.open_shard(data / name).copy()
    tokens[1000::50] = 384
    write_shard(folder / name, tokens)
    line = refused(dict(tiny, DATA_PATH=folder), tmp_path, capfd, monkeypatch)
    assert str(folder / name) in line and "384" in line


def test_a_training_text_shorter_than_a_sequence(tiny, tmp_path, capfd, monkeypatch):
    values = dict(tiny, TRAIN_SEQ_LEN=100_000, TRAIN_BATCH_TOKENS=100_000)
    assert "TRAIN_SEQ_LEN=100000" in refused(values, tmp_path, capfd, monkeypatch)


def test_a_missing_tokenizer(tiny, data, tmp_path, capfd, monkeypatch):
    folder = copy_data(data, tmp_path, ["tokenizer.model"])
    line = refused(dict(tiny, DATA_PATH=folder), tmp_path, capfd, monkeypatch)
    assert f"TOKENIZER_PATH={folder / 'tokenizer.model'}" in line


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 50])
def test_a_file_that_is_no_tokenizer(content, tiny, tmp_path, capfd, monkeypatch):
    (tmp_path / "garbage.model").write_bytes(content)
    line = refused(dict(tiny, TOKENIZER_PATH="garbage.model"), tmp_path, capfd, monkeypatch)
    assert "TOKENIZER_PATH=garbage.model" in line and "SentencePiece" in line


def test_a_vocabulary_that_is_not_the_tokenizers(tiny, tmp_path, capfd, monkeypatch):
    line = refused(dict(tiny, VOCAB_SIZE=512), tmp_path, capfd, monkeypatch)
    assert "VOCAB_SIZE=512" in line and "384" in line


@pytest.mark.parametrize("mark", ["log.txt", "config.json", "model.pgolf", "summary.json"])
def test_a_folder_that_holds_a_run_is_not_written_over(mark, tiny, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / mark).write_text("precious")
    line = refused(dict(tiny, ARTIFACT_DIR="taken"), tmp_path, capfd, monkeypatch)
    assert "ARTIFACT_DIR=taken" in line and "already holds a run" in line


def test_a_run_id_whose_folder_holds_a_run(tiny, tmp_path, capfd, monkeypatch):
    (tmp_path / "logs" / "first").mkdir(parents=True)
    (tmp_path / "logs" / "first" / "log.txt").write_text("precious")
    assert "RUN_ID=" in refused(dict(tiny, RUN_ID="first"), tmp_path, capfd, monkeypatch)


def test_a_folder_that_cannot_be_made(tiny, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("")
    line = refused(dict(tiny, ARTIFACT_DIR="file/run"), tmp_path, capfd, monkeypatch)
    assert "ARTIFACT_DIR=file/run" in line and "can be written to" in line


def test_a_world_size_that_does_not_divide_is_refused_before_anything_starts(tiny, tmp_path, capfd, monkeypatch):
    values = dict(tiny, WORLD_SIZE=5, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=5)
    line = refused(values, tmp_path, capfd, monkeypatch)
    assert "TRAIN_BATCH_TOKENS=768" in line and "5 ranks" in line


def test_a_preset_for_gpus_does_not_fall_back_to_cpus_in_silence(tmp_path, capfd, monkeypatch):
    """A driver that is too old for PyTorch looks like a machine without a GPU."""
    ranks = dict(WORLD_SIZE=8, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=8)
    for preset in ("record", "poly5", "frontier"):
        line = refused(dict(ranks, PRESET=preset), tmp_path, capfd, monkeypatch)
        assert "DEVICE=auto" in line and "DEVICE=cpu takes CPUs" in line
        line = refused(dict(ranks, PRESET=preset, DEVICE="cpu", WORLD_SIZE=5), tmp_path, capfd, monkeypatch)
        assert "5 ranks" in line  # the next check


def test_an_evaluations_own_settings_are_held_against_the_artifact_not_the_preset():
    """Which context there is, the artifact says: a stride of 300 may be right for a model of longer rows."""
    c = tg.config_from_env({"PRESET": "demo", "MODE": "eval", "EVAL_STRIDE": "300", "DEVICE": "cpu"}, False)[0]
    assert c.eval_stride == 300


def test_evaluation_without_an_artifact(tiny, tmp_path, capfd, monkeypatch):
    assert "RUN_ID" in refused(dict(tiny, MODE="eval"), tmp_path, capfd, monkeypatch)
    line = refused(dict(tiny, MODE="eval", RUN_ID="never"), tmp_path, capfd, monkeypatch)
    assert "RUN_ID=" in line and "never" in line and "model.pgolf" in line


def test_an_unknown_argument(tiny, tmp_path, capfd, monkeypatch):
    for word in ("--iterations=5", "train", "--modes", "--modest=train"):
        assert f"argument={word}" in refused(tiny, tmp_path, capfd, monkeypatch, [word])


@pytest.mark.parametrize("arguments", [["--mode"], ["--mode="], ["--mode", "evil"], ["--mode=evil"]])
def test_a_wrong_mode_argument(arguments, tiny, tmp_path, capfd, monkeypatch):
    assert "mode" in refused(tiny, tmp_path, capfd, monkeypatch, arguments).lower()


def test_a_second_rounding_and_a_byte_target_exclude_each_other():
    with pytest.raises(tg.ConfigError, match="^RVQ_ENABLED=1: must be 0 with TARGET_BYTES"):
        config(RVQ_ENABLED=1, TARGET_BYTES=10**6)


def test_no_steps_at_all_is_refused_or_runs(tiny, tmp_path, capfd, monkeypatch):
    """ITERATIONS=0: a clear line, or a run of the initial weights; never a traceback."""
    code, errors = run_main(dict(tiny, ITERATIONS=0, RUN_ID="zero"), tmp_path, capfd, monkeypatch)
    assert (code == 2 and "ITERATIONS=0" in errors) or (code == 0 and not errors)


def test_the_real_script_answers_like_main(tiny, tmp_path):
    done = run_script(dict(tiny, NUM_HEADS=5), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: NUM_HEADS=5: must divide MODEL_DIM=32"]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- knobs and presets


def test_every_knob_says_what_it_means_and_what_is_allowed():
    for f in FIELDS:
        assert f.type in ("int", "float", "bool", "str"), f.name
        assert isinstance(f.default, {"int": int, "float": float, "bool": bool, "str": str}[f.type]), f.name
        assert set(f.metadata) == {"meaning", "observed", "low", "high", "choices"}, f.name
        assert isinstance(f.metadata["observed"], tg.Observed), f.name  # tests/test_knobs.py: that it is true
        low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
        if low is not None:
            assert low <= f.default, f.name
        if high is not None:
            assert f.default <= high, f.name
        if choices:
            assert f.default in choices, f.name
        if f.type in ("int", "float"):
            assert low is not None, f"{f.name} has no lower bound"


# Words by which a meaning would lean on the line before it, at its beginning and anywhere.
LEANING = r"(its|their|it|they|them|this|that|these|those|such|(the )?(same|other|latter|former)|as above|times that)"
REFERENCES = (
    r"(the (same|latter|former)|as above|see above|meanwhile|(in|of|from|to|with|by|for|on|at) (it|them|these))"
)
ZERO_IS_A_NUMBER = ("seed", "loop_start", "loop_end", "allow_shared_documents", "artifact_limit_bytes")


def meaning_problem(meaning):
    """Why a meaning does not stand alone in --help, or None."""
    if re.match(rf"{LEANING}\b", meaning, re.I):
        return "leans on the line before, at its beginning"
    if re.match(r"the \w+ in (it|them)\b", meaning) or re.search(rf"\b{REFERENCES}\b", meaning, re.I):
        return "refers to something that is not said"
    if len(meaning.split()) < 2 or meaning != meaning.strip() or meaning.endswith("."):
        return "is no phrase"
    return None


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name.upper())
def test_every_meaning_stands_alone(field):
    meaning, choices = field.metadata["meaning"], field.metadata["choices"]
    assert meaning_problem(meaning) is None
    assert sum(f.metadata["meaning"] == meaning for f in FIELDS) == 1
    for choice in choices or ():
        assert re.search(rf"\b{choice}\b", meaning) or set(choices) == {"auto", "0", "1"}, f"{choice} is not explained"
    # What leaves a choice to the program says to what.
    if "auto" in (choices or ()):
        assert "auto: " in meaning
    if field.default == "":
        assert re.search(r"\bempty( or 0)?: ", meaning)
    if field.type == "int" and field.metadata["low"] in (0, -1) and field.name not in ZERO_IS_A_NUMBER:
        assert re.search(rf"(^|[ ;,.]){field.metadata['low']}( and whatever is shorter)?: ", meaning)


@pytest.mark.parametrize(
    "meaning",
    [
        "its learning rate, falling to 0 as a cosine",
        "their momentum",
        "the same for the MLP's matrices",
        "the same in steps (older scripts)",
        "the power in it",
        "times that they do, at equal distances",
        "Those layers that rest",
        "the scale in them",
        "first layers that rest meanwhile",
        "layers whose values are added to them",
        "it",
        "rank",
        "rank of an LQER correction.",
    ],
)
def test_a_meaning_that_leans_on_another_is_found(meaning):
    assert meaning_problem(meaning)


def test_sections_of_the_help_are_the_comments_within_the_classes():
    found, title = {}, ""
    for line in SOURCE[SOURCE.index("class ModelConfig:") : SOURCE.index("# Recipes are rows")].splitlines():
        if match := re.fullmatch(r"    # (.+)", line):
            title = match[1]
        elif match := re.match(r"    (\w+): \w+ = knob\(", line):
            found.setdefault(title, []).append(match[1])
    assert {title: [f.name for f in fields] for title, fields in tg.knob_sections().items()} == found
    assert [name for names in found.values() for name in names] == [f.name for f in FIELDS]


# ------------------------------------------------------------------------------------------------ what a model sees


def members(tree, name):
    """Names of a class's fields, properties and methods."""
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        n.target.id if isinstance(n, ast.AnnAssign) else n.name
        for n in body
        if hasattr(n, "target") or hasattr(n, "name")
    }


def reads_beyond_the_artifact(source):
    """What the classes of the Model section read of a run's settings that no artifact carries: (line, what).

    A config is a `config`, whoever holds it, and must be a ModelConfig: its members alone may be read of it.
    """
    tree = ast.parse(source)
    heading = "# -{20,}\n# %s\\b"
    first, last = (source[: re.search(heading % name, source).start()].count("\n") for name in ("Model", "Adapters"))
    carried, found = members(tree, "ModelConfig"), []
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and first < n.lineno < last]
    for node in (node for one in classes for node in ast.walk(one)):
        if isinstance(node, ast.Name) and node.id == "Config":
            found.append((node.lineno, "Config"))
        of_config = isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("config", "c")
        if of_config and node.attr not in carried:
            found.append((node.lineno, node.attr))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and "config" in ast.unparse(node.args[0]):
            found.append((node.lineno, ast.unparse(node)))
    assert len(classes) >= 5 and carried
    return sorted(set(found))


def test_a_model_reads_only_what_its_artifact_carries():
    assert reads_beyond_the_artifact(SOURCE) == []


@pytest.mark.parametrize("name", ["xsa_last_n", "smear_gate_type", "leaky_relu_slope", "parallel_residual"])
def test_a_models_setting_in_the_wrong_class_is_found(name):
    """A planted mistake: the setting is declared in Config, so that the artifact would load as another model."""
    model, run = (next(n for n in TREE.body if getattr(n, "name", "") == c) for c in ("ModelConfig", "Config"))
    node = next(n for n in model.body if name in (getattr(n, "name", ""), getattr(getattr(n, "target", 0), "id", "")))
    lines = SOURCE.splitlines()
    begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
    moved = lines[begin : node.end_lineno]
    planted = lines[:begin] + lines[node.end_lineno : run.body[0].end_lineno] + moved + lines[run.body[0].end_lineno :]
    source = "\n".join(planted) + "\n"
    assert name in members(ast.parse(source), "Config") - members(ast.parse(source), "ModelConfig")
    assert name in {what for _, what in reads_beyond_the_artifact(source)}


def test_a_model_that_takes_a_runs_config_is_found():
    planted = SOURCE.replace("class SmearGate(nn.Module):", "class SmearGate(nn.Module):\n    settings: Config", 1)
    line = planted[: planted.index("    settings: Config")].count("\n") + 1
    assert (line, "Config") in reads_beyond_the_artifact(planted)


# ------------------------------------------------------------------------------------------------------------ presets


def test_every_preset_names_existing_knobs_of_the_right_type_and_passes_the_checks():
    types = {f.name: type(f.default) for f in FIELDS}
    for preset, row in tg.PRESETS.items():
        for name, value in row.items():
            assert type(value) is types[name], (preset, name)
            f = next(f for f in FIELDS if f.name == name)
            assert tg.parse_value(name, f.type, str(value), f.metadata) == value
        c, explicit, _ = tg.config_from_env({"PRESET": preset}, False)
        assert c.preset == preset and not explicit
        for name, value in row.items():
            assert getattr(c, name) == value
    assert set(tg.PRESETS) == {"demo", "baseline", "record", "poly5", "frontier"}


@pytest.mark.parametrize("preset", sorted(tg.ORIGINALS))
def test_original_lays_the_public_scripts_values_over_the_preset(preset):
    """Each differs from ours; what is set explicitly counts; nothing else changes."""
    ours, theirs = config({"PRESET": preset}), config({"PRESET": preset, "ORIGINAL": "1"})
    assert {name: getattr(theirs, name) for name in tg.ORIGINALS[preset]} == tg.ORIGINALS[preset]
    different = {f.name for f in FIELDS if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert different == {*tg.ORIGINALS[preset], "original"}
    assert config({"PRESET": preset, "ORIGINAL": "0"}) == ours
    assert config({"PRESET": preset, "ORIGINAL": "1", "DATA_ORDER": "documents"}).data_order == "documents"
    assert config({"PRESET": "record", "ORIGINAL": "1"}).ttt_phases == 4
    types = {f.name: type(f.default) for f in FIELDS}
    assert all(type(value) is types[name] for name, value in tg.ORIGINALS[preset].items())


@pytest.mark.parametrize("preset", sorted(set(tg.PRESETS) - set(tg.ORIGINALS)))
def test_original_of_a_preset_without_a_public_script_is_refused(preset, tmp_path, capfd, monkeypatch):
    line = refused(dict(PRESET=preset, ORIGINAL=1), tmp_path, capfd, monkeypatch)
    assert "ORIGINAL=1: needs PRESET=record or poly5" in line


def test_layers_of_other_scripts_are_loops_of_this_one():
    """RECUR_LAYERS repeats layers once unless NUM_LOOPS says more; NUM_UNIQUE_LAYERS takes layers in turn."""
    recurring = config({"PRESET": "record"}, RECUR_LAYERS="4, 5")
    assert tg.execution_order(recurring, True) == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]
    assert tg.execution_order(config({"PRESET": "record"}, RECUR_LAYERS="4,5", NUM_LOOPS=2), True).count(4) == 3
    unique = config({"PRESET": "baseline"}, NUM_UNIQUE_LAYERS=3, NUM_LAYERS=9)
    assert tg.execution_order(unique, True) == [0, 1, 2] * 3 and unique.num_layers == 3
    assert unique.enable_looping_at == 0 and tg.loops_enabled_at(tg.START, unique)
    cut = config({"PRESET": "record"}, NUM_UNIQUE_LAYERS=4, NUM_LAYERS=9)  # the last turn ends early
    assert tg.execution_order(cut, True) == [0, 1, 2, 3] * 2 + [0] and (cut.num_layers, cut.virtual_depth) == (4, 9)
    for same in (0, 9):
        c = config({"PRESET": "baseline"}, NUM_UNIQUE_LAYERS=same)
        assert (c.num_layers, c.num_loops) == (9, 0)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(RECUR_LAYERS="3,5"), "RECUR_LAYERS=3,5: must be comma-separated numbers in a row"),
        (dict(RECUR_LAYERS="-1,0"), "RECUR_LAYERS=-1,0: must be"),
        (dict(RECUR_LAYERS="x"), "RECUR_LAYERS=x: must be"),
        (dict(NUM_UNIQUE_LAYERS=1, NUM_LAYERS=18), "NUM_UNIQUE_LAYERS=1: must be from 2 to NUM_LAYERS=18"),
        (dict(NUM_UNIQUE_LAYERS=12, NUM_LAYERS=9), "NUM_UNIQUE_LAYERS=12: must be from 1 to NUM_LAYERS=9"),
    ],
)
def test_layers_that_cannot_be_loops_are_refused(values, words, tmp_path, capfd, monkeypatch):
    assert words in refused(dict(values, PRESET="baseline"), tmp_path, capfd, monkeypatch)


def test_a_setting_overrides_its_preset_and_is_known_as_explicit():
    environment = {"PRESET": "record", "NUM_LAYERS": "12", "TIE_EMBEDDINGS": "0", "SEED": ""}
    c, explicit, _ = tg.config_from_env(environment, False)
    assert (c.num_layers, c.tie_embeddings, c.model_dim) == (12, False, 512)
    assert c.seed == 42  # an empty variable is as none
    assert explicit == {"num_layers", "tie_embeddings"}


@pytest.mark.parametrize("text, value", [("1", True), ("true", True), ("YES", True), ("0", False), ("False", False)])
def test_switches(text, value):
    assert config(LN_SCALE=text).ln_scale is value


def test_the_preset_without_a_choice_depends_on_cuda_and_is_remarked():
    for cuda, preset in ((False, "demo"), (True, "baseline")):
        c, _, remarks = tg.config_from_env({}, cuda)
        assert c.preset == preset
        assert sum(f"PRESET={preset}" in remark for remark in remarks) == 1


def test_steps_of_warmdown_replace_a_presets_fraction():
    assert config({"PRESET": "record"}, WARMDOWN_ITERS=100).warmdown_frac == 0
    assert config({"PRESET": "record"}, WARMDOWN_ITERS=100, WARMDOWN_FRAC=0.3).warmdown_frac == 0.3
    assert config({"PRESET": "record"}).warmdown_frac == 0.85


def test_documents_that_are_set_replace_the_tokens_of_the_default():
    """A command that sets PHASED_TTT_PREFIX_DOCS alone means documents, in both orders."""
    record = {"PRESET": "record"}
    assert (config(record).phased_ttt_prefix_tokens, config(record).ttt_phases) == (12_000_000, 21)
    assert config(record, TTT_ORDER="length").ttt_phases == 4
    assert config(record, PHASED_TTT_NUM_PHASES=2).ttt_phases == 2
    assert config(record, PHASED_TTT_PREFIX_DOCS=40).phased_ttt_prefix_tokens == 0
    both = config(record, PHASED_TTT_PREFIX_DOCS=40, PHASED_TTT_PREFIX_TOKENS=600)
    assert (both.phased_ttt_prefix_docs, both.phased_ttt_prefix_tokens) == (40, 600)


# The presets' values written again, so that a change of a default cannot change a recipe unseen.
RECIPES = {
    "record": dict(
        vocab_size=8192,
        num_layers=11,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=4,
        tied_embed_init_std=0.005,
        neftune_alpha=5,
        gate_window=12,
        rope_dims=16,
        rope_base=1e4,
        qk_gain_init=5,
        train_seq_len=2048,
        xsa_last_n=11,
        sparse_attn_gate_scale=0.5,
        leaky_relu_slope=0.5,
        enable_looping_at=0.35,
        loop_start=3,
        loop_end=5,
        num_loops=2,
        parallel_start_layer=8,
        logit_softcap=30,
        z_loss_weight=1e-4,
        muon_momentum=0.97,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        muon_backend_steps=5,
        muon_wd=0.095,
        matrix_lr=0.026,
        tied_embed_lr=0.03,
        embed_wd=0.085,
        scalar_lr=0.02,
        adam_wd=0.02,
        beta1=0.9,
        beta2=0.99,
        adam_eps=1e-8,
        grad_clip_norm=0.3,
        warmdown_frac=0.85,
        min_lr=0.1,
        max_wallclock_seconds=600,
        warmup_steps=20,
        train_batch_tokens=786432,
        ema_decay=0.9965,
        gptq_calibration_batches=4,  # PR #2163 has 16, as ORIGINAL=1 has
        attn_clip_sigmas=13,
        mlp_clip_sigmas=11.5,
        embed_clip_sigmas=14,
        matrix_bits=6,
        embed_bits=7,
        artifact_limit_bytes=16_000_000,
    ),
    "poly5": dict(
        vocab_size=1024,
        num_layers=11,
        mlp_mult=3,
        xsa_last_n=4,
        num_loops=0,
        parallel_start_layer=-1,
        qk_gain_init=1.5,
        neftune_alpha=0,
        z_loss_weight=1e-4,
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_wd=0.04,
        matrix_lr=0.025,
        scalar_lr=0.025,
        tied_embed_lr=0.035,
        adam_wd=0.04,
        warmdown_iters=3500,
        warmdown_frac=0,
        iterations=9000,
        ema_decay=0.997,
        train_seq_len=2048,
        eval_stride=16,
        compressor="zstd",
        skip_gates_enabled=False,
        smear_gate_enabled=True,
        smear_gate_type="channel",
        bigram_vocab_size=1536,
        bigram_dim=128,
        ve_dim=128,
        ve_layers="9,10",
        softcap_type="poly",
        logit_softcap=30,
        focal_enabled=True,
        focal_gamma=1,
        progressive_depth_schedule="0.08,0.25",
        muon_coefficients="classic",
        embed_wd=0.04,
        swa_enabled=True,
        swa_every=50,
        swa_start=0.2,
        weight_average="both",
        late_qat_threshold=0.15,
        matrix_bits=6,
        quantizer="gptq_lite",
        rvq_enabled=True,
        rvq_bits=4,
        temperature=1,
        ttt_mode="chunk",
        ttt_chunk_tokens=32768,
        ttt_epochs=3,
        ttt_lr=0.002,
        ttt_freeze_blocks=0,
        sparse_attn_gate_enabled=False,
        gated_attn_enabled=False,
        attn_out_gate_enabled=False,
    ),
    "baseline": dict(
        vocab_size=1024,
        num_layers=9,
        model_dim=512,
        xsa_last_n=0,
        num_loops=0,
        parallel_start_layer=-1,
        smear_gate_enabled=False,
        neftune_alpha=0,
        ema_decay=0,
        leaky_relu_slope=0,
    ),
}


@pytest.mark.parametrize("preset", RECIPES)
def test_presets_hold_the_recipes_values(preset):
    c = config({"PRESET": preset})
    assert {name: getattr(c, name) for name in RECIPES[preset]} == RECIPES[preset]


def test_the_record_preset_has_the_records_size_and_order():
    c = config({"PRESET": "record"})
    assert tg.parameter_count(c) == 35_945_671
    assert tg.execution_order(c, True) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert tg.execution_order(c, False) == list(range(11))


# ------------------------------------------------------------------------------------------------------ misspelt names


@pytest.mark.parametrize(
    "name",
    [
        "TTT_LORA_RNAK",
        "MATRIX_LRR",
        "NUM_LAYER",
        "num_layerz",
        "MUON_MOMENTUMS",
        "SWA_EVER",
        "TRAIN_SEQLEN",
        "WARMDOWN_ITER",
        "ARTIFACT_LIMIT_BYTE",
        "ITERATION",
    ],
)
def test_a_misspelt_knob_is_warned_about_by_name(name):
    warnings = tg.unknown_variables({name: "5"})
    assert len(warnings) == 1 and f"{name}=5" in warnings[0] and "no effect" in warnings[0]


@pytest.mark.parametrize(
    "name, meant", [("MATRIX_LRR", "MATRIX_LR"), ("NUM_LAYER", "NUM_LAYERS"), ("ITERATION", "ITERATIONS")]
)
def test_the_knob_that_was_meant_is_named(name, meant):
    assert f"did you mean {meant}?" in tg.unknown_variables({name: "5"})[0]


def test_ordinary_variables_and_real_knobs_are_not_warned_about():
    ordinary = (
        "HOME PATH USER LANG LC_ALL SHELL TERM PWD OLDPWD EDITOR PAGER HOSTNAME LOGNAME MAIL DISPLAY "
        "VIRTUAL_ENV OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT MKL_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_DEBUG "
        "RANK WORLD_SIZE LOCAL_RANK "
        "LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID "
        "TORCHINDUCTOR_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF PYTHONPATH PYTHONHASHSEED XDG_RUNTIME_DIR CI "
        "GITHUB_RUN_ID "
        "SLURM_JOB_ID TMPDIR NODE_RANK LD_LIBRARY_PATH DEBIAN_FRONTEND PYTEST_CURRENT_TEST MODELS _ SHLVL TZ"
    )
    assert tg.unknown_variables(dict.fromkeys(ordinary.split(), "x")) == []
    assert tg.unknown_variables(dict.fromkeys(knob_names(), "1")) == []


# -------------------------------------------------------------------------------------------------- help and dry run


def test_help_names_every_knob_with_the_values_of_each_preset():
    done = run_script({"NUM_LAYERS": "wrong"}, "--help")  # help is for those who have set something wrong, too
    assert done.returncode == 0 and not done.stderr
    parts = re.split(r"\n\n(?=[A-Z0-9_]+ |== )", done.stdout)
    assert [part.strip("= \n") for part in parts if part.startswith("== ")] == list(tg.KNOB_SECTIONS)
    order = [f for fields in tg.knob_sections().values() for f in fields]
    assert [part.split()[0] for part in parts if part[0] not in "u="] == [f.name.upper() for f in order]
    entries = {part.split()[0]: part for part in parts}
    for f in FIELDS:
        entry = entries[f.name.upper()]
        assert f.metadata["meaning"] in entry and str(f.type) in entry
        assert f"observed in: {f.metadata['observed']}" in entry.splitlines()[-1]
        for preset, row in tg.PRESETS.items():
            if f.name in row:
                assert f"{preset}={row[f.name]}" in entry
        for choice in f.metadata["choices"] or ():
            assert choice in entry


def test_dry_run_is_one_json_object_and_touches_nothing(tmp_path):
    done = run_script(dict(PRESET="record", WORLD_SIZE=8, RANK=0, MATRIX_LRR=1), "--dry-run", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert set(plan["config"]) == {f.name for f in FIELDS} and plan["config"]["matrix_lr"] == 0.026
    assert plan["parameters"] == 35_945_671
    assert plan["execution_order"]["plain"] == list(range(11))
    assert plan["execution_order"]["looped"] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    layout = plan["batch_layout"]
    assert layout["sequences"] == 384 and layout["world"] == 8 and layout["sequence_tokens"] == 2048
    assert layout["sequences"] == layout["world"] * layout["micro_steps"] * layout["micro_sequences"]
    assert "MATRIX_LRR" in done.stderr


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_dry_run_of_every_preset_needs_no_data(preset, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tg.main(["--dry-run"], {"PRESET": preset}) == 0
    out = capfd.readouterr().out
    plan = json.loads(out)
    model = tg.new_model(config({"PRESET": preset}, VOCAB_SIZE=384))  # a smaller table, counted out of the promise
    counted = sum(p.numel() for p in model.parameters()) + (plan["config"]["vocab_size"] - 384) * (
        model.config.model_dim + model.config.ve_dim
    )
    assert plan["parameters"] == counted
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_wrong_layout_is_refused(tmp_path, capfd, monkeypatch):
    values = dict(TINY, WORLD_SIZE=5)
    assert "5 ranks" in refused(values, tmp_path, capfd, monkeypatch, ["--dry-run"])


# ----------------------------------------------------------------------------------------------------- the source file

IMPORT_CHECK = """
import os, sys, threading
import numpy, torch, torch.distributed, torch.nn.functional, resource, platform, tempfile, shutil
sys.modules["triton"] = None  # it looks up variables of its own when a kernel is decorated
class Locked:
    def __getattr__(self, name): raise AssertionError("the environment was touched: " + name)
    def __getitem__(self, name): raise AssertionError("the environment was read: " + name)
    def __contains__(self, name): raise AssertionError("the environment was searched: " + name)
    def __iter__(self): raise AssertionError("the environment was listed")
os.environ, os.getenv = Locked(), None
threads, written, state = threading.active_count(), set(os.listdir(".")), torch.random.get_rng_state()
count = torch.get_num_threads()
sys.path.insert(0, sys.argv[1])
import train_gpt
assert threading.active_count() == threads and set(os.listdir(".")) == written
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized() and torch.get_num_threads() == count
assert torch.equal(torch.random.get_rng_state(), state)
assert "sentencepiece" not in sys.modules and "zstandard" not in sys.modules
print("clean", end="")
"""


def test_importing_reads_no_environment_and_starts_nothing(tmp_path):
    command = [sys.executable, "-B", "-c", IMPORT_CHECK, ROOT]
    done = run_command(command, cwd=tmp_path, env=clean_environment({"NUM_LAYERS": "wrong"}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean", "")
    assert not list(tmp_path.iterdir())


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_function_is_longer_than_80_lines():
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions()}
    assert len(lengths) > 50
    assert {name: n for name, n in lengths.items() if n > 80} == {}


def test_no_knob_is_read_with_a_fallback():
    """getattr(c, name, default) hides a knob that does not exist."""
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
    assert calls and [ast.unparse(n) for n in calls if len(n.args) > 2] == []


def test_one_place_knows_the_formula_of_bits_per_byte():
    logs = [
        n
        for n in ast.walk(TREE)
        if isinstance(n, ast.Call)
        and ast.unparse(n.func) in ("math.log", "math.log2", "np.log", "np.log2", "torch.log2")
    ]
    assert [ast.unparse(n) for n in logs].count("math.log(2)") == 1
    assert (
        len(
            [
                n
                for n in ast.walk(TREE)
                if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div) and "math.log(2)" in ast.unparse(n.right)
            ]
        )
        == 1
    )


def test_sections_stand_in_the_houses_order():
    titles = re.findall(r"^# -{20,}\n# (\w+)", SOURCE, flags=re.MULTILINE)
    house = [
        "Config",
        "Run",
        "Checkpoint",
        "Data",
        "Score",
        "Kernels",
        "Model",
        "Adapters",
        "Optimizers",
        "Schedules",
        "Training",
        "Quantization",
        "Entropy",
        "Artifact",
        "Evaluation",
        "TTT",
        "Stages",
        "main",
    ]
    assert titles == house


def test_each_section_calls_only_those_above_it():
    """Top-level names are defined before the first top-level definition that uses them, except within a section."""
    borders = [n for n, line in enumerate(SOURCE.splitlines(), 1) if re.match(r"# -{20,}$", line)][::2]
    section = {}
    for node in TREE.body:
        targets = [t for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        names = [node.name] if hasattr(node, "name") else [t.id for t in targets]
        section |= {name: sum(b <= node.lineno for b in borders) for name in names}
    late = []
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            annotations = {
                id(a)
                for f in ast.walk(node)
                if isinstance(f, (ast.arg, ast.AnnAssign)) and f.annotation
                for a in ast.walk(f.annotation)
            }
            annotations |= {
                id(a)
                for f in ast.walk(node)
                if isinstance(f, ast.FunctionDef) and f.returns
                for a in ast.walk(f.returns)
            }
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in annotations}
            late += [(node.name, name) for name in used if section.get(name, 0) > section[node.name]]
    assert late == []


def test_the_forward_of_the_model_exists_once():
    model = next(n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == "GPT")
    assert [n.name for n in model.body if isinstance(n, ast.FunctionDef) and "forward" in n.name] == ["forward"]
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(".run_layer")]
    assert len(calls) == 1  # one loop over the layers, whatever the use


def test_the_environment_is_read_in_the_main_block_alone():
    main_blocks = [n for n in TREE.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    inside = {id(n) for block in main_blocks for n in ast.walk(block)}
    names = ("environ", "getenv", "environb")
    reads = [n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in names]
    assert reads and all(id(n) in inside for n in reads)


def test_nothing_is_imported_that_can_run_an_artifacts_content():
    imported = {alias.name.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy", "subprocess"}
    calls = [ast.unparse(n.func) for n in ast.walk(TREE) if isinstance(n, ast.Call)]
    assert [call for call in calls if "ctypes" in call] == ["ctypes.CDLL"]
    assert "ctypes.CDLL(None)" in SOURCE  # the process's own C library, whose allocator a run on CPUs sets
    loaders = [n for n in TREE.body if isinstance(n, ast.FunctionDef) and n.name in ("load_packer", "load_model")]
    uses = [n for n in ast.walk(TREE) if isinstance(n, ast.Name) and n.id == "importlib"]
    # tools/pack_code.py and golf.py, which lie beside the script
    assert len(uses) == sum(n in uses for loader in loaders for n in ast.walk(loader)) == 3
    called = {ast.unparse(n.func) for n in ast.walk(TREE) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load"}


def test_lines_are_at_most_120_characters():
    assert [n for n, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 120] == []
