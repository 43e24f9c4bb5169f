"""Public commands: names of other scripts, switches, what has no effect, and what follows a preset."""

import sys

import pytest

import train_gpt as tg
from helpers import ROOT, strings

sys.path.insert(0, str(ROOT / "tools"))
import commands  # noqa: E402

PUBLIC = ROOT / "tests" / "public_commands.json"


def configured(preset="baseline", **values):
    """(configuration, remarks) of a command on a machine without a GPU."""
    config, _, remarks = tg.config_from_env(strings(dict(values, PRESET=preset, DEVICE="cpu")), False)
    return config, remarks


def refusal(preset="baseline", **values):
    """The line with which a command is refused."""
    with pytest.raises(tg.ConfigError) as caught:
        configured(preset, **values)
    return str(caught.value)


# preset, the command, what it sets here
TRANSLATED = [
    ("baseline", dict(MUON_WEIGHT_DECAY=0.03), dict(muon_wd=0.03)),
    ("baseline", dict(WEIGHT_DECAY=0.04), dict(muon_wd=0.04, adam_wd=0.04, embed_wd=0.04)),
    ("baseline", dict(WEIGHT_DECAY=0.04, ADAM_WD=0.01), dict(muon_wd=0.04, adam_wd=0.01)),
    ("record", dict(PARALLEL_RESIDUAL_START=9), dict(parallel_start_layer=9)),
    ("baseline", dict(LEAKY_RELU=1), dict(leaky_relu_slope=0.5)),
    ("baseline", dict(MLP_LEAKY_SLOPE=0.9), dict(leaky_relu_slope=0.9)),
    ("record", dict(MLP_ACTIVATION="relu2"), dict(leaky_relu_slope=0.0)),
    ("baseline", dict(MLP_HIDDEN=1344), dict(hidden_dim=1344)),
    ("baseline", dict(MLP_HIDDEN=992, MODEL_DIM=384, NUM_HEADS=6), dict(hidden_dim=992)),
    ("record", dict(AWQ_LITE_ENABLED=1), dict(awq_groups=1)),
    ("record", dict(AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_TOP_K=2, AWQ_LITE_BITS=8), dict(awq_groups=2)),
    ("record", dict(AWQ_LITE_ENABLED=0, AWQ_LITE_GROUP_TOP_K=2), dict(awq_groups=0)),
    ("poly5", dict(SLIDING_WINDOW_ENABLED=0), dict(eval_stride=0)),
    ("baseline", dict(SLIDING_EVAL=1), dict(eval_stride=64)),
    ("poly5", dict(SLIDING_EVAL=1), dict(eval_stride=16)),
    ("baseline", dict(EVAL_BATCH_SEQS=32), dict(val_batch_size=32768)),
    ("baseline", dict(GRAD_ACCUM_STEPS=8), dict(micro_batch_tokens=65536)),
    ("baseline", dict(GRAD_ACCUM_STEPS=2, WORLD_SIZE=4), dict(micro_batch_tokens=65536)),
    ("baseline", dict(QUANT_BITS=5), dict(matrix_bits=5)),
    ("baseline", dict(TARGET_MB=15), dict(target_bytes=15 * 2**20)),
    ("baseline", dict(TARGET_MB=15.9), dict(target_bytes=16_000_000)),
    ("baseline", dict(SMEAR_GATE=1), dict(smear_gate_enabled=True, smear_gate_type="channel")),
    ("record", dict(USE_SMEARGATE=1), dict(smear_gate_enabled=True, smear_gate_type="window")),
    ("record", dict(SMEARGATE_ENABLED=0), dict(smear_gate_enabled=False)),
    ("poly5", dict(BIGRAM_HASH=0), dict(bigram_vocab_size=0)),
    ("baseline", dict(BIGRAM_HASH=1), dict(bigram_vocab_size=2048)),
    ("poly5", dict(VE_ENABLED=0), dict(ve_dim=0)),
    ("baseline", dict(VE_ENABLED=1), dict(ve_dim=128, ve_layers="7,8")),
    ("record", dict(EMA_ENABLED=0, EMA_DECAY=0.99), dict(ema_decay=0.0)),
    ("record", dict(SKIP_EMA=1), dict(ema_decay=0.0)),
    ("baseline", dict(EMA_ENABLED=1), dict(ema_decay=0.997)),
    ("poly5", dict(LATE_QAT=0), dict(late_qat_threshold=0.0)),
    ("poly5", dict(QAT_ENABLED=0), dict(late_qat_threshold=0.0)),
    ("baseline", dict(QAT_ENABLED=0, LATE_QAT_THRESHOLD=0.2), dict(late_qat_threshold=0.2)),
    ("record", dict(GATED_ATTENTION=1), dict(gated_attn_enabled=True, sparse_attn_gate_enabled=False)),
    ("record", dict(TTT_ENABLED=0), dict(ttt_mode="none")),
    ("poly5", dict(TTT_ENABLED=0), dict(ttt_mode="none")),
    ("record", dict(PHASED_TTT_ENABLED=0), dict(ttt_mode="none")),
    ("record", dict(TTT_ENABLED=1, PHASED_TTT_ENABLED=0), dict(ttt_mode="phased", phased_ttt_prefix_docs=0)),
    ("baseline", dict(TTT_ENABLED=1), dict(ttt_mode="chunk")),
    ("baseline", dict(TTT_ENABLED=1, TTT_LORA_RANK=8), dict(ttt_mode="phased")),
    ("record", dict(TTT_MASK="no_qv"), dict(ttt_q_lora=False, ttt_v_lora=False, ttt_k_lora=True)),
    ("record", dict(TTT_LOCAL_LR_MULT=0.75), dict(ttt_lora_lr=0.75e-4)),
    ("record", dict(TTT_LOCAL_LR_MULT=0.5, TTT_LORA_LR=0.0002), dict(ttt_lora_lr=1e-4)),
    ("record", dict(TTT_SHORT_SCORE_FIRST_ENABLED=1), dict(ttt_short_doc_chunks=True)),
    ("record", dict(TRAIN_SEQ_SCHEDULE="1024@0.1,3072@1"), dict(train_seq_len=3072)),
    ("baseline", dict(MATRIX_CLIP_SIGMAS=9), dict(attn_clip_sigmas=9.0, mlp_clip_sigmas=9.0)),
    ("baseline", dict(MATRIX_CLIP_SIGMAS=9, MLP_CLIP_SIGMAS=10), dict(attn_clip_sigmas=13.0, mlp_clip_sigmas=10.0)),
    ("baseline", dict(GPTQ_RESERVE_MS=9000), dict(gptq_reserve_seconds=9.0)),
    ("baseline", dict(EVAL_ONLY=1), dict(mode="eval")),
    # Zero is off.
    ("poly5", dict(BIGRAM_DIM=0), dict(bigram_vocab_size=0)),
    ("poly5", dict(TTT_EPOCHS=0), dict(ttt_mode="none")),
    ("baseline", dict(ITERATIONS=0), dict(iterations=0)),
    ("baseline", dict(SEED=2**32 - 1), dict(seed=2**32 - 1)),
]


