"""Every knob is alive, and shows where it is declared to: a change of it alone, in a run that is tiny otherwise."""

import ast
import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

import train_gpt as tg
from helpers import TINY, config, knob_names, strings
from train_gpt import Observed

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
TUNED = dict(TUNE_STEPS=4, MATRIX_BITS=3)
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
    GLOBAL_TTT_CHUNK_TOKENS=100,
    GLOBAL_TTT_LR=0.01,
)
CHUNK = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=200, TTT_EPOCHS=2)
HINT = dict(HINT_ENABLED=1, HINT_MIN_MATCH=2, HINT_MAX_MATCH=4, HINT_CHUNK_TOKENS=128)
# knob: (another value, settings under which it acts). What is not here is run with its value doubled.
CHANGES = {
    "COMPUTE_DTYPE": ("bfloat16", {}),
    "ATTENTION": ("sdpa", {}),
    "FP8_HEAD": (1, {}),
    "FP8_MLP": (1, {}),
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
    "KEY_OFFSET": (1, dict(ROPE_DIMS=4)),
    "WINDOW_ATTN_SIZE": (5, {}),
    "WINDOW_ATTN_LAYERS": ("1", dict(WINDOW_ATTN_SIZE=5)),
    "ROPE_BASE": (100, {}),
    "ROPE_TYPE": ("yarn", dict(EVAL_SEQ_LEN=64)),
    "ROPE_YARN": (1, dict(EVAL_SEQ_LEN=64)),
    "YARN_MAX_LEN": (99, dict(ROPE_YARN=1)),
    "QK_GAIN_INIT": (5, {}),
    "LOGIT_SOFTCAP": (3, {}),
    "QK_GAIN_INIT_SCHEDULE": ("1,2", {}),
    "GATED_ATTN_INIT_STD": (0.1, SPARSE),
    "LN_SCALE": (1, {}),
    "XSA_LAST_N": (2, {}),
    "GATED_XSA": (1, dict(XSA_LAST_N=2)),
    "VALUE_RESIDUAL": (1, {}),
    "ASYM_LOGIT_RESCALE": (1, {}),
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
    "VIRTUAL_DEPTH": (4, dict(LOOP, LOOP_END=2, VIRTUAL_DEPTH=5)),  # of 0, 1, 2, 0, 1, 2
    "ENABLE_LOOPING_AT": (0.6, LOOP),
    "RECUR_LAYERS": ("0,1", {}),
    "RECUR_START_STEP": (2, LOOP),
    "NUM_UNIQUE_LAYERS": (1, {}),
    "PARALLEL_START_LAYER": (1, {}),
    "NEFTUNE_ALPHA": (5, {}),
    "MTP_WEIGHTS": ("0.5,0.25", {}),
    "MTP_END": (0.5, dict(MTP_WEIGHTS="0.5")),
    "Z_LOSS_WEIGHT": (0.1, {}),
    "EMBED_LR": (0.1, dict(TIE_EMBEDDINGS=0)),
    "HEAD_LR": (0.1, dict(TIE_EMBEDDINGS=0)),
    "MUON_MOMENTUM": (0.9, dict(MUON_MOMENTUM_WARMUP_STEPS=2)),
    "MUON_MOMENTUM_WARMUP_STEPS": (5, {}),
    "MUON_MOMENTUM_WARMUP_START": (0.5, {}),
    "MUON_MOMENTUM_CYCLE": (2, dict(MUON_MOMENTUM_WARMUP_STEPS=1)),
    "MUON_MOMENTUM_MIN": (0.5, dict(MUON_MOMENTUM_WARMUP_STEPS=1, MUON_MOMENTUM_CYCLE=2)),
    "MUON_MOMENTUM_MAX": (0.97, dict(MUON_MOMENTUM_WARMUP_STEPS=1, MUON_MOMENTUM_CYCLE=2)),
    "MUON_COEFFICIENTS": ("polar_express", {}),
    "MUON_MOMENTUM_TYPE": ("sgd", {}),
    "MUON_ROW_NORMALIZE": (1, {}),
    "MUON_GRADIENT_DTYPE": ("bfloat16", {}),
    "NORMUON_BETA2": (0.95, {}),
    "MUON_WD": (0.5, {}),
    "ADAM_WD": (0.5, {}),
    "EMBED_WD": (0.5, {}),
    "EMBED_DTYPE": ("bfloat16", {}),
    "BETA1": (0.5, {}),
    "BETA2": (0.5, {}),
    "ADAM_EPS": (1e-3, {}),
    "GRAD_CLIP_NORM": (0.01, {}),
    "WARMDOWN_FRAC": (0.9, {}),
    "WARMDOWN_ITERS": (2, dict(WARMDOWN_FRAC=0)),
    "WARMDOWN_SHAPE": ("cosine", dict(WARMDOWN_FRAC=0.9)),
    "LR_WARMUP_STEPS": (3, {}),
    "MIN_LR": (0.9, {}),
    "EMA_DECAY": (0.9, {}),
    "EMA_RAMP": (0, dict(EMA_DECAY=0.9)),
    "EMA_START": (2, dict(EMA_DECAY=0.9)),
    "MATRIX_BITS": (4, {}),
    "EMBED_BITS": (5, {}),
    "COMPRESSOR": ("lzma", {}),
    "ARTIFACT_LIMIT_BYTES": (1000, {}),
    "EVAL_SEQ_LEN": (8, {}),
    "EVAL_STRIDE": (4, {}),
    "EVAL_SCORES": (1, {}),
    "SAVE_WEIGHTS": (1, {}),
    "GPTQ_DAMP": (0.5, dict(MATRIX_BITS=3)),
    "SEED": (8, {}),
    "RUN_ID": ("other", {}),
    "RESUME": ("missing", {}),
    "ARTIFACT_DIR": ("elsewhere", {}),
    "PRESET": ("poly5", dict(PRESET="record")),  # what no setting overrides can differ
    "PRESET_FILE": (Path(__file__).parent / "preset.toml", {}),
    "ORIGINAL": (1, dict(PRESET="record")),
    "MODE": ("train", {}),
    "TOKENIZER_PATH": ("missing.model", {}),
    "TRITON_KERNELS": (1, {}),
    "TTT_CUDA_GRAPHS": (1, {}),
    "WARMUP_STEPS": (1, {}),
    "COMPILE": (1, {}),
    "COMPILE_CACHE": (1, {}),
    "SOFTCAP_TYPE": ("poly", {}),
    "FUSED_CE_ENABLED": (0, {}),
    "CASEOPS_ENABLED": (1, {}),
    "ATTN_BITS": (4, {}),
    "MLP_BITS": (4, {}),
    "SCALE_GRID": (0, {}),
    "PRUNE_PCT": (0.3, {}),
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
            ("FIT", "svd", {}),
            ("ASYM_GROUP", 16, {}),
            ("FACTOR_BITS", 3, dict(LQER_ASYM_ENABLED=0)),
        )
    },
    "QUANTIZER": ("trellis", {}),
    "TRELLIS_STATES": (4, TRELLIS),
    "TRELLIS_RATE": (0.2, TRELLIS),
    "COLUMN_STEPS": (0.75, {}),
    "MATRIX_STEPS": (0.85, {}),
    "ROW_STEPS": (0.75, {}),
    "STD_STEPS": (0.5, {}),
    "GUIDED_HESSIANS": (1, {}),
    "GPTQ_ROW_GROUPS": (4, {}),
    "TUNE_STEPS": (4, dict(TUNED, TUNE_STEPS=0)),
    "TUNE_SCALE_LR": (0.01, TUNED),
    "TUNE_VECTOR_LR": (0.005, TUNED),
    "TARGET_BYTES": (70_000, {}),
    "RVQ_ENABLED": (1, {}),
    "RVQ_BITS": (3, dict(RVQ_ENABLED=1)),
    "SMEAR_GATE_TYPE": ("channel", dict(SMEAR_GATE_ENABLED=1)),
    "BIGRAM_VOCAB_SIZE": (50, {}),
    "BIGRAM_DIM": (7, dict(BIGRAM_VOCAB_SIZE=50)),
    "BIGRAM_SIGNS": (1, dict(BIGRAM_VOCAB_SIZE=50)),
    "VE_DIM": (6, dict(VE_LAYERS="1")),
    "VE_INIT": ("orthogonal", dict(VE_DIM=6, VE_LAYERS="1")),
    "VE_LAYERS": ("0,1", dict(VE_DIM=6, VE_LAYERS="1")),
    "PREFIX_LOSS_WEIGHT": (0.25, {}),
    "FOCAL_ENABLED": (1, {}),
    "FOCAL_GAMMA": (3, dict(FOCAL_ENABLED=1)),
    "FOCAL_NORM": ("batch", dict(FOCAL_ENABLED=1)),
    "PROGRESSIVE_DEPTH_SCHEDULE": ("0.5", {}),
    # In the first step the time limit is nearer than the half of the steps.
    "PROGRESSIVE_DEPTH_BY": (
        "steps",
        dict(
            PROGRESSIVE_DEPTH_SCHEDULE="0.0001", MAX_WALLCLOCK_SECONDS=60, ITERATIONS=20000, GPTQ_RESERVE_SECONDS=59.9
        ),
    ),
    "PROGRESSIVE_DEPTH_DECAY": (1, dict(PROGRESSIVE_DEPTH_SCHEDULE="0.5", MUON_WD=0.5)),
    "DATA_ORDER": ("documents", {}),
    "TRAIN_SHARD_LIMIT": (1, {}),
    "VAL_TOKEN_LIMIT": (1000, {}),
    "TRAIN_SEQ_SCHEDULE": ("4@0.5,16@1", {}),
    "SEQ_CHANGE_WARMUP_STEPS": (0, dict(TRAIN_SEQ_SCHEDULE="4@0.5,16@1", ITERATIONS=6)),
    "SWA_ENABLED": (1, LATE),
    "SWA_EVERY": (2, dict(LATE, SWA_ENABLED=1)),
    "SWA_START": (0.6, dict(LATE, SWA_ENABLED=1)),
    "WEIGHT_AVERAGE": ("ema", dict(LATE, SWA_ENABLED=1, EMA_DECAY=0.5)),
    "LATE_QAT_THRESHOLD": (0.9, {}),
    "QAT_START": (0.5, {}),
    "FP16_ELEMENTS": (0, dict(BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=12)),
    "MATRIX_CLIP_SIGMAS": (5, dict(BIGRAM_VOCAB_SIZE=5500, BIGRAM_DIM=12)),
    "TEMPERATURE": (0.8, {}),
    "HINT_ENABLED": (1, dict(HINT, HINT_ENABLED=0)),
    "HINT_MIN_MATCH": (3, HINT),
    "HINT_MAX_MATCH": (2, HINT),
    "HINT_CHUNK_TOKENS": (256, HINT),
    "HINT_LR": (0.5, HINT),
    "TTT_MODE": ("phased", dict(PHASED, TTT_MODE="none")),
    "TTT_BASELINE": (1, PHASED),
    "TTT_RECOMPUTE_TOKENS": (2, dict(PHASED, TTT_EVAL_SEQ_LEN=24, TTT_CHUNK_SIZE=8)),
    **{
        name: (value, PHASED)
        for name, value in (
            ("TTT_ORDER", "length"),
            ("TTT_CHUNK_SIZE", 12),
            ("TTT_EVAL_SEQ_LEN", 32),
            ("TTT_LORA_RANK", 2),
            ("TTT_LORA_ALPHA", 9),
            ("TTT_LORA_LR", 0.02),
            ("TTT_LORAPLUS_LR_RATIO", 4),
            ("TTT_BETA2", 0.5),
            ("TTT_WEIGHT_DECAY", 5),
            ("TTT_GRAD_STEPS", 2),
            ("TTT_PLAIN_WEIGHT", 0.4),
            ("TTT_WARM_START_A", 0),
            ("PHASED_TTT_PREFIX_DOCS", 8),
            ("PHASED_TTT_PREFIX_TOKENS", 600),
            ("PHASED_TTT_NUM_PHASES", 1),
            ("GLOBAL_TTT_CHUNK_TOKENS", 50),
            ("GLOBAL_TTT_LR", 0.02),
            ("GLOBAL_TTT_MOMENTUM", 0.5),
            ("GLOBAL_TTT_EPOCHS", 2),
            *((f"TTT_{part}_LORA", 0) for part in ("Q", "K", "V", "O", "MLP")),
        )
    },
    "TTT_BATCH_SIZE": (4, dict(PHASED, TTT_ORDER="length")),  # in stream order it changes speed alone
    "TTT_STREAMS": (2, dict(PHASED, TTT_ORDER="length", TTT_BATCH_SIZE=4)),  # several batches of a phase
    "TTT_SHORT_DOC_CHUNKS": (1, dict(PHASED, TTT_EVAL_SEQ_LEN=32)),
    **{
        name: (value, CHUNK)
        for name, value in (
            ("TTT_CHUNK_TOKENS", 400),
            ("TTT_EPOCHS", 1),
            ("TTT_LR", 0.01),
            ("TTT_DECAY_TOKENS", 400),
            ("TTT_MOMENTUM", 0.5),
            ("TTT_OPTIMIZER", "adamw"),
            ("TTT_GRAD_CLIP", 0.01),
            ("TTT_BATCH_SEQS", 3),
            ("TTT_FREEZE_BLOCKS", 1),
        )
    },
    "EVAL_BUDGET_SECONDS": (4, dict(VAL_BATCH_SIZE=64)),
    "TOKENIZER_SHA256": ("0" * 64, {}),
    "VOCAB_SIZE": (385, {}),
    "DEVICE": ("cuda", {}),
    "STRICT": (1, dict(LABEL_SMOOTHING=0.1)),  # a variable that has no effect
    "ALLOW_SHARED_DOCUMENTS": (3, {}),
    "ALLOW_SHARED_WINDOWS": (0.5, {}),
}


