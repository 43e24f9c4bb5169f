"""Every knob is alive: changing it alone changes the batches, the log, the score, the bytes or what is refused."""

import dataclasses
import json
import re

import pytest
import torch

import train_gpt as tg
from helpers import TINY, config, knob_names, strings

# Small and quick, with enough of it that each knob can act: documents, two layers, a step of warmdown.
QUICK = dict(
    TINY,
    NUM_LAYERS=2,
    MODEL_DIM=32,
    TRAIN_SEQ_LEN=16,
    TRAIN_BATCH_TOKENS=128,
    MICRO_BATCH_TOKENS=128,
    ITERATIONS=4,
    GPTQ_CALIBRATION_BATCHES=1,
    TRAIN_LOG_EVERY=1,
    COMPUTE_DTYPE="float32",
    VAL_BATCH_SIZE=4096,
    GATE_WINDOW=5,
    WARMDOWN_FRAC=0.5,
)
LOOP = dict(NUM_LOOPS=1, LOOP_START=0, LOOP_END=0, NUM_LAYERS=3, ENABLE_LOOPING_AT=0.0)
SPARSE = dict(SPARSE_ATTN_GATE_ENABLED=1)
CORRECTED = dict(LQER_ENABLED=1, LQER_SELECT="norm", LQER_ASYM_ENABLED=1)
TRELLIS = dict(QUANTIZER="trellis")
LATE = dict(SWA_EVERY=1, SWA_START=1.0, WARMDOWN_FRAC=1)
PHASED = dict(
    TTT_MODE="phased",
    TTT_BATCH_SIZE=8,
    TTT_STREAMS=1,
    TTT_CHUNK_SIZE=16,
    TTT_LORA_RANK=4,
    TTT_LORA_LR=0.01,
    PHASED_TTT_PREFIX_DOCS=16,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=512,
    GLOBAL_TTT_LR=0.01,
)
CHUNK = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=1024, TTT_EPOCHS=2)
# knob: (another value, settings under which it acts). What is not here is run with its value doubled.
CHANGES = {
    "COMPUTE_DTYPE": ("float64", {}),
    "ATTENTION": ("sdpa", {}),
    "CPU_THREADS": (2, {}),
    "ITERATIONS": (5, {}),
    "MAX_WALLCLOCK_SECONDS": (0.01, dict(ITERATIONS=30)),
    "GPTQ_RESERVE_SECONDS": (59.99, dict(ITERATIONS=30, MAX_WALLCLOCK_SECONDS=60)),
    "VAL_LOSS_EVERY": (2, {}),
    "TRAIN_BATCH_TOKENS": (256, {}),
    "TRAIN_SEQ_LEN": (32, {}),
    "MICRO_BATCH_TOKENS": (32, {}),
    "TRAIN_LOG_EVERY": (0, {}),
    "VAL_BATCH_SIZE": (64, {}),
    "NUM_LAYERS": (3, {}),
    "NUM_HEADS": (2, {}),
    "NUM_KV_HEADS": (1, {}),
    "MLP_MULT": (3, {}),
    "LEAKY_RELU_SLOPE": (0.1, {}),
    "TIE_EMBEDDINGS": (0, {}),
    "ROPE_DIMS": (4, {}),
    "ROPE_BASE": (100, {}),
    "ROPE_TYPE": ("yarn", dict(EVAL_SEQ_LEN=64)),
    "ROPE_YARN": (1, dict(EVAL_SEQ_LEN=64)),
    "YARN_MAX_LEN": (99, dict(ROPE_YARN=1)),
    "QK_GAIN_INIT": (5, {}),
    "LOGIT_SOFTCAP": (3, {}),
    "LN_SCALE": (1, {}),
    "XSA_LAST_N": (2, {}),
    "SKIP_GATES_ENABLED": (1, {}),
    **dict.fromkeys(SPARSE, (1, {})),
    "SPARSE_ATTN_GATE_SCALE": (3.0, SPARSE),
    "GATED_ATTN_ENABLED": (1, {}),
    "ATTN_OUT_GATE_ENABLED": (1, {}),
    "SMEAR_GATE_ENABLED": (1, {}),
    "GATE_WINDOW": (7, SPARSE),
    "NUM_LOOPS": (2, LOOP),
    "LOOP_START": (0, {**LOOP, "LOOP_START": 1, "LOOP_END": 1}),
    "LOOP_END": (1, LOOP),
    "ENABLE_LOOPING_AT": (0.6, LOOP),
    "PARALLEL_START_LAYER": (1, {}),
    "NEFTUNE_ALPHA": (5, {}),
    "Z_LOSS_WEIGHT": (0.1, {}),
    "EMBED_LR": (0.1, dict(TIE_EMBEDDINGS=0)),
    "HEAD_LR": (0.1, dict(TIE_EMBEDDINGS=0)),
    "MUON_MOMENTUM": (0.9, dict(MUON_MOMENTUM_WARMUP_STEPS=2)),
    "MUON_MOMENTUM_WARMUP_STEPS": (5, {}),
    "MUON_MOMENTUM_WARMUP_START": (0.5, {}),
    "MUON_COEFFICIENTS": ("polar_express", {}),
    "MUON_ROW_NORMALIZE": (1, {}),
    "MUON_WD": (0.5, {}),
    "ADAM_WD": (0.5, {}),
    "EMBED_WD": (0.5, {}),
    "BETA1": (0.5, {}),
    "BETA2": (0.5, {}),
    "ADAM_EPS": (1e-3, {}),
    "GRAD_CLIP_NORM": (0.01, {}),
    "WARMDOWN_FRAC": (0.9, {}),
    "WARMDOWN_ITERS": (2, dict(WARMDOWN_FRAC=0)),
    "MIN_LR": (0.5, {}),
    "EMA_DECAY": (0.9, {}),
    "MATRIX_BITS": (4, {}),
    "EMBED_BITS": (5, {}),
    "COMPRESSOR": ("lzma", {}),
    "ARTIFACT_LIMIT_BYTES": (1000, {}),
    "EVAL_SEQ_LEN": (8, {}),
    "EVAL_STRIDE": (4, {}),
    "GPTQ_DAMP": (0.5, dict(MATRIX_BITS=3)),
    "SEED": (8, {}),
    "RUN_ID": ("other", {}),
    "ARTIFACT_DIR": ("elsewhere", {}),
    "PRESET": ("poly5", {}),
    "MODE": ("train", {}),
    "TOKENIZER_PATH": ("missing.model", {}),
    "TRITON_KERNELS": (1, {}),
    "WARMUP_STEPS": (1, {}),
    "COMPILE": (1, {}),
    "SOFTCAP_TYPE": ("poly", {}),
    "FUSED_CE_ENABLED": (0, {}),
    "CASEOPS_ENABLED": (1, {}),
    "ATTN_BITS": (4, {}),
    "MLP_BITS": (4, {}),
    "SCALE_GRID": (0, {}),
    "AWQ_GROUPS": (2, {}),
    "GATED_ATTN_QUANT_GATE": (1, SPARSE),
    "LQER_ENABLED": (1, {}),
    **{
        f"LQER_{name}": (value, dict(CORRECTED, **more))
        for name, value, more in (
            ("RANK", 2, {}),
            ("TOP_K", 1, {}),
            ("SELECT", "gain", {}),
            ("ASYM_ENABLED", 0, {}),
            ("ASYM_GROUP", 16, {}),
            ("FACTOR_BITS", 3, dict(LQER_ASYM_ENABLED=0)),
        )
    },
    "QUANTIZER": ("trellis", {}),
    "TRELLIS_STATES": (4, TRELLIS),
    "TRELLIS_RATE": (0.2, TRELLIS),
    "COLUMN_STEPS": (0.75, {}),
    "TARGET_BYTES": (70_000, {}),
    "RVQ_ENABLED": (1, {}),
    "RVQ_BITS": (3, dict(RVQ_ENABLED=1)),
    "SMEAR_GATE_TYPE": ("channel", dict(SMEAR_GATE_ENABLED=1)),
    "BIGRAM_VOCAB_SIZE": (50, {}),
    "BIGRAM_DIM": (7, dict(BIGRAM_VOCAB_SIZE=50)),
    "VE_DIM": (6, dict(VE_LAYERS="1")),
    "VE_LAYERS": ("0,1", dict(VE_DIM=6, VE_LAYERS="1")),
    "FOCAL_ENABLED": (1, {}),
    "FOCAL_GAMMA": (3, dict(FOCAL_ENABLED=1)),
    "PROGRESSIVE_DEPTH_SCHEDULE": ("0.5", {}),
    "SWA_ENABLED": (1, LATE),
    "SWA_EVERY": (2, dict(LATE, SWA_ENABLED=1)),
    "SWA_START": (0.6, dict(LATE, SWA_ENABLED=1)),
    "WEIGHT_AVERAGE": ("ema", dict(LATE, SWA_ENABLED=1, EMA_DECAY=0.5)),
    "LATE_QAT_THRESHOLD": (0.9, {}),
    "MATRIX_CLIP_SIGMAS": (5, dict(BIGRAM_VOCAB_SIZE=5500, BIGRAM_DIM=12)),
    "TEMPERATURE": (0.8, {}),
    "TTT_MODE": ("phased", dict(PHASED, TTT_MODE="none")),
    "TTT_BASELINE": (1, PHASED),
    **{
        name: (value, PHASED)
        for name, value in (
            ("TTT_ORDER", "stream"),
            ("TTT_BATCH_SIZE", 4),
            ("TTT_STREAMS", 2),
            ("TTT_CHUNK_SIZE", 12),
            ("TTT_EVAL_SEQ_LEN", 32),
            ("TTT_LORA_RANK", 2),
            ("TTT_LORA_ALPHA", 9),
            ("TTT_LORA_LR", 0.02),
            ("TTT_BETA2", 0.5),
            ("TTT_WEIGHT_DECAY", 5),
            ("TTT_GRAD_STEPS", 2),
            ("TTT_WARM_START_A", 0),
            ("PHASED_TTT_PREFIX_DOCS", 8),
            ("PHASED_TTT_NUM_PHASES", 1),
            ("GLOBAL_TTT_CHUNK_TOKENS", 256),
            ("GLOBAL_TTT_LR", 0.02),
            ("GLOBAL_TTT_MOMENTUM", 0.5),
            ("GLOBAL_TTT_EPOCHS", 2),
            *((f"TTT_{part}_LORA", 0) for part in ("Q", "K", "V", "O", "MLP")),
        )
    },
    "TTT_SHORT_DOC_CHUNKS": (1, dict(PHASED, TTT_EVAL_SEQ_LEN=32)),
    **{
        name: (value, CHUNK)
        for name, value in (
            ("TTT_CHUNK_TOKENS", 2048),
            ("TTT_EPOCHS", 1),
            ("TTT_LR", 0.01),
            ("TTT_MOMENTUM", 0.5),
            ("TTT_FREEZE_BLOCKS", 1),
        )
    },
    "EVAL_BUDGET_SECONDS": (4, dict(VAL_BATCH_SIZE=512)),
    "TOKENIZER_SHA256": ("0" * 64, {}),
    "DATA_PATH": ("missing", {}),
    "VOCAB_SIZE": (385, {}),
    "DEVICE": ("cuda", {}),
    "AUDIT": ("windows", {}),
    "ALLOW_SHARED_DOCUMENTS": (3, {}),
}