@pytest.mark.parametrize("preset, values, wanted", TRANSLATED, ids=str)
def test_names_of_other_scripts_are_translated(preset, values, wanted):
    config, remarks = configured(preset, **values)
    assert {name: getattr(config, name) for name in wanted} == pytest.approx(wanted)
    assert not [line for line in remarks if line.startswith("warning")]
    if len(values) == 1 and not set(values) & set(tg.Command({}, "demo").fields):
        before = configured(preset)[0]
        kept = all(getattr(config, name) == getattr(before, name) for name in wanted)
        (text,) = (f"{name}={value} is read as " for name, value in values.items())
        assert kept or any(line.startswith(text) for line in remarks)  # the log says so


@pytest.mark.parametrize(
    "values, names",
    [
        (dict(MUON_WEIGHT_DECAY=0.1, MUON_WD=0.2), ("MUON_WEIGHT_DECAY=0.1", "MUON_WD=0.2")),
        (dict(SWA=0, SWA_ENABLED=1), ("SWA=0", "SWA_ENABLED=1")),
        (dict(TTT_MASK="no_qv", TTT_Q_LORA=1), ("TTT_MASK=no_qv", "TTT_Q_LORA=1")),
        (dict(EMA_ENABLED=1, EMA_DECAY=0), ("EMA_ENABLED=1", "EMA_DECAY=0")),
        (dict(BIGRAM_BUCKETS=512, BIGRAM_VOCAB_SIZE=1024), ("BIGRAM_BUCKETS=512", "BIGRAM_VOCAB_SIZE=1024")),
    ],
    ids=str,
)
def test_two_names_that_disagree_are_both_named(values, names):
    assert all(name in refusal(**values) for name in names)
    agreed = dict(MUON_WEIGHT_DECAY=0.1, MUON_WD="0.10")
    assert configured(**agreed)[0].muon_wd == 0.1