class LateMeter(tg.ProgressMeter):
    """A meter that began 5 seconds ago, so that an evaluation of milliseconds can miss a budget."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.begin -= 5


# ------------------------------------------------------------------------------------------- what a run shows, in order


def digest(tensors):
    """SHA-256 of some tensors' types, shapes and values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Recorder:
    """What a run shows, in the order of the run: pairs of a place and a value."""

    def __init__(self):
        self.events = []
        self.in_step = self.in_warmup = False

    def add(self, place, value):
        if not self.in_warmup:
            self.events.append((place, repr(value)))

    def install(self, patch):
        """Wraps the functions in which something can be seen."""
        wrappers = {
            (tg.Trainer, "__init__"): self.setup,
            (tg.Trainer, "warm_up"): self.warm_up,
            (tg.Trainer, "step"): self.step,
            (tg.Trainer, "use_average"): self.use_average,
            (tg.TrainLoader, "batch"): self.batch,
            (tg, "write_atomic"): self.write,
            (tg, "log_score"): self.score,
        }
        for (owner, name), wrapper in wrappers.items():
            patch.setattr(owner, name, wrapping(wrapper, getattr(owner, name)))

    def setup(self, original, trainer, *arguments, **options):
        original(trainer, *arguments, **options)
        self.add(Observed.PARAMETERS, [(name, tuple(p.shape)) for name, p in trainer.model.named_parameters()])
        self.add(Observed.INIT, digest(trainer.model.parameters()))
        # A model whose outputs and gates start at zero hides in its first loss what its layers compute.
        with torch.no_grad():
            for p in trainer.model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))

    def warm_up(self, original, trainer, *arguments, **options):
        self.in_warmup = True  # what it computes is undone
        original(trainer, *arguments, **options)
        self.in_warmup = False

    def step(self, original, trainer, progress, *arguments, **options):
        c = trainer.config
        rates = tg.lr_multiplier(progress, c), tg.muon_beta(progress, c)
        self.add(Observed.SCHEDULE, (progress.step, *rates, tg.step_variant_at(progress, c)))
        self.in_step = True
        nats = original(trainer, progress, *arguments, **options)
        self.in_step = False
        self.add(Observed.LOSS, nats.item())
        self.add(Observed.WEIGHTS, digest(trainer.model.parameters()))
        return nats

    def batch(self, original, loader, *arguments):
        batch = original(loader, *arguments)
        if self.in_step:  # calibration reads batches too
            self.add(Observed.BATCHES, digest((batch.ids, batch.targets, *batch.documents)))
        return batch

    def use_average(self, original, trainer):
        original(trainer)
        self.add(Observed.WEIGHTS, digest(trainer.model.parameters()))

    def write(self, original, path, content, **options):
        original(path, content, **options)
        if path.name == tg.CONTAINER_FILE:
            self.add(Observed.BYTES, hashlib.sha256(content).hexdigest())

    def score(self, original, run, stage, score):
        original(run, stage, score)
        if stage != "ttt_baseline":  # which the summary shows
            self.add(Observed.TTT if stage == "ttt" else Observed.SCORE, (stage, score.nats, score.tokens, score.bytes))


