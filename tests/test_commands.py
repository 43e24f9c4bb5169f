"""Public commands: names of other scripts, switches, what has no effect, and what follows a preset."""

import random
import re
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
    ("frontier", dict(), dict(ttt_lora_lr=2.5e-5, ttt_loraplus_lr_ratio=10.0)),
    ("frontier", dict(TTT_LORA_LR=8e-5), dict(ttt_lora_lr=8e-5, ttt_loraplus_lr_ratio=1.0)),
    ("frontier", dict(TTT_LOCAL_LR_MULT=0.5), dict(ttt_lora_lr=1.25e-5, ttt_loraplus_lr_ratio=10.0)),
    ("record", dict(TTT_SHORT_SCORE_FIRST_ENABLED=1), dict(ttt_short_doc_chunks=True)),
    ("record", dict(TRAIN_SEQ_SCHEDULE="1024@0.1,3072@1"), dict(train_seq_len=3072)),
    ("baseline", dict(MATRIX_CLIP_SIGMAS=9), dict(attn_clip_sigmas=9.0, mlp_clip_sigmas=9.0)),
    ("baseline", dict(MATRIX_CLIP_SIGMAS=9, MLP_CLIP_SIGMAS=10), dict(attn_clip_sigmas=13.0, mlp_clip_sigmas=10.0)),
    ("baseline", dict(GPTQ_RESERVE_MS=9000), dict(gptq_reserve_seconds=9.0)),
    ("baseline", dict(EVAL_ONLY=1), dict(mode="eval")),
    ("baseline", dict(VRL_ENABLED=1), dict(value_residual=True)),
    ("baseline", dict(VRL_ENABLED=0), dict(value_residual=False)),
    ("poly5", dict(TTT_COSINE_DECAY=1), dict(ttt_decay_tokens=-1)),
    ("poly5", dict(TTT_ENABLED=1, TTT_OPTIMIZER="adam"), dict(ttt_optimizer="adamw")),
    ("poly5", dict(TARGET_MB=15.9), dict(target_bytes=0, artifact_limit_bytes=16_000_000)),
    ("poly5", dict(TARGET_MB=10), dict(target_bytes=0, artifact_limit_bytes=10 * 2**20)),
    ("record", dict(FP16_EMBED_EXPORT=1), dict(embed_bits=16)),
    ("record", dict(FP16_EMBED=0), dict(embed_bits=7)),
    ("baseline", dict(AWQ_ENABLED=1), dict(column_steps=0.5)),
    ("baseline", dict(AWQ_ENABLED=1, AWQ_ALPHA=0.25), dict(column_steps=0.25)),
    ("baseline", dict(USE_RANS=1), dict(compressor="pergroup")),
    ("baseline", dict(PRUNE_FRAC=0.02), dict(prune_pct=0.02)),
    ("record", dict(NGRAM_TILT_ENABLED=1, TOKEN_ORDER=16), dict(hint_enabled=True, hint_min_match=16)),
    ("frontier", dict(NGRAM_TILT_ENABLED=0), dict(hint_enabled=False)),
    ("baseline", dict(VAL_MAX_TOKENS=32768), dict(val_token_limit=32768)),
    ("baseline", dict(TRAIN_SHARDS=80), dict(train_shard_limit=80)),
    ("baseline", dict(LR_WARMUP_STEPS=50), dict(lr_warmup_steps=50)),
    ("baseline", dict(SWA_FRAC=0.5), dict(swa_enabled=True, swa_start=0.5)),
    ("baseline", dict(EMA_ENABLED=1, EMA_START_STEP=100), dict(ema_start=100)),
    ("baseline", dict(LAWA_ENABLED=1, LAWA_EMA_DECAY=0.995), dict(ema_decay=0.995)),
    ("baseline", dict(LAWA_ENABLED=0, LAWA_EMA_DECAY=0.995), dict(ema_decay=0.0)),
    ("baseline", dict(QAT_ENABLED=1, QAT_START_FRAC=0.7), dict(qat_start=0.7, late_qat_threshold=0.0)),
    ("baseline", dict(QAT_ENABLED=0, QAT_START_FRAC=0.7), dict(qat_start=0.0, late_qat_threshold=0.0)),
    ("poly5", dict(QAT_START_FRAC=1.1), dict(qat_start=0.0, late_qat_threshold=0.0)),
    ("baseline", dict(QAT_START_STEP=2000), dict(qat_start=2000)),
    ("baseline", dict(LATE_QAT_FRAC=0.04), dict(qat_start=0.96)),
    ("baseline", dict(MOMENTUM_CYCLIC=1), dict(muon_momentum_cycle=50)),
    (
        "baseline",
        dict(MOMENTUM_CYCLIC=1, MOMENTUM_MIN=0.8, MOMENTUM_MAX=0.9, MOMENTUM_CYCLE_PERIOD=40),
        dict(muon_momentum_min=0.8, muon_momentum_max=0.9, muon_momentum_cycle=40),
    ),
    ("baseline", dict(MOMENTUM_CYCLIC=0, MOMENTUM_CYCLE_PERIOD=40), dict(muon_momentum_cycle=0)),
    ("baseline", dict(ROPE_FRAC=0.25), dict(rope_dims=16)),
    ("baseline", dict(WINDOW_SIZE=-1), dict(window_attn_size=0)),
    (
        "record",
        dict(WINDOW_SIZE=512, WINDOW_ATTN_LAYERS="2,4,6,8,10"),
        dict(window_attn_size=512, window_attn_layers="2,4,6,8,10"),
    ),
    ("baseline", dict(VE_ENABLED=1, VE_LAST_N=2), dict(ve_layers="7,8", ve_dim=128)),
    ("poly5", dict(PROGRESSIVE_DEPTH=0), dict(progressive_depth_schedule="")),
    ("baseline", dict(DEPTH_RECURRENCE="4,5"), dict(num_loops=1, loop_start=4, loop_end=5)),
    ("baseline", dict(RECUR_ENABLED=0, RECUR_LAYERS="4,5"), dict(num_loops=0)),
    ("record", dict(RECUR_ENABLED=0), dict(num_loops=0)),
    ("record", dict(RECUR_LAYERS="3,4", NUM_LAYERS=6), dict(loop_start=3, loop_end=4)),
    ("record", dict(ENABLE_LOOPING_AT_STEP=2600), dict(recur_start_step=2600)),
    ("baseline", dict(NUM_LAYERS=11, UNIQUE_LAYERS=10), dict(num_layers=10, num_loops=1, loop_start=9, loop_end=9)),
    ("baseline", dict(NUM_LAYERS=18, UNIQUE_LAYERS=9), dict(num_layers=9, num_loops=1, loop_start=0, loop_end=8)),
    ("baseline", dict(NUM_LAYERS=11, NUM_UNIQUE_LAYERS=4), dict(num_layers=4, virtual_depth=11)),
    ("baseline", dict(NUM_UNIQUE_BLOCKS=6, NUM_PASSES=2), dict(num_layers=6, num_loops=1, loop_end=5)),
    (
        "poly5",
        dict(CORE_START=3, CORE_END=8, NUM_PASSES=3),
        dict(num_layers=11, num_loops=2, loop_start=3, loop_end=7, enable_looping_at=0),
    ),
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