@pytest.mark.parametrize("preset", ["demo", "record", "poly5", "frontier"])
@pytest.mark.parametrize(
    "change",
    ["NUM_LAYERS=6", "NUM_LAYERS=2", "NUM_LAYERS=1", "NUM_LAYERS=20", "MODEL_DIM=384", "MODEL_DIM=96", "NUM_HEADS=2",
     "ITERATIONS=50", "TRAIN_SEQ_LEN=96", "TRAIN_SEQ_LEN=3000", "VOCAB_SIZE=1024", "LOOP_END=2", "NUM_LOOPS=4",
     "LOOP_START=6", "XSA_LAST_N=1", "ROPE_DIMS=0", "QUANTIZER=gptq_lite", "BIGRAM_VOCAB_SIZE=0", "EVAL_SEQ_LEN=64",
     "HINT_MIN_MATCH=40", "TTT_ORDER=length", "GATED_ATTN_ENABLED=1", "RVQ_ENABLED=1", "MLP_MULT=2",
     "MUON_MOMENTUM=0.5"],
)  # fmt: skip
def test_a_preset_follows_one_changed_variable(preset, change):
    name, value = change.split("=")
    config, remarks = configured(preset, **{name: value})
    assert getattr(config, name.lower()) == type(getattr(config, name.lower()))(
        float(value) if "." in value or value.isdigit() else value
    )
    for line in remarks:
        if " follows " in line:
            assert "the preset's" in line and line.split("=")[0].lower() in tg.Config.__dataclass_fields__


@pytest.mark.parametrize(
    "values, cause",
    [
        (dict(preset="record", PARALLEL_START_LAYER=2), "PARALLEL_START_LAYER=2"),
        (dict(preset="record", PARALLEL_RESIDUAL_START=2), "PARALLEL_RESIDUAL_START=2"),
        (
            dict(preset="record", NUM_LAYERS=3, LOOP_START=0, LOOP_END=2, PARALLEL_START_LAYER=2),
            "PARALLEL_START_LAYER=2",
        ),
        (dict(preset="record", MODEL_DIM=513), "MODEL_DIM=513"),
        (dict(preset="poly5", TARGET_BYTES=10**6), "TARGET_BYTES=1000000"),
        (dict(preset="record", VE_LAYERS="40", VE_DIM=8), "VE_LAYERS=40"),
        (dict(QUANT_BITS=16), "QUANT_BITS=16"),
        (dict(EMBED_BITS=16), "EMBED_BITS=16"),
    ],
    ids=str,
)
def test_a_refusal_names_what_the_command_sets_and_shows_no_empty_range(values, cause):
    line = refusal(**values)
    assert line.startswith(cause) and "from 6 to 5" not in line and "from 3 to 2" not in line


@pytest.mark.parametrize("name, value", [("MODE", "full"), ("MODE", "1h100"), ("COMPUTE_DTYPE", "bf16")])
def test_values_of_other_scripts_get_a_hint(name, value):
    line = refusal(**{name: value})
    assert line.startswith(f"{name}={value}") and ("PRESET here" in line or "bfloat16 here" in line)


RULES = ["SLOT_ENABLED=1", "PREQUANT_TTT_ENABLED=1", "PREQUANT_TTT_EPOCHS=6", "WITHIN_BOOST=0.75", "TRAIN_ON_VAL=1",
         "PAID_PREFIX_FILE=prefix.xz", "NGRAM_EVAL_ORDER=9", "KNN_LAMBDA=0.1", "PPM_ENABLED=1", "GPTQ_CALIB_SOURCE=val",
         "SDTTT_ENABLED=1"]  # fmt: skip


@pytest.mark.parametrize("setting", RULES)
def test_what_breaks_a_rule_is_refused_by_name(setting):
    name, value = setting.split("=")
    assert refusal(**{name: value}).startswith(f"{setting}: breaks a rule of the challenge")
    if value.replace(".", "").isdigit():
        config, remarks = configured(**{name: 0})
        assert not [line for line in remarks if "warning" in line] and config.ttt_mode == "none"