class LatePace(tg.Pace):
    """A Pace that has begun 5 seconds ago, so that an evaluation of milliseconds can miss a budget."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.begin -= 5


def outcome(values, folder, capfd) -> dict:
    """All that a run shows, but for the time that it took."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = [1]  # two busy threads in each of the tests' processes would slow both down tenfold
        patch.setattr(torch, "set_num_threads", threads.append)
        patch.setattr(torch, "get_num_threads", lambda: threads[-1])
        patch.setattr(tg, "Pace", LatePace)
        capfd.readouterr()
        code = tg.main([], strings({"RUN_ID": "same", **values}))
        out, errors = capfd.readouterr()
        runs = [p for p in folder.rglob("log.txt")]
        summary = json.loads((runs[0].parent / "summary.json").read_text()) if runs else {}
    measured = (
        "seconds",
        "tokens_per_second",
        "train_seconds",
        "peak_memory_bytes",
        "ttt_targets_per_second",
        "data_wait_share",
    )
    seen = {name: value for name, value in summary.items() if name not in measured}
    steps = re.findall(
        r"step:\d+/\d+ (?:train|val)_loss:\S+|lr_scale:\S+|device:.*|BatchLayout.*|order:.*|looping.*|"
        r"\d+ bytes over|warm\w*[: ]\d+|EVAL_BUDGET_SECONDS=\d+",
        out,
    )
    files = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    model = [p.read_bytes() for p in folder.rglob("model.pgolf")]
    plan = {}
    if code == 0:
        c = config(values)
        plan = dict(layout=tg.batch_layout(c, 1), rows=c.eval_rows)
    return dict(code=code, errors=errors, summary=seen, steps=steps, files=files, model=model, plan=plan)