STRUCTURE = {
    "NUM_LAYERS": range(1, 14),
    "MODEL_DIM": (64, 96, 100, 257, 384, 768),
    "NUM_HEADS": (1, 2, 3, 4, 6, 16, 32),
    "NUM_KV_HEADS": (0, 1, 2, 3, 8),
    "VOCAB_SIZE": (256, 1024, 4096),
    "MLP_MULT": (0.5, 2, 3),
    "XSA_LAST_N": (0, 2, 11),
    "ROPE_DIMS": (0, 2, 16, 128),
    "KEY_OFFSET": (0, 1),
    "WINDOW_ATTN_SIZE": (0, 64),
    "WINDOW_ATTN_LAYERS": ("", "0", "2,4,6,8,10"),
    "NUM_LOOPS": (0, 1, 3),
    "LOOP_START": (0, 2, 5, 8),
    "LOOP_END": (0, 3, 9),
    "VIRTUAL_DEPTH": (0, 4, 12),
    "RECUR_LAYERS": ("1", "2,3", "3,4,5"),
    "NUM_UNIQUE_LAYERS": (1, 3, 4),
    "PARALLEL_START_LAYER": (-1, 0, 3, 7),
    "VE_DIM": (0, 64),
    "VE_LAYERS": ("0", "9,10"),
    "BIGRAM_VOCAB_SIZE": (0, 1, 1024),
    "GATE_WINDOW": (1, 24, 512),
    "GATED_ATTN_ENABLED": (0, 1),
    "SPARSE_ATTN_GATE_ENABLED": (0, 1),
    "PROGRESSIVE_DEPTH_SCHEDULE": ("", "0.5", "0.1,0.2,0.3"),
    "QK_GAIN_INIT_SCHEDULE": ("", "1,2,3"),
    "TRAIN_SEQ_LEN": (64, 1000, 4096),
    "TRAIN_BATCH_TOKENS": (1024, 100000),
    "EVAL_STRIDE": (0, 64, 4096),
    "QUANTIZER": ("uniform", "gptq_lite"),
    "TARGET_BYTES": (0, 10**6),
    "TTT_ENABLED": (0, 1),
    "HINT_ENABLED": (0, 1),
    "MAX_WALLCLOCK_SECONDS": (0, 1),
    "GPTQ_RESERVE_SECONDS": (0, 700),
}