@pytest.mark.parametrize(
    "setting, meant",
    [("VE_LAST_N=2", "VE_DIM"), ("LAWA_ENABLED=1", "EMA_DECAY"), ("MTP_NUM_HEADS=2", "MTP_WEIGHTS"),
     ("NUM_EXPERTS=4", "--help"), ("QAT_START_FRAC=0.8", "LATE_QAT_THRESHOLD"), ("WAVELET_ENABLED=1", "--help")],
)  # fmt: skip
def test_a_variable_without_effect_is_warned_about_by_meaning(setting, meant):
    name, value = setting.split("=")
    warnings = [line for line in configured(**{name: value})[1] if line.startswith("warning: ")]
    assert len(warnings) == (1 if name not in tg.Command({}, "demo").fields else 0)
    assert all(setting in line and meant in line for line in warnings)
    if warnings:
        assert refusal(STRICT=1, **{name: value}).startswith(f"{setting}: has no effect")


@pytest.mark.parametrize("setting", ["LOOP_START=3", "VE_LAYERS=1,2", "HINT_LR=0.5", "TTT_LR=0.1", "HEAD_LR=0.1"])
def test_a_knob_whose_feature_is_off_is_a_remark(setting):
    name, value = setting.split("=")
    assert [line for line in configured(**{name: value})[1] if line.startswith(f"{setting} has no effect with ")]
    configured(STRICT=1, **{name: value})  # no error


def test_idle_knobs_are_knobs():
    rows = [row.split(" < ") for row in tg.IDLE.strip().splitlines()]
    words = [word.split("=")[0] for names, needs in rows for word in (*names.split(), *needs.split())]
    assert rows and set(words) <= set(tg.Config.__dataclass_fields__)


def test_folders_of_data_sets_are_found(tmp_path, monkeypatch):
    """As PR #2163's commands name them: a root, below which data sets and tokenizers are."""
    for name in ("fineweb10B_sp1024", "fineweb10B_sp8192", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"):
        folder = tmp_path / "datasets" / name
        folder.mkdir(parents=True)
        (folder / "fineweb_val_000000.bin").write_bytes(b"")
    (tmp_path / "tokenizers").mkdir()
    for name in ("fineweb_1024_bpe", "fineweb_8192_bpe", "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved"):
        (tmp_path / "tokenizers" / f"{name}.model").write_bytes(b"")
    for values in (dict(DATA_DIR=tmp_path), dict(DATA_PATH=tmp_path, TOKENIZER_PATH=tmp_path / "tokenizers")):
        for cased, end in ((0, "fineweb10B_sp8192"), (1, "caseops_v1_reserved")):
            config, _ = configured("record", CASEOPS_ENABLED=cased, **values)
            assert config.data_path.endswith(end), values
            assert ("caseops" in config.tokenizer_path) == bool(cased) and "8192" in config.tokenizer_path
    assert configured("baseline", DATA_DIR=tmp_path)[0].data_path.endswith("sp1024")
    (tmp_path / "more" / "sp1024").mkdir(parents=True)
    (tmp_path / "more" / "sp1024" / "fineweb_val_000000.bin").write_bytes(b"")
    assert refusal("baseline", DATA_DIR=tmp_path).startswith("DATA_DIR=") and "several" in refusal(DATA_DIR=tmp_path)


def test_an_evaluation_that_names_no_run_takes_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configured(MODE="eval")[0].artifact_dir == ""
    (tmp_path / "logs" / "one").mkdir(parents=True)
    (tmp_path / "logs" / "one" / "model.pgolf").write_bytes(b"")
    config, remarks = configured(MODE="eval")
    assert config.artifact_dir == "logs/one" and any("ARTIFACT_DIR=logs/one" in line for line in remarks)
    assert configured(MODE="eval", RUN_ID="two")[0].artifact_dir == ""


def test_public_commands_are_understood_or_refused_by_name():
    """203 public commands: at most 1% of assignments are silent, and with STRICT=1 none of 80% is passed over."""
    verdicts = [(commands.judge(preset, given)) for preset, given in commands.read_commands(PUBLIC)]
    kinds = [kind for verdict in verdicts for kind in verdict.kinds.values()]
    assert len(verdicts) == 203 and kinds.count("silent") <= 0.01 * len(kinds)
    strict = [verdict for verdict in verdicts if "silent" not in verdict.kinds.values()]
    assert len(strict) >= 0.8 * len(verdicts)