def wrapping(wrapper, original):
    """A function or method that calls `wrapper` with the original one and the arguments."""
    return lambda *arguments, **options: wrapper(original, *arguments, **options)


TIMES = re.compile(r"tokens/s:\d+|\d+ tokens/s(?!:)|[\d.]+(ms| ?s)\b")
TIMED = ("seconds ", "peak memory", "data stall", "data: steps waited")  # lines of nothing else
MEASURED = (
    "seconds",
    "tokens_per_second",
    "train_seconds",
    "peak_memory_bytes",
    "ttt_targets_per_second",
    "hint_seconds",
    "data_wait_share",
    "evaluation_seconds",
    "evaluation_seconds_with_compilation",
    "seconds_over_limit",
)


def outcome(values, folder, capfd) -> list:
    """What a run shows, in the order of the run, but for the time that it took: pairs of a place and a value."""
    folder.mkdir()
    recorder, compiled = Recorder(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = [1]  # two busy threads in each of the tests' processes would slow both down tenfold
        patch.setattr(torch, "set_num_threads", threads.append)
        patch.setattr(torch, "get_num_threads", lambda: threads[-1])
        # The same on every machine, with a GPU or a compiler or without; tests/test_end_to_end.py really compiles.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(tg, "cpu_compiler", lambda: True)
        patch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
        patch.setattr(tg, "ProgressMeter", LateMeter)
        recorder.install(patch)
        capfd.readouterr()
        code = tg.main([], strings({"RUN_ID": "same", **values}))
        out, errors = capfd.readouterr()
        summaries = [json.loads(path.read_text()) for path in folder.rglob("summary.json")]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    first = [(Observed.REFUSAL, repr((code, errors))), (Observed.FOLDER, repr(names))]
    rows = {name: value for summary in summaries for name, value in summary.items() if name not in MEASURED}
    lines = [TIMES.sub("#", line) for line in out.splitlines() if not line.startswith(TIMED)]
    last = [(Observed.SUMMARY, repr(rows)), (Observed.LOG, repr((lines, compiled)))]
    return [*first, *recorder.events, *last]


# ------------------------------------------------------------------------------------------- where a change shows first


def differences(before, after):
    """The places where two outcomes differ, in the order of the run. A thing that one of them lacks is a difference."""
    pairs = itertools.zip_longest(before, after, fillvalue=(None, None))
    order = list(Observed)
    return [min((place for place, _ in pair if place), key=order.index) for pair in pairs if pair[0] != pair[1]]


def values_at(result, place):
    return [value for where, value in result if where is place]


def check_observed(declared, before, after):
    """Asserts that a change shows where it is declared, and nowhere earlier in the run."""
    places = differences(before, after)
    assert places, "changes nothing"
    assert places[0] is declared, f"is declared to show first in {declared.name}, and shows first in {places[0].name}"
    if declared is Observed.SCORE:  # the first score is taken before the artifact is made
        assert values_at(before, Observed.BYTES) == values_at(after, Observed.BYTES), "changes the artifact"


BASES = {}


def base_outcome(settings, data, tmp_path, capfd):
    """The outcome of the settings without the change; runs that several knobs share are made once."""
    key = json.dumps(settings, sort_keys=True, default=str)
    if key not in BASES:
        BASES[key] = outcome(dict(QUICK, **settings, DATA_PATH=data), tmp_path / "base", capfd)
        assert BASES[key][0] == (Observed.REFUSAL, "(0, '')"), BASES[key][0]
    return BASES[key]


def fewer_shards(data, tmp_path):
    """The data without the first training shard."""
    folder = tmp_path / "fewer"
    folder.mkdir()
    for path in data.iterdir():
        if path.name not in ("fineweb_train_000000.bin", "manifest.json"):
            (folder / path.name).symlink_to(path)
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["audit"]  # it is of all shards
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_list_names_existing_knobs():
    assert set(CHANGES) <= set(knob_names())


@pytest.mark.parametrize("name", knob_names())
def test_a_change_of_every_knob_shows_first_where_it_is_declared(name, brief, tmp_path, capfd):
    """... and the same two runs contradict every other declaration."""
    field = next(f for f in dataclasses.fields(tg.Config) if f.name.upper() == name)
    value, settings = CHANGES.get(name, (None, {}))
    before = base_outcome(settings, brief, tmp_path, capfd)
    if name == "DATA_PATH":
        value = fewer_shards(brief, tmp_path)
    if value is None:
        value = type(field.default)(float({**QUICK, **settings}.get(name, field.default)) * 2)
    after = outcome({**QUICK, **settings, "DATA_PATH": brief, name: value}, tmp_path / "changed", capfd)
    declared = field.metadata["observed"]
    check_observed(declared, before, after)
    code, errors = ast.literal_eval(after[0][1])
    assert (code != 0) is (declared is Observed.REFUSAL)
    if code:
        assert name in (errors or after[-1][1])  # the last line of the log is the error of a run that ends with 1
    for other in set(Observed) - {declared}:
        with pytest.raises(AssertionError, match=f"is declared to show first in {other.name}, "):
            check_observed(other, before, after)


def test_two_equal_runs_show_the_same(brief, tmp_path, capfd):
    """The comparison above is not of noise; and it is of every place."""
    before = base_outcome({}, brief, tmp_path, capfd)
    again = outcome(dict(QUICK, DATA_PATH=brief), tmp_path / "again", capfd)
    assert differences(before, again) == []
    with pytest.raises(AssertionError, match="changes nothing"):
        check_observed(Observed.LOG, before, again)
    assert {place for place, _ in before} == set(Observed) - {Observed.TTT}
    assert len(values_at(before, Observed.LOSS)) == QUICK["ITERATIONS"]


def test_every_place_is_declared_by_some_knob():
    assert {f.metadata["observed"] for f in dataclasses.fields(tg.Config)} == set(Observed)


RUN = [
    (Observed.REFUSAL, "0"),
    (Observed.SCHEDULE, "1"),
    (Observed.LOSS, "2"),
    (Observed.WEIGHTS, "3"),
    (Observed.SCORE, "4"),
    (Observed.BYTES, "5"),
    (Observed.SCORE, "6"),
    (Observed.LOG, "7"),
]


def changed(*places):
    """The run above with other values at some of its places, by number."""
    return [(place, value + "*" * (n in places)) for n, (place, value) in enumerate(RUN)]


@pytest.mark.parametrize(
    "declared, after, problem",
    [
        (Observed.LOSS, changed(2, 3, 5, 6, 7), None),
        (Observed.WEIGHTS, changed(3, 4, 5, 6), None),
        (Observed.WEIGHTS, changed(2, 3, 4), "shows first in LOSS"),
        (Observed.LOSS, changed(3, 4, 5), "shows first in WEIGHTS"),
        (Observed.BYTES, changed(5, 6, 7), None),
        (Observed.BYTES, changed(3, 5, 6, 7), "shows first in WEIGHTS"),
        (Observed.BYTES, changed(4, 5, 6), "shows first in SCORE"),
        (Observed.BYTES, changed(6, 7), "shows first in SCORE"),
        (Observed.SCORE, changed(4, 6, 7), None),
        (Observed.SCORE, changed(4, 5, 6), "changes the artifact"),
        (Observed.SCORE, changed(7), "shows first in LOG"),
        (Observed.LOG, changed(7), None),
        (Observed.LOG, changed(6), "shows first in SCORE"),
        (Observed.LOG, RUN, "changes nothing"),
        (Observed.TTT, [*RUN[:7], (Observed.TTT, "8"), RUN[7]], None),  # one more score
        (Observed.SCORE, [*RUN[:6], RUN[7]], None),  # one score less
        (Observed.SCHEDULE, [*RUN[:4], *RUN[1:]], None),  # a second step
        (Observed.REFUSAL, [(Observed.REFUSAL, "2")], None),
        (Observed.SCHEDULE, [(Observed.REFUSAL, "2")], "shows first in REFUSAL"),
    ],
)
def test_the_check_sees_what_is_declared_falsely(declared, after, problem):
    if problem is None:
        check_observed(declared, RUN, after)
    else:
        with pytest.raises(AssertionError, match=problem):
            check_observed(declared, RUN, after)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(tg.shutil, "which", lambda _: None)
    with pytest.raises(tg.ConfigError, match="^COMPILE=1: needs a C"):
        config(COMPILE=1)
    monkeypatch.setattr(tg, "cpu_compiler", lambda: True)
    assert config(COMPILE=1).compile == "1" and config(COMPILE="auto").compile == "0"
