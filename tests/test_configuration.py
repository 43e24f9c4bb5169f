"""What sweep.py and reproduce.py try before anything runs: names, values, presets in files; and trackers."""

import importlib
import json
import sys
import types

import pytest

from helpers import ROOT, SCRIPT, TINY

sys.path.insert(0, str(ROOT / "tools"))
import configuration  # noqa: E402
import pack_code  # noqa: E402
import reproduce  # noqa: E402
import runs  # noqa: E402
import trackers  # noqa: E402
import train_gpt as tg  # noqa: E402

VALUES = {name: str(value) for name, value in TINY.items()}


@pytest.fixture(scope="module")
def checker():
    return configuration.Checker(SCRIPT, 2)


def test_names_that_no_knob_has_are_refused_with_a_hint(checker):
    with pytest.raises(runs.UserError, match="MATRIXLR=0.1: no knob of .* did you mean MATRIX_LR"):
        checker.check_names(["MATRIXLR"], VALUES | dict(MATRIXLR="0.1"))
    with pytest.raises(runs.UserError, match="FOOBAR=1: no knob of .* see --help"):
        checker.check_names(["SEED", "FOOBAR"], VALUES | dict(FOOBAR="1"))
    checker.check_names(["SEED", "PRESET", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG"], VALUES)


def test_what_the_script_refuses_is_refused_in_its_words(checker):
    checker.check(VALUES | dict(TRAIN_BATCH_TOKENS=str(4 * int(VALUES["TRAIN_SEQ_LEN"]))))
    with pytest.raises(runs.UserError, match="NUM_HEADS=3: must divide MODEL_DIM=32"):
        checker.check(VALUES | dict(NUM_HEADS="3"))
    with pytest.raises(runs.UserError, match="which 2 ranks do not divide"):
        checker.check(VALUES | dict(TRAIN_BATCH_TOKENS=str(3 * int(VALUES["TRAIN_SEQ_LEN"]))))


def test_what_has_no_effect_is_refused_unless_the_user_is_lenient(checker):
    strange = VALUES | dict(TTT_NO_SUCH_THING="1", TRAIN_BATCH_TOKENS=str(4 * int(VALUES["TRAIN_SEQ_LEN"])))
    with pytest.raises(runs.UserError, match="TTT_NO_SUCH_THING=1"):
        checker.check(strange)
    checker.check(strange | dict(STRICT="0"))


def test_what_of_an_environment_decides_the_results(checker, tmp_path):
    environment = dict(MATRIX_LR="0.1", PRESET="demo", PATH="/bin", RUN_ID="x", CPU_THREADS="2", MUON_WD="")
    assert checker.relevant(environment) == dict(MATRIX_LR="0.1", PRESET="demo")
    (tmp_path / "other.py").write_text("import os\nrate = os.environ['RATE']\n")
    other = configuration.Checker(tmp_path / "other.py")
    assert other.module is None and other.relevant(dict(RATE="1", MATRIX_LR="2")) == dict(RATE="1")
    other.check(dict(NUM_HEADS="3"))
    other.check_names(["ANYTHING"], {})


def test_a_packed_script_is_asked_too(tmp_path):
    (tmp_path / "packed.py").write_bytes(pack_code.pack(SCRIPT.read_bytes()))
    packed = configuration.Checker(tmp_path / "packed.py")
    assert "MATRIX_LR" in packed.knobs
    with pytest.raises(runs.UserError, match="NUM_HEADS=3: must divide"):
        packed.check(VALUES | dict(NUM_HEADS="3"))


def test_scripts_and_ranks_of_commands():
    assert configuration.ranks_of(["torchrun", "--standalone", "--nproc_per_node=4", "t.py"]) == 4
    assert configuration.ranks_of(["torchrun", "--nproc-per-node", "8", "t.py"]) == 8
    assert (
        configuration.ranks_of(["python", "t.py"]) == configuration.ranks_of(["torchrun", "--nproc_per_node=gpu"]) == 1
    )
    assert configuration.script_of(["torchrun", "--x=a.py", str(SCRIPT)]) == SCRIPT
    assert configuration.script_of(["bash", "run.sh"]) is None


# --------------------------------------------------------------------------------------------------- presets in files


def test_a_preset_in_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "record"\nmatrix_lr = 0.028\nTTT_ENABLED = false\nnum_layers = 6\nhint_enabled = true\n')
    values = configuration.read_preset_file(file)
    assert values == dict(PRESET="record", MATRIX_LR="0.028", TTT_ENABLED="0", NUM_LAYERS="6", HINT_ENABLED="1")
    merged = configuration.expanded(dict(PRESET_FILE=str(file), NUM_LAYERS="7", MATRIX_LR="", HOME="/h"))
    assert merged == values | dict(NUM_LAYERS="7", HOME="/h")  # what is set overrides the file; an empty value is none
    assert configuration.expanded(dict(A="1")) == dict(A="1")
    ours, explicit, remarks = tg.config_from_env(dict(PRESET_FILE=str(file), NUM_LAYERS="7", MATRIX_LR=""), False)
    same, _, _ = tg.config_from_env(dict(values, NUM_LAYERS="7"), False)
    assert ours == same and ours.preset == "record" and "matrix_lr" in explicit
    assert remarks[0] == f"PRESET_FILE={file} sets PRESET=record, MATRIX_LR=0.028, TTT_ENABLED=0, HINT_ENABLED=1"


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "cannot be read (No such file or directory)"),
        ("matrix_lr = ", "is not TOML"),
        ("matrix_lr = [1, 2]", "matrix_lr: must be a number, a text, true or false"),
        ("[record]\nmatrix_lr = 1", "record: must be a number"),
        ("matrix_lr = 1\nMATRIX_LR = 2", "MATRIX_LR: is given twice"),
        ('"matrix-lr" = 1', "matrix-lr: must be the name of a knob"),
        ('preset_file = "other.toml"', "preset_file: must be the name of a knob"),
        (b"\xff\xfe", "is not TOML"),
        ("deep = " + 100_000 * "[", "is not TOML"),
        ("num_layers = 1" + 5000 * "0", "is not TOML"),
    ],
)
def test_what_a_user_can_mend_in_a_file(text, words, tmp_path):
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(runs.UserError) as caught:
        configuration.read_preset_file(file)
    message = str(caught.value)
    assert message.startswith(f"PRESET_FILE={file}: ") and words in message and "\n" not in message