def differences(before, after):
    return {key for key in before if before[key] != after[key]}


BASES = {}


def base_outcome(settings, data, tmp_path, capfd):
    """The outcome of the settings without the change; runs that several knobs share are made once."""
    key = json.dumps(settings, sort_keys=True, default=str)
    if key not in BASES:
        BASES[key] = outcome(dict(QUICK, **settings, DATA_PATH=data), tmp_path / "base", capfd)
        assert BASES[key]["code"] == 0, BASES[key]["errors"]
    return BASES[key]


def test_the_list_names_existing_knobs():
    assert set(CHANGES) <= set(knob_names())


@pytest.mark.parametrize("name", knob_names())
def test_every_knob_changes_what_a_run_shows(name, data, tmp_path, capfd):
    field = next(f for f in dataclasses.fields(tg.Config) if f.name.upper() == name)
    value, settings = CHANGES.get(name, (None, {}))
    if name == "PRESET":  # only what no setting overrides can differ
        settings = dict(PRESET="record")
    before = base_outcome(settings, data, tmp_path, capfd)
    if value is None:
        current = {**QUICK, **settings}.get(name, field.default)
        value = type(field.default)(float(current) * 2)
    values = {**QUICK, **settings, "DATA_PATH": data, name: value}
    after = outcome(values, tmp_path / "changed", capfd)
    changed = differences(before, after) - ({"files"} if name not in ("RUN_ID", "ARTIFACT_DIR") else set())
    assert changed, f"{name}={value} changes nothing"
    if after["code"]:
        assert name in (
            "TOKENIZER_PATH",
            "DATA_PATH",
            "VOCAB_SIZE",
            "DEVICE",
            "TRITON_KERNELS",
            "COMPILE",
            "ARTIFACT_LIMIT_BYTES",
            "CASEOPS_ENABLED",
            "TOKENIZER_SHA256",
        ), after["errors"]
        assert name in after["errors"] or name == "ARTIFACT_LIMIT_BYTES"
    elif field.metadata["model"] or "weights" in field.metadata["alive"] or field.metadata["alive"] == "batches":
        assert "model" in changed, f"{name} does not reach the weights"


def test_two_equal_runs_show_the_same(data, tmp_path, capfd):
    """The comparison above is not of noise."""
    before = base_outcome({}, data, tmp_path, capfd)
    assert differences(before, outcome(dict(QUICK, DATA_PATH=data), tmp_path / "again", capfd)) == set()


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(tg.shutil, "which", lambda _: None)
    with pytest.raises(tg.ConfigError, match="^COMPILE=1: needs a C"):
        config(COMPILE=1)
    monkeypatch.setattr(tg, "cpu_compiler", lambda: True)
    assert config(COMPILE=1).compile == "1" and config(COMPILE="auto").compile == "0"