def strange_commands():
    """(preset, command): every depth alone, each with another knob in turn, and commands of several knobs by chance."""
    chance = random.Random(19)
    for preset in ("record", "poly5", "frontier"):
        for depth in range(1, 13):
            yield preset, dict(NUM_LAYERS=depth)
            for name in chance.sample(list(STRUCTURE)[1:], 6):
                yield preset, {"NUM_LAYERS": depth, name: chance.choice(STRUCTURE[name])}
    for _ in range(150):
        names = chance.sample(list(STRUCTURE), chance.randint(1, 5))
        yield chance.choice(list(tg.PRESETS)), {name: chance.choice(STRUCTURE[name]) for name in names}


def test_no_refusal_names_what_a_command_does_not_set_or_shows_an_empty_range():
    """Of strange but plausible commands. A smaller or deeper model alone is not refused at all."""
    seen = refusals = 0
    for preset, values in strange_commands():
        seen += 1
        try:
            configured(preset, **values)
        except tg.ConfigError as error:
            refusals += 1
            assert set(values) != {"NUM_LAYERS"} and error.parts[0] in values, (preset, values, str(error))
            ranges = re.findall(r"from (-?[\d.]+) to (-?[\d.]+)", str(error))
            assert all(float(low) <= float(high) for low, high in ranges), (preset, values, str(error))
    assert seen > 350 and 20 < refusals < seen / 2


@pytest.mark.parametrize("preset", ["demo", "record", "poly5", "frontier"])
@pytest.mark.parametrize(
    "change",
    ["NUM_LAYERS=6", "NUM_LAYERS=2", "NUM_LAYERS=1", "NUM_LAYERS=20", "MODEL_DIM=384", "MODEL_DIM=96", "NUM_HEADS=2",
     "ITERATIONS=50", "TRAIN_SEQ_LEN=96", "TRAIN_SEQ_LEN=3000", "VOCAB_SIZE=1024", "LOOP_END=2", "NUM_LOOPS=4",
     "LOOP_START=6", "XSA_LAST_N=1", "ROPE_DIMS=0", "QUANTIZER=gptq_lite", "BIGRAM_VOCAB_SIZE=0", "EVAL_SEQ_LEN=64",
     "HINT_MIN_MATCH=40", "TTT_ORDER=length",
     "TTT_EVAL_SEQ_LEN=32", "TTT_EVAL_SEQ_LEN=16", "TTT_CHUNK_SIZE=2020", "GATED_ATTN_ENABLED=1", "RVQ_ENABLED=1",
     "MLP_MULT=2", "MUON_MOMENTUM=0.5"],
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
        (dict(EMBED_BITS=12), "EMBED_BITS=12"),
        (dict(QUANT_BITS=16, GPTQ_RESERVE_SECONDS=700), "QUANT_BITS=16"),
        (dict(preset="record", MODEL_DIM=257, GPTQ_RESERVE_SECONDS=700), "MODEL_DIM=257"),
        (dict(preset="demo", RECUR_LAYERS="3,4,5", GPTQ_RESERVE_SECONDS=700), "RECUR_LAYERS=3,4,5"),
        (dict(NUM_UNIQUE_LAYERS=10), "NUM_UNIQUE_LAYERS=10"),
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
         "SDTTT_ENABLED=1", "SLOT_STEPS=8", "SLOT_LR=0.01", "PREQUANT_TTT_LR=0.001", "USE_MIXER=1",
         "MIXER_ETA=0.1"]  # fmt: skip


@pytest.mark.parametrize("setting", RULES)
def test_what_breaks_a_rule_is_refused_by_name(setting):
    name, value = setting.split("=")
    assert refusal(**{name: value}).startswith(f"{setting}: breaks a rule of the challenge")
    if value.replace(".", "").isdigit():
        config, remarks = configured(**{name: 0})
        assert not [line for line in remarks if "warning" in line] and config.ttt_mode == "none"


OTHER_MODELS = ["NUM_EXPERTS=4", "USE_MOE=1", "MAMBA_LAYERS=2", "DELTA_NET_HEADS=4", "USE_CRAWLER=1", "NUM_ITERS=6",
                "EVAL_PASSES=4", "JEPA_LAMBDA=0.1", "DIFFUSION_ENABLED=1", "HNET_ENABLED=1", "BITNET_GROUP_SIZE=64",
                "RANDOM_LINEAR=1", "MLP_RANK=160", "PATTENTION=1", "EMBED_DIM=48", "MODEL_TYPE=hybrid"]  # fmt: skip


