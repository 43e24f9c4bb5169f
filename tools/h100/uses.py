"""Runs the script's own training, evaluation and test-time training with fake tensors on a fake H100.

Each use is a function of a `Session`. What runs is the script's `Trainer.step`, `Evaluator.compute`,
`PhasedTTT` and `FullModelSGD`; only data, ranks and random generators are stand-ins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fake_gpu
from contexts import Context
from eager_costs import EagerCosts, hand_written_launches
from inductor_backend import Recorder

RANKS = 8
# Lengths of documents: log-normal with the median and spread of those in the public log of PR #2163, whose mean is 957.
MEDIAN_LENGTH, LENGTH_SPREAD = 600, 0.95
# A model of two layers with every kind of layer of the record: looped, sequential, parallel, with skip and XSA.
SMALL = dict(NUM_LAYERS="2", LOOP_START="0", LOOP_END="0", NUM_LOOPS="1", PARALLEL_START_LAYER="1", XSA_LAST_N="2")


@dataclasses.dataclass
class Result:
    """What one use showed, besides graphs and costs."""

    use: str
    graphs: int = 0
    allowed: int = 1
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    gradients: list[str] = dataclasses.field(default_factory=list)  # those that are not contiguous float32
    error: str = ""
    standing_bytes: int = 0  # weights, averages and states of optimizers, between steps
    gradient_bytes: int = 0
    micro_steps: int = 1
    tokens: int = 0  # in one call of the model
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Session:
    """The script under test and what watches it."""

    script: Any
    config: Any
    costs: EagerCosts
    recorder: Recorder
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda", 0))
    results: list[Result] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def use(self, name: str, allowed: int = 1) -> Iterator[Result]:
        """Runs a use from a clean state of the compiler. An error in it becomes a finding."""
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters["stats"]
        result, before = Result(name, allowed=allowed), counters["unique_graphs"]
        self.results.append(result)
        self.recorder.use = self.costs.part = name
        try:
            yield result
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            result.error = f"{type(error).__name__}: {lines[0] if lines else ''}"
            result.error += "".join(f"; {x.strip()}" for x in lines[1:] if "File" in x or "Explanation" in x)[:400]
        result.graphs = counters["unique_graphs"] - before

    def forget_costs(self, use: str) -> None:
        """Leaves the costs of other uses alone."""
        parts = [part for part in self.costs.costs if part == use or part.rpartition(", ")[0] == use]
        for part in parts:
            del self.costs.costs[part]

    def model(self) -> Any:
        """A model with fake parameters."""
        with self.costs.suspended():
            return fake_gpu.fake_parameters(self.script.meta_model(self.config), self.device)

    def run(self) -> Any:
        """Rank 0 of 8."""
        return self.script.Run(0, RANKS, RANKS, self.device)


def load_script(path: Path, changes: Callable[[str], str] = str) -> Any:
    """The training script as a module, from a file or from a changed text of it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    exec(compile(changes(path.read_text(encoding="utf-8")), str(path), "exec"), module.__dict__)
    return module


def configuration(script: Any, settings: dict[str, str]) -> Any:
    """PRESET=record on 8 GPUs with these knobs. Errors: the script's ConfigError."""
    defaults = dict(PRESET="record", DEVICE="cuda", ATTENTION="fa3", READ_AHEAD="0")
    return script.config_from_env({**defaults, **settings}, True)[0]


