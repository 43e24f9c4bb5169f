"""Each stage on a pretended GPU: no tensor is left on the CPU, or taken from there by chance."""

import dataclasses

import pytest
import torch

from helpers import POLY_LIKE, RECORD_LIKE, build_model, strings, tg
from pretended_gpu import GPU, OnGPU, move_model, pretended_gpu

SMALL = dict(NUM_LAYERS=4, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4)
KNOBS = dict(DEVICE="cpu", CPU_THREADS=1, COMPILE=0, READ_AHEAD=0, COMPUTE_DTYPE="float32", ATTENTION="sdpa")
PHASED = dict(TTT_MODE="phased", TTT_BATCH_SIZE=5, TTT_CHUNK_SIZE=16, PHASED_TTT_PREFIX_DOCS=8, TTT_LORA_RANK=4) | dict(
    PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=64
)


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpu():
        yield


def config_of(base, data, **knobs):
    """A Config for the GPU, of one for the CPU: what is allowed there is allowed here."""
    base = {**base, **SMALL} if base is RECORD_LIKE else base
    c = tg.config_from_env(strings({**base, **KNOBS, "DATA_PATH": data, **knobs}), False)[0]
    return dataclasses.replace(c, device="cuda")


def run_on_gpu():
    run = tg.Run(0, 1, 1, GPU)
    run.peak_memory = lambda: 0
    return run


def model_of(c):
    model = move_model(build_model(dataclasses.replace(c, device="cpu"), spread=0.2))
    model.runtime = dataclasses.replace(model.runtime, attention="sdpa", triton=False)
    return model


def trainer_of(c):
    run = run_on_gpu()
    return tg.Trainer(model_of(c), tg.TrainLoader(c, run), c, run)


def test_the_pretended_gpu_refuses_what_a_real_one_does():
    x, y = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    assert x.device == GPU and (x + 1).device == GPU and (x @ y.to("cuda").mT).cpu().sum() == 12
    for wrong in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x.index_select(0, torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    weight = torch.nn.Parameter(x.clone())
    (2 * weight).sum().backward()
    assert isinstance(weight.grad, OnGPU) and weight.grad.tolist() == [[2] * 3] * 2


@pytest.mark.parametrize(
    "base, knobs",
    [
        (RECORD_LIKE, {}),
        (POLY_LIKE, {}),
        (RECORD_LIKE, dict(MTP_WEIGHTS="0.5", PREFIX_LOSS_WEIGHT=0.25, NEFTUNE_ALPHA=5, EMA_DECAY=0.9, SWA_ENABLED=1)),
        (dict(RECORD_LIKE, BIGRAM_VOCAB_SIZE=64, NORMUON=1), dict(TIE_EMBEDDINGS=0)),
    ],
    ids=["record", "poly", "losses and averages", "bigram, NorMuon, untied"],
)
def test_training(base, knobs, data):
    """Every variant of a step, what the warmup restores, and a checkpoint."""
    c = config_of(base, data, WARMUP_STEPS=1, **knobs)
    trainer = trainer_of(c)
    trainer.warm_up()
    for variant in tg.all_step_variants(c):
        assert trainer.step(tg.Progress(0, 0.0), *variant).isfinite()
    state = trainer.state()
    assert state and all(isinstance(x, OnGPU) for name, x in state.items() if name.startswith("weights."))
    trainer.load(state, 1)
    trainer.use_average()
    assert not tg.nonfinite(trainer.model.named_parameters())


@pytest.mark.parametrize(
    "knobs",
    [
        dict(QUANTIZER="trellis", TRELLIS_STATES=4, LQER_ENABLED=1),
        dict(QUANTIZER="uniform", TARGET_BYTES=0, RVQ_ENABLED=1),
        dict(QUANTIZER="gptq_lite"),
        dict(QUANTIZER="trellis", TRELLIS_STATES=4, TUNE_STEPS=2),
    ],
    ids=["trellis", "uniform", "lite", "tuned"],
)
def test_calibration_quantization_and_packing(knobs, data):
    c = config_of(RECORD_LIKE, data, **knobs)
    trainer = trainer_of(c)
    calibration = tg.calibrate(trainer, 0)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    packed = tg.make_artifact(weights, calibration, 10**6, c, lambda line: None)
    assert tg.unpack(packed)[1].keys() == weights.keys()


@pytest.mark.parametrize(
    "knobs",
    [
        dict(TTT_MODE="none", HINT_ENABLED=1),
        PHASED,
        dict(PHASED, TTT_ORDER="length"),
        dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=1024),
    ],
    ids=["sliding", "phased", "length", "chunk"],
)
def test_evaluation(knobs, data):
    c = config_of(RECORD_LIKE, data, VAL_TOKEN_LIMIT=1500, **knobs)
    model, evaluator = model_of(c), tg.Evaluator(c, run_on_gpu())
    score = evaluator(model) if c.ttt_mode == "none" else tg.ttt_method(c)(evaluator, model, True)()
    assert 0 < score.bpb < 8