def test_reproduce_takes_the_file_under_the_command_line(tmp_path, monkeypatch):
    for name in ("PRESET", "MATRIX_LR", "MUON_WD"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "mine.toml"
    file.write_text('preset = "record"\nmatrix_lr = 0.028\nmuon_wd = 0.1\n')
    options = reproduce.parse([f"PRESET_FILE={file}", "MUON_WD=0.2"])
    values = reproduce.environment(options)
    assert (values["PRESET"], values["MATRIX_LR"], values["MUON_WD"]) == ("record", "0.028", "0.2")
    assert values["STRICT"] == "1" and "PRESET_FILE" not in values and options.settings == dict(MUON_WD="0.2")
    monkeypatch.setenv("PRESET_FILE", str(file))
    assert reproduce.parse(["--preset", "demo"]).preset == "demo" and reproduce.parse([]).preset == "record"
    file.write_text("seed = 1\n")
    with pytest.raises(runs.UserError, match="SEED: --seeds sets this"):
        reproduce.parse([])


def test_reproduce_refuses_unknown_names_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES.items():
        if name != "SEED":
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(reproduce, "ranks_here", lambda: 1)
    monkeypatch.setattr(reproduce, "dry_run", lambda *_: pytest.fail("nothing may start"))
    with pytest.raises(runs.UserError, match="MATRIXLR=0.1: no knob"):
        reproduce.main(["MATRIXLR=0.1"])
    (tmp_path / "mine.toml").write_text("matrixlr = 0.1\n")
    with pytest.raises(runs.UserError, match="MATRIXLR=0.1: no knob"):
        reproduce.main(["PRESET_FILE=mine.toml"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml"]


# ------------------------------------------------------------------------------------------------------------ trackers


class FakeRun:
    """A run of a tracker that remembers."""

    def __init__(self, **options):
        self.options, self.rows, self.ended = options, [], False

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    """A module in the place of wandb and trackio, and the runs that it started."""
    started = []
    module = types.ModuleType("fake")
    module.init = lambda **options: started.append(FakeRun(**options)) or started[-1]
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(module=module, started=started)


ROWS = [
    dict(step=1, train_loss=5.0),
    dict(step=2, val_loss=4.0, val_bpb=2.0),
    dict(stage="ttt", val_loss=3.0, val_bpb=1.5),
]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_curves_go_to_a_tracker_as_they_grow(kind, fake, tmp_path):
    tracker = trackers.Tracker(kind, "mine", tmp_path)
    follower = tracker.start("seed1", dict(SEED=1), tmp_path)
    (run,) = fake.started
    assert run.options["project"] == "mine" and run.options["name"] == "seed1" and run.options["config"] == dict(SEED=1)
    follower.follow()
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    follower.follow()
    assert run.rows == [(1, dict(train_loss=5.0)), (2, dict(val_loss=4.0, val_bpb=2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + "{damaged\n[]\n")
    follower.finish(dict(val_bpb=1.5, hardware="a CPU", steps=2))
    assert run.rows[2:] == [
        (2, {"ttt/val_loss": 3.0, "ttt/val_bpb": 1.5}),
        (2, {"final/val_bpb": 1.5, "final/steps": 2}),
    ]
    assert run.ended


def test_tensorboard_gets_scalars(monkeypatch, tmp_path):
    scalars, made = [], []

    class Writer:
        def __init__(self, folder):
            made.append(folder)

        def add_scalar(self, *row):
            scalars.append(row)

        def add_text(self, name, text):
            made.append(text)

        def close(self):
            made.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    follower = trackers.Tracker("tensorboard", "mine", tmp_path).start("seed1", dict(LR="a|b"), tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    follower.finish(dict(val_bpb=1.5))
    assert scalars == [("train_loss", 5.0, 1), ("final/val_bpb", 1.5, 1)]
    assert made[0] == str(tmp_path / "tensorboard" / "seed1") and "a\\|b" in made[1] and made[2] == "closed"


def test_a_tracker_that_fails_ends_no_run(fake, tmp_path, capsys):
    fake.module.init = lambda **_: (_ for _ in ()).throw(OSError("no network"))
    follower = trackers.Tracker("wandb", "mine", tmp_path).start("seed1", {}, tmp_path)
    follower.follow()
    follower.finish(dict(val_bpb=1.0))
    errors = capsys.readouterr().err
    assert errors == "warning: --tracker wandb: OSError: no network; goes on without it\n"


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    with pytest.raises(runs.UserError, match="--tracker trackio: .*pip install -r requirements-trackers.txt"):
        trackers.Tracker("trackio", "mine", tmp_path)
    trackers.NO_TRACKER.start("x", {}, tmp_path).finish(dict(val_bpb=1.0))  # without a tracker: nothing


def test_every_tracker_is_pinned():
    lines = (ROOT / "requirements-trackers.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines if "==" in line} >= set(trackers.PACKAGES)