class Tokens:
    """A token stream of documents as long as the challenge's, whose text is one token."""

    def __init__(self, begin_of_document: int, count: int = 1 << 22):
        lengths = np.random.default_rng(0).lognormal(np.log(MEDIAN_LENGTH), LENGTH_SPREAD, count // 100)
        begins = np.cumsum(np.maximum(2, lengths).astype(np.int64))
        self.tokens = np.full(count + 1, begin_of_document + 1, np.uint16)
        self.tokens[np.append(0, begins[begins < count])] = begin_of_document
        self.shards, self.starts = [self.tokens], np.array([0, count + 1])

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from start to before stop."""
        return self.tokens[start:stop]

    read_known = read


class Vocabulary:
    """A tokenizer whose tokens each begin with the one before."""

    def __init__(self, config: Any):
        self.size = config.vocab_size

    def longest_prefixes(self) -> np.ndarray:
        """[V] int64, -1 for the first."""
        return np.arange(-1, self.size - 1)


class Collectives:
    """Stands for torch.distributed: moves nothing, and counts calls and bytes."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable:
        def call(*args: Any, **_: Any) -> Any:
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.calls[name] = self.calls.get(name, 0) + 1
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.calls[name + " bytes"] = self.calls.get(name + " bytes", 0) + size
            return types.SimpleNamespace(wait=lambda: None)

        return call


class Generator:
    """Stands for torch.Generator, which would make a real one on the device."""

    def __init__(self, *_: Any, **__: Any):
        self.seed = 0

    def manual_seed(self, seed: int) -> Generator:
        """Sets the seed, of which nothing follows here."""
        self.seed = seed
        return self


@contextlib.contextmanager
def stand_ins(script: Any) -> Iterator[Collectives]:
    """Data, ranks and generators of the script are stand-ins meanwhile."""
    collectives = Collectives()
    rand, uniform = torch.rand, Tensor.uniform_
    stream = Tokens(script.BOS_ID)
    before = script.dist, script.TokenStream, script.Vocabulary
    script.dist, script.Vocabulary = collectives, Vocabulary
    script.TokenStream = lambda *_: stream
    generator = torch.Generator
    torch.Generator = Generator  # pyright: ignore[reportAttributeAccessIssue]
    torch.rand = lambda *a, generator=None, **k: rand(*a, **k)
    Tensor.uniform_ = lambda self, *a, generator=None, **k: uniform(self, *a, **k)
    construct, fault = script.GPT.__init__, getattr(script, "attention_fault", None)
    script.attention_fault = lambda *_, **__: ""  # a script that tries a backend on the device would find it wanting

    def construct_outside(self: Any, *args: Any) -> None:
        with unset_fake_temporarily():  # a conversion of fake parameters is refused by torch
            construct(self, *args)

    script.GPT.__init__ = construct_outside
    try:
        yield collectives
    finally:
        script.dist, script.TokenStream, script.Vocabulary = before
        script.GPT.__init__, script.attention_fault = construct, fault
        torch.Generator, torch.rand = generator, rand
        Tensor.uniform_ = uniform


def in_part(session: Session, owner: Any, method: str, part: str) -> None:
    """Has a method of an object count under a part's name."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        with session.costs.within(f"{session.recorder.use}, {part}"):
            return original(*args, **kwargs)

    setattr(owner, method, call)


def note_gradients(result: Result, named: list[tuple[str, Any]]) -> None:
    """Notes gradients that fused optimizers would not take: they must be contiguous, and float32 as the weights are."""
    for name, p in named:
        if p.grad is not None and not (p.grad.dtype == torch.float32 and p.grad.is_contiguous()):
            result.gradients.append(f"{name}: {p.grad.dtype}, strides {tuple(p.grad.stride())}")
    result.gradient_bytes = sum(p.numel() * 4 for _, p in named if p.grad is not None)


def variant_name(variant: Any, layers: int) -> str:
    """The use of a variant of the training step."""
    kinds = ["looped"] * variant.looped + ["fake quantization"] * variant.fake_quant
    kinds += ["multi-token prediction"] * variant.predicts_ahead
    if variant.trainable_layers < layers:
        kinds.append(f"first {variant.trainable_layers} layers")
    return f"training ({' + '.join(kinds)})" if kinds else "training"


def training(session: Session, steps: int = 2) -> None:
    """Steps of each variant that the training may run, on different batches."""
    script, config = session.script, session.config
    with stand_ins(script) as collectives:
        loader = script.TrainLoader(config, session.run())
        for variant in script.all_step_variants(config):
            name = variant_name(variant, config.num_layers)
            collectives.calls.clear()
            with session.use(name) as result:
                trainer = script.Trainer(session.model(), loader, config, session.run())
                watch_trainer(session, trainer, result)
                in_part(session, trainer.optimizers.muon, "direction", "Muon's directions")
                with session.costs.suspended(), unset_fake_temporarily():
                    session.recorder.context = Context.of_starts(loader.read((0, 0)).documents.starts.numpy())
                result.micro_steps = trainer.layout.micro_steps
                result.tokens = trainer.layout[3] * config.train_seq_len
                for step in range(steps):
                    session.forget_costs(name)
                    collectives.calls.clear()
                    trainer.step(script.Progress(step, 0.0), *variant)
                result.collectives = dict(collectives.calls)
                result.standing_bytes = standing_bytes(session, trainer)


def standing_bytes(session: Session, thing: Any) -> int:
    """Bytes on the device that an object of the script holds."""
    tensors = fake_gpu.tensors_of(thing, (session.script.__name__, "torch.optim"))
    tensors = [t for t in tensors if t.device.type == "cuda"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def watch_trainer(session: Session, trainer: Any, result: Result) -> None:
    """Counts the optimizers and the averages apart, and looks at the gradients before the optimizers take them."""
    optimize = trainer.optimizers.step

    def step(*args: Any, **kwargs: Any) -> Any:
        note_gradients(result, list(trainer.model.named_parameters()))
        return optimize(*args, **kwargs)

    trainer.optimizers.step = step
    in_part(session, trainer.optimizers, "step", "optimizers")
    in_part(session, trainer, "update_averages", "averages")


def new_evaluator(session: Session, count: int = 1 << 20) -> Any:
    """The script's evaluator, over a synthetic stream and without files."""
    script, config = session.script, session.config
    evaluator = script.Evaluator.__new__(script.Evaluator)
    evaluator.config, evaluator.run = config, session.run()
    evaluator.tokens = Tokens(script.BOS_ID, count).tokens
    evaluator.bytes, evaluator.notes = count, []
    evaluator.documents = script.document_offsets(evaluator.tokens)
    evaluator.windows = script.evaluation_windows(evaluator.documents, config.eval_context, config.eval_step)
    evaluator.sequences = script.pack_sequences(evaluator.windows, config.eval_context)
    evaluator.batch_size = min(config.eval_rows, len(evaluator.sequences))
    return evaluator


def evaluation(session: Session) -> None:
    """Batches of sliding windows."""
    script = session.script
    with stand_ins(script), session.use("evaluation") as result:
        evaluator = new_evaluator(session)
        forward = script.compiled_forward(session.model())
        batches = evaluator.batches(evaluator.sequences)
        with session.costs.suspended():
            batch, _ = evaluator.batch(batches[0], evaluator.windows)
        result.tokens = batch.ids.numel()
        session.recorder.context = Context(evaluator.windows[np.concatenate(batches[0]), 1].astype(float))
        for batch in (batches[0], batches[1], batches[-1]):
            session.forget_costs(result.use)
            with session.costs.suspended():
                inputs, _ = evaluator.batch(batch, evaluator.windows)
            evaluator.compute(forward, inputs)


def ttt_windows(counts: np.ndarray, batch: int, full: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """Documents [R] and a chunk of windows to look at, from the number of chunks of every document.

    First the largest window, of a whole batch with a full context, whose costs the table shows. Then a batch of
    documents that end one after the other, longest first, as in the script.
    """
    order = np.argsort(-counts, kind="stable")
    yield order[:batch], min(full, int(counts[order[batch - 1]]) - 2)
    ending = order[counts[order] <= full + 1]
    documents = ending[np.linspace(0, len(ending) - 1, batch).astype(int)]
    longest = int(counts[documents[0]])
    for chunk in np.unique(np.append(np.linspace(0, longest - 1, most - 2).astype(int), 1)).tolist():
        yield documents[counts[documents] > chunk], chunk


def test_time_training(session: Session, name: str = "TTT", windows: int = 14) -> None:
    """Windows of phased TTT as documents come to their ends: scored, and adapted to where a document goes on."""
    script, config = session.script, session.config
    with stand_ins(script), session.use(name) as result:
        evaluator = new_evaluator(session)
        model = session.model()
        with session.costs.suspended():  # what is set up once may wait
            ttt = script.ttt_method(config)(evaluator, model)
        counts, batch_size = ttt.chunk_counts, config.ttt_batch_size
        in_part(session, ttt, "adapt", "adapting")
        in_part(session, ttt, "start_batch", "a batch's start and end")
        in_part(session, ttt, "finish_batch", "a batch's start and end")
        in_part(session, ttt, "store", "cache")
        costs: dict[str, Any] = {}
        full = config.ttt_context // config.ttt_chunk_size
        cached = config.ttt_recompute_tokens > 0
        for documents, chunk in ttt_windows(counts, batch_size, full, windows):
            session.forget_costs(result.use)
            if not result.shapes:
                ttt.start_batch(ttt.adapters, documents)
                result.standing_bytes = standing_bytes(session, [model, ttt.adapters, ttt.cache if cached else ()])
            batch, scored = ttt.window(documents, chunk)
            session.recorder.context = Context(np.array([float(batch.ids.shape[1])]))
            adapting = int((counts[documents] > chunk + 1).sum())
            length = ttt.slots_in_use(ttt.base) + ttt.length if cached else batch.ids.shape[1]
            if not result.shapes:
                session.recorder.window = (len(batch.ids), length, scored.shape[1])
                session.recorder.window_tokens = ttt.length if cached else 0
                fitted = cached_windows if cached else other_windows
                session.recorder.other_windows = fitted(*session.recorder.window)
            result.shapes.append((len(batch.ids), length, scored.shape[1], adapting))
            window = ttt.sent(batch, scored, adapting)._replace(learned=np.empty(0, np.int64))  # windows repeat here
            ttt.compute(window, lambda *scores: None)
            ttt.finish_chunk()
            if not costs:
                ttt.finish_batch(ttt.adapters, documents)
            result.tokens = result.tokens or batch.ids.numel()
            costs = costs or dict(session.costs.costs)
        session.costs.costs = costs
        session.recorder.other_windows = []


def cached_test_time_training(session: Session) -> None:
    """The same with a cache of keys and values, where the settings have none."""
    config = session.config
    if config.ttt_recompute_tokens or config.ttt_order == "length":
        return
    session.config = dataclasses.replace(config, ttt_recompute_tokens=config.ttt_chunk_size)
    try:
        test_time_training(session, "TTT with a cache")
    finally:
        session.config = config


def other_windows(documents: int, context: int, scored: int) -> list[tuple[int, ...]]:
    """Windows [R, T, scored] from which the costs of any window can be fitted, and two more to try the fit."""
    half, quarter = documents // 2, max(2, documents // 4)
    return [
        (half, context, scored),
        (half, context // 2, scored),
        (documents, context // 4, scored),
        (documents, context // 2, scored // 2),
        (quarter, context // 4, scored),
        (2, context // 2, scored),
    ]


def cached_windows(documents: int, keys: int, scored: int) -> list[tuple[int, ...]]:
    """As `other_windows` with a cache: numbers of documents and of keys vary."""
    half, quarter = documents // 2, max(2, documents // 4)
    sizes = [(half, keys), (half, keys // 2), (documents, keys // 4), (documents, keys // 2), (quarter, keys // 4)]
    return [(*size, scored) for size in [*sizes, (2, keys // 2)]]


def calibration(session: Session) -> None:
    """A calibration batch: the model runs eagerly, with hooks that add up products of inputs."""
    script, config = session.script, session.config
    with stand_ins(script), session.use("calibration", allowed=0) as result:
        loader = script.TrainLoader(config, session.run())
        trainer = script.Trainer(session.model(), loader, config, session.run())
        result.micro_steps = trainer.layout.micro_steps
        result.tokens = trainer.layout[3] * config.train_seq_len
        script.calibration_sums(trainer, range(1))


def full_model_steps(session: Session) -> None:
    """SGD steps of all weights between two phases of TTT."""
    script, config = session.script, session.config
    with stand_ins(script) as collectives, session.use("full-model SGD") as result:
        evaluator = new_evaluator(session)
        model, ledger = session.model(), script.ScoreLedger(evaluator)
        ledger.own_counts[:] = 1
        sgd = script.FullModelSGD(evaluator, model, ledger, config.global_ttt_momentum)
        size, length = config.global_ttt_chunk_tokens, config.train_seq_len
        ids = evaluator.tokens[: -(-size // length) * length].reshape(-1, length)
        session.recorder.context = Context.of_starts(script.document_starts(ids.astype(np.int64)))
        for step in range(2):
            collectives.calls.clear()
            session.forget_costs(result.use)
            sgd.step(np.arange(step * size, (step + 1) * size), config.global_ttt_lr)
            note_gradients(result, list(model.named_parameters()))
        result.collectives = dict(collectives.calls)
        result.standing_bytes = standing_bytes(session, [model, sgd.optimizer])
        result.tokens = -(-size // RANKS)


USES = {
    "training": training,
    "calibration": calibration,
    "evaluation": evaluation,
    "ttt": test_time_training,
    "cached_ttt": cached_test_time_training,
    "sgd": full_model_steps,
}


def new_session(script: Any, settings: dict[str, str], inductor: bool = True) -> Session:
    """A session with nothing in it yet."""
    costs = EagerCosts()
    return Session(script, configuration(script, settings), costs, Recorder(costs, inductor))


def run_uses(session: Session, names: list[str]) -> None:
    """Runs some uses, in the order of USES."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with session.recorder.installed(), hand_written_launches(session.costs), mode, session.costs:
        for name in names:
            USES[name](session)