@pytest.mark.parametrize("setting", OTHER_MODELS)
def test_what_asks_for_another_model_is_refused_by_name(setting):
    name, value = setting.split("=")
    assert refusal(**{name: value}).startswith(f"{setting}: must be left out: it asks for another model (")
    if value.isdigit():
        assert not [line for line in configured(**{name: 0})[1] if "warning" in line]
        family = tg.switch_of(name)[0]
        assert not [line for line in configured(**{f"{family}_ENABLED": 0, f"{family}_LR": 1})[1] if name in line]


@pytest.mark.parametrize(
    "setting", ["NUM_EXPERTS=1", "MODEL_TYPE=gpt", "EVAL_PASSES=1", "EMBED_DIM=128", "NUM_ITERS=1"]
)
def test_what_asks_for_this_very_model_is_understood(setting):
    name, value = setting.split("=")
    command = tg.Command({name: value, "MODEL_DIM": "128"}, "demo")
    assert name in command.understood
    assert not [line for line in configured(**{name: value, "MODEL_DIM": 128})[1] if "warning" in line]


@pytest.mark.parametrize(
    "setting, meant",
    [("VE_POSITIONS=2", "VE_DIM"), ("LAWA_ENABLED=1", "EMA_DECAY"), ("MTP_NUM_HEADS=2", "MTP_WEIGHTS"),
     ("LABEL_SMOOTHING=0.1", "--help"), ("QAT_RAMP=0.8", "LATE_QAT_THRESHOLD"), ("BACKOUT_ENABLED=1", "--help")],
)  # fmt: skip
def test_a_variable_without_effect_is_warned_about_by_meaning(setting, meant):
    name, value = setting.split("=")
    warnings = [line for line in configured(**{name: value})[1] if line.startswith("warning: ")]
    assert len(warnings) == (1 if name not in tg.Command({}, "demo").fields else 0)
    assert all(setting in line and meant in line for line in warnings)
    if warnings:
        assert refusal(STRICT=1, **{name: value}).startswith(f"{setting}: has no effect")


SHELLS = ["MAMBA_EXE=/opt/bin/micromamba", "MAMBA_ROOT_PREFIX=/opt", "MAMBA_NO_BANNER=1", "MODEL_TYPE_FILE=x",
          "DIFFUSION_MODELS=/models", "GRU_HOME=x"]  # fmt: skip


@pytest.mark.parametrize("setting", SHELLS)
def test_variables_of_shells_and_folders_ask_for_no_other_model(setting):
    name, value = setting.split("=")
    assert not [line for line in configured(**{name: value})[1] if name in line]


@pytest.mark.parametrize("setting", ["LOOP_START=3", "VE_LAYERS=1,2", "HINT_LR=0.5", "TTT_LR=0.1", "HEAD_LR=0.1"])
def test_a_knob_whose_feature_is_off_is_a_remark(setting):
    name, value = setting.split("=")
    assert [line for line in configured(**{name: value})[1] if line.startswith(f"{setting} has no effect with ")]
    configured(STRICT=1, **{name: value})  # no error


def test_a_knob_that_another_one_overrides_is_a_remark():
    remarks = configured(QAT_START=0.5, LATE_QAT_THRESHOLD=0.1)[1]
    assert "LATE_QAT_THRESHOLD=0.1 has no effect with QAT_START=0.5" in remarks
    assert not configured("poly5", QAT_START=0.5)[1][1:]  # what the preset sets is none of the user's


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
    """203 public commands: two in three are whole, and 98% named: what has no effect is said."""
    verdicts = [(commands.judge(preset, given)) for preset, given in commands.read_commands(PUBLIC)]
    kinds = [kind for verdict in verdicts for kind in verdict.kinds.values()]
    assert len(verdicts) == 203 and kinds.count("silent") <= 0.01 * len(kinds)
    assert sum(verdict.whole for verdict in verdicts) >= 0.69 * len(verdicts)
    assert sum(verdict.named for verdict in verdicts) >= 0.98 * len(verdicts)


def test_the_report_counts_whole_and_named_commands_apart(tmp_path):
    table = tmp_path / "commands.tsv"
    idle = "LABEL_SMOOTHING=0.1"
    rows = ["SEED=1 EMA_ENABLED=1", f"SEED=2 {idle}", f"SLOT_STEPS=8 {idle}", f"ACN_OUTPUT=1 {idle}"]
    table.write_text("preset\tassignments\n" + "".join(f"baseline\t{row}\n" for row in rows))
    lines = commands.report(table)
    assert any(line.startswith("whole: 2 of 4 commands (50%): ") for line in lines)
    assert any(line.startswith("named: 3 of 4 commands (75%): ") for line in lines)
    first = lines.index(next(line for line in lines if line.startswith("without effect")))
    assert lines[first + 1].split() == ["2", "(1)", "LABEL_SMOOTHING"]
