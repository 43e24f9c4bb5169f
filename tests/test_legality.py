"""Proofs that no score breaks the rules C1 to C4, for every evaluation, and that the proofs see a planted violation.

A recorder watches every forward pass and the ledger and trusts neither. What a score should be, it computes itself when
the score is entered: `trunk` and `head_logits`, which see no targets, then a softmax of its own over the whole
vocabulary. What a backward pass read, it takes from the gradients. Tokens of the stream are all different, so a token
says where it stands. `check_causality` (C1), `check_distribution` (C2), `check_score_first` (C3) and `check_one_pass`
(C4) take what it saw and raise `Violation`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, build_model, config, single_run, write_shard
from reference import softcap

VOCABULARY, PADDING = 640, 0  # padding is no text: the time is projected on it
# Targets of each document: longer than the context, of one chunk, of one target, alone and one after the other.
LENGTHS = (20, 1, 7, 33, 1, 1, 12, 5, 26, 9, 40, 3, 1, 17, 8, 30, 2, 11, 22, 6)
# Rates so large that what a score must not depend on would change it visibly.
PHASED = dict(
    TTT_MODE="phased",
    TTT_ORDER="length",
    TTT_BATCH_SIZE=3,
    TTT_STREAMS=2,
    TTT_CHUNK_SIZE=6,
    TTT_EVAL_SEQ_LEN=16,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=8,
    TTT_LORA_LR=0.05,
    PHASED_TTT_PREFIX_DOCS=12,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=20,
    GLOBAL_TTT_LR=0.1,
)
CHUNK = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=48, TTT_EPOCHS=2, TTT_LR=0.1, EVAL_SEQ_LEN=16, EVAL_STRIDE=8)
RECORD = dict(RECORD_LIKE, NUM_LAYERS=4, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4)
POLY = dict(POLY_LIKE, NUM_LAYERS=3, VE_LAYERS="0,2", TEMPERATURE=0.8, EVAL_STRIDE=0)
OPTIONS = dict(GATED_XSA=1, VALUE_RESIDUAL=1, ASYM_LOGIT_RESCALE=1)
EVALUATIONS = {
    "sliding": (RECORD, {}),
    "sliding, tiny": (TINY, dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5)),
    "sliding, one by one": (RECORD, dict(EVAL_SEQ_LEN=9, EVAL_STRIDE=1)),
    "sliding, key offset": (dict(RECORD, KEY_OFFSET=1), dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5)),
    "sliding, window": (dict(RECORD, WINDOW_ATTN_SIZE=4), dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5)),
    "phased, window": (dict(RECORD, WINDOW_ATTN_SIZE=4), PHASED),
    "phased": (RECORD, PHASED),
    "phased, tiny": (TINY, PHASED),
    "phased, stream": (RECORD, dict(PHASED, TTT_ORDER="stream", TTT_STREAMS=3, TTT_BATCH_SIZE=2)),
    "phased, short": (
        RECORD,
        dict(PHASED, TTT_SHORT_DOC_CHUNKS=1, TTT_EVAL_SEQ_LEN=24, TTT_GRAD_STEPS=2, TTT_BATCH_SIZE=4),
    ),
    "phased, one document": (
        TINY,
        dict(PHASED, TTT_ORDER="stream", TTT_BATCH_SIZE=1, TTT_STREAMS=1, PHASED_TTT_NUM_PHASES=3),
    ),
    "phased, cache": (
        RECORD,
        dict(PHASED, TTT_ORDER="stream", TTT_EVAL_SEQ_LEN=24, TTT_CHUNK_SIZE=8, TTT_RECOMPUTE_TOKENS=3),
    ),
    "phased, cache and window": (
        dict(RECORD, WINDOW_ATTN_SIZE=4, KEY_OFFSET=1),
        dict(PHASED, TTT_ORDER="stream", TTT_EVAL_SEQ_LEN=16, TTT_CHUNK_SIZE=4, TTT_RECOMPUTE_TOKENS=6),
    ),
    "chunk": (RECORD, CHUNK),
    "chunk, tiny": (TINY, dict(CHUNK, EVAL_STRIDE=0, TTT_CHUNK_TOKENS=30, TTT_FREEZE_BLOCKS=1)),
    "sliding, poly5": (POLY, dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=3)),
    "sliding, signed pairs": (dict(POLY, BIGRAM_SIGNS=1), dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5)),
    "sliding, options": (dict(RECORD, **OPTIONS), dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5)),
    "phased, options": (dict(RECORD, **OPTIONS), PHASED),
    "chunk, AdamW": (dict(TINY, **OPTIONS), dict(CHUNK, TTT_OPTIMIZER="adamw", TTT_BATCH_SEQS=1, TTT_LR=0.01)),
    "phased, poly5": (POLY, PHASED),
    "chunk, poly5": (POLY, CHUNK),
}


class Violation(Exception):
    """A rule is broken; the message begins with its name."""


# --------------------------------------------------------------------------------------------------------- the recorder


@dataclass
class Entry:
    """Scores that entered the ledger at once, and the distributions that they should come from."""

    time: int
    positions: np.ndarray  # [n] inputs, as the ledger was told
    nll: np.ndarray  # [n]
    logits: torch.Tensor  # [n, V], of the trunk and the head, before the softcap
    nats: torch.Tensor  # [n, V], of every token of the vocabulary, by the recorder's own softcap and softmax
    losses: Callable  # the model's `token_losses` at the temperature of this score


@dataclass
class Read:
    """What a backward pass took."""

    time: int
    positions: set[int]  # of targets
    nameless: int  # targets of documents of one, which cannot be told apart


@dataclass
class Trace:
    """What an evaluation did, in the order in which it did it."""

    tokens: np.ndarray
    entries: list[Entry] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    nll: np.ndarray | None = None  # the ledger's, at the end
    c: tg.Config | None = None
    nats: float = 0.0  # what the run reports
    time: int = 0

    def tick(self):
        self.time += 1
        return self.time

    @functools.cached_property
    def distributions(self):
        """The logits from which each target's distribution is formed, [targets, V]; NaN without a score."""
        logits = torch.full((len(self.tokens) - 1, VOCABULARY), torch.nan, dtype=torch.float64)
        for entry in reversed(self.entries):  # of two scores of a target the first
            logits[entry.positions] = entry.logits.double()
        return logits


@torch.no_grad()
def losses_within(model, bounds, temperature, logits, targets):
    """The model's losses with the softcap's bounds of an earlier time: test-time training learns them too."""
    if bounds is None:
        return model.token_losses(logits, targets, temperature=temperature)
    now = model.softcaps.clone()
    model.softcaps.copy_(bounds)
    try:
        return model.token_losses(logits, targets, temperature=temperature)
    finally:
        model.softcaps.copy_(now)


class Recorder:
    """Watches an evaluation: the forward passes of every model, views of its weights included, and the ledger."""

    def __init__(self, trace):
        self.trace, self.place = trace, {int(t): i for i, t in enumerate(trace.tokens) if t != tg.BOS_ID}

    def __enter__(self):
        self.patch, enter = pytest.MonkeyPatch(), tg.ScoreLedger.score

        def watched(ledger, positions, nll, log_q=None):
            self.enter(positions, nll, log_q)
            self.trace.nll = ledger.nll
            enter(ledger, positions, nll, log_q)

        self.patch.setattr(tg.ScoreLedger, "score", watched)
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.forward, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()
        self.patch.undo()

    def forward(self, module, arguments, keywords, output):
        """A hook of all modules: remembers a model's pass, and sees what a backward pass takes from it."""
        if not isinstance(module, tg.GPT):
            return
        ids, targets, documents = arguments
        self.model, self.keywords, self.documents = module, dict(keywords), documents
        self.ids, self.targets, self.nll = ids, targets[:, -output[0].size(1) :], output[0].detach()
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: self.read(gradient, ids, targets, documents.starts))

    @torch.no_grad()
    def distribution(self, mask):
        """What the places of the last pass are scored by: (logits [n, V], nats of every token [n, V], token losses)."""
        keywords = dict(self.keywords)
        temperature, adapters = keywords.pop("temperature", 1.0), keywords.get("adapters")
        self.hints = keywords.pop("hints", None)
        hidden = self.model.trunk(self.ids, self.documents, last_tokens=self.targets.size(1), **keywords)
        pair = tuple(x[:, 0] for x in adapters["head"]) if adapters else None
        logits = self.model.head_logits(hidden, pair)[mask]
        z = softcap(logits.double(), self.model.config, self.model.softcaps) / temperature
        bounds = None if self.model.softcaps is None else self.model.softcaps.detach().clone()
        losses = functools.partial(losses_within, self.model, bounds, temperature)
        return logits, torch.logsumexp(z, -1, keepdim=True) - z, losses

    def read(self, gradient, ids, targets, starts):
        """Notes every target that a gradient depends on: those with a weight, and the tokens that stood before them."""
        positions, nameless, first = set(), 0, ids.size(1) - gradient.size(1)
        targets = targets[:, -gradient.size(1) :]
        for b, column in (gradient != 0).nonzero().tolist():
            place = first + column
            last, target = ids[b, place].item(), targets[b, column].item()
            seen = {*ids[b, starts[b, place] : place + 1].tolist(), target} - {tg.BOS_ID, PADDING}
            positions |= {self.place[t] - 1 for t in seen}
            if target == tg.BOS_ID:  # a BOS is known by the token before it alone
                positions |= {self.place[last]} if last != tg.BOS_ID else set()
                nameless += last == tg.BOS_ID
        self.trace.reads.append(Read(self.trace.tick(), positions, nameless))

    def enter(self, positions, nll, log_q):
        """Holds what is entered against the last forward pass."""
        places, tokens = positions >= 0, self.trace.tokens
        if nll.shape != self.nll.shape or not torch.equal(nll.detach(), self.nll):
            raise Violation("C4: what is entered is not what the last forward pass gave")
        mask, where = torch.from_numpy(places), positions[places]
        if not np.array_equal(self.targets[mask].numpy(), tokens[where + 1]) or not np.array_equal(
            self.ids[:, -nll.size(1) :][mask].numpy(), tokens[where]
        ):
            raise Violation("C4: what is entered is not the score of these targets")
        self.trace.entries.append(
            Entry(self.trace.tick(), where, nll.detach()[mask].numpy().copy(), *self.distribution(mask))
        )
        if log_q is not None:
            nats = self.trace.entries[-1].nats.gather(1, self.hints[mask][:, None])[:, 0]
            if log_q.requires_grad or (nats + log_q[mask]).abs().max() > 1e-9:
                raise Violation("C2: a hint's probability is not that of the distribution")


class OneByteEach:
    """Takes the Vocabulary's place: no tokenizer has as many tokens as are needed here."""

    def __init__(self, c):
        pass

    def target_bytes(self, previous, targets):
        return np.ones(len(targets), np.int64)


def evaluator_of(tokens, folder, base, knobs):
    """(Evaluator of a stream, its model with random weights)."""
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    # Gains that saturate nothing: each path of the model must matter. Small batches, so that there are many.
    c = config(
        {
            **base,
            "VOCAB_SIZE": VOCABULARY,
            "COMPUTE_DTYPE": "float64",
            "QK_GAIN_INIT": 2.0,
            "VAL_BATCH_SIZE": 128,
            "MICRO_BATCH_TOKENS": 64,
            **knobs,
        },
        DATA_PATH=folder,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "Vocabulary", OneByteEach)
        evaluator = tg.Evaluator(c, single_run())
    return evaluator, build_model(c, seed=3, spread=0.2)


def evaluate(evaluator, model):
    """The nats that a run reports, of the evaluation that the settings ask for."""
    if evaluator.config.ttt_mode == "none":
        return evaluator(model).nats
    return tg.test_time_training(evaluator, model)["val_loss"] * (len(evaluator.tokens) - 1)


def record(tokens, folder, base, knobs):
    """The trace of an evaluation from its beginning."""
    evaluator, model = evaluator_of(tokens, folder, base, knobs)
    trace = Trace(np.asarray(tokens))
    with Recorder(trace):
        trace.c, trace.nats = evaluator.config, evaluate(evaluator, model)
    trace.nll = trace.nll.copy()
    return trace


# ----------------------------------------------------------------------------------- what may depend on what: the rules


def stream():
    """Documents of LENGTHS, every token but BOS another one, and the last document without its end."""
    fresh = iter(np.random.default_rng(5).permutation(np.arange(4, VOCABULARY)).tolist())
    return [t for n in LENGTHS for t in (tg.BOS_ID, *(next(fresh) for _ in range(n - 1)))] + [next(fresh)]


def changed(tokens, places):
    """The stream with other tokens at these places, none of which it held; a BOS stays, and with it the schedule."""
    fresh = iter(sorted(set(range(4, VOCABULARY)) - set(tokens)))
    return [next(fresh) if i in places and t != tg.BOS_ID else t for i, t in enumerate(tokens)]


class Rules:
    """Which scores may depend on a token, from the settings alone."""

    def __init__(self, c):
        self.c, lengths = c, np.array(LENGTHS)
        self.offsets = np.cumsum([0, *lengths])
        self.document = np.repeat(np.arange(len(lengths)), lengths)  # of every position
        order = (
            sorted(range(len(lengths)), key=lambda d: -lengths[d])
            if c.ttt_order == "length"
            else list(range(len(lengths)))
        )
        size = (  # all documents are short: a size by place is the same
            np.where(lengths <= 256, 8, c.ttt_chunk_size)
            if c.ttt_short_doc_chunks
            else np.full(len(lengths), c.ttt_chunk_size)
        )
        self.chunk = (np.arange(self.offsets[-1]) - self.offsets[self.document]) // size[self.document]
        self.last_chunk = (lengths - 1) // size
        cuts = [c.phased_ttt_prefix_docs * (k + 1) // c.phased_ttt_num_phases for k in range(c.phased_ttt_num_phases)]
        self.phase, self.batch, self.stream = (np.zeros(len(lengths), int) for _ in range(3))
        for begin, end in zip((0, *cuts), (*cuts, len(order)), strict=True):
            for number, first in enumerate(range(begin, end, c.ttt_batch_size)):
                some = order[first : min(first + c.ttt_batch_size, end)]
                self.phase[some], self.stream[some] = sum(cut <= begin for cut in cuts), number % c.ttt_streams
                self.batch[some] = first  # grows with time
        self.phases = len(cuts)

    def may_change(self, token, own):
        """Positions whose scores may change with the token at this place of the stream, [targets] bool.

        `own`: with its own score; without, these are the positions whose distributions may change.
        """
        target, d = token - 1, self.document[token - 1]
        positions = np.arange(self.offsets[-1])
        mask = (self.document == d) & (positions >= target + (not own))
        if self.c.ttt_mode == "chunk":
            return mask | (positions // self.c.ttt_chunk_tokens > target // self.c.ttt_chunk_tokens)
        if self.c.ttt_mode == "phased":
            phase, batch, stream = (x[self.document] for x in (self.phase, self.batch, self.stream))
            if self.phase[d] < self.phases:
                mask |= phase > self.phase[d]
            # Through A of the same stream, which acts once B has left zero: not in a document's first chunk.
            if self.c.ttt_order == "length" and self.chunk[target] < self.last_chunk[d]:
                mask |= (stream == self.stream[d]) & (batch > self.batch[d]) & (self.chunk > 0)
        return mask


# --------------------------------------------------------------------------------------------------------- the checkers

SINGLE = (9, 162)  # places of tokens that are changed alone
WHOLE = (3, 8, 13)  # documents that are changed as a whole
SHARES = (0.1, 0.5)  # of the ledger's entries; all that is scored later is changed


def check_causality(run):
    """C1: other tokens leave alone, bit for bit, every score and every distribution that may not depend on them.

    A score may depend on its target, a distribution may not. `run(tokens)` evaluates a stream and returns its Trace.
    Returns which scores of other documents did change.
    """
    tokens, before = stream(), run(stream())
    rules, inside = Rules(before.c), [i for i, t in enumerate(tokens) if t != tg.BOS_ID]
    changes = [{i} for i in SINGLE]
    changes += [set(range(rules.offsets[d] + 1, rules.offsets[d + 1])) for d in WHOLE]
    for share in SHARES:
        done = set().union(*(e.positions.tolist() for e in before.entries[: int(share * len(before.entries))]))
        changes.append({i for i in inside if i - 1 not in done})
    reach = np.zeros(len(tokens) - 1, bool)
    for places in filter(None, changes):
        after, sources = run(changed(tokens, places)), np.array(sorted(places & set(inside))) - 1
        different = before.nll != after.nll
        other_logits = (before.distributions != after.distributions).any(1).numpy()
        scores, distributions = (
            np.logical_or.reduce([rules.may_change(p + 1, own) for p in sources]) for own in (True, False)
        )
        for what, found, allowed in (
            ("scores", different, scores),
            ("distributions", other_logits, distributions),
        ):
            if (found & ~allowed).any():
                wrong = np.flatnonzero(found & ~allowed).tolist()
                raise Violation(f"C1: the tokens {sorted(places)} change the {what} of the targets of {wrong}")
        if not different[sources].all():
            raise Violation("C1: a score does not depend on its target")
        reach |= different & ~np.isin(rules.document, rules.document[sources])
    return reach


def check_distribution(run):
    """C2: what a target is scored by is one distribution over the vocabulary, whatever the target is."""
    tokens, before = np.array(stream()), run(stream())
    for entry in before.entries:
        targets = torch.from_numpy(tokens[entry.positions + 1])
        own = entry.nats.gather(1, targets[:, None])[:, 0]
        if (own - torch.from_numpy(entry.nll)).abs().max() > 1e-9:
            raise Violation("C2: a score is not that of its target in the distribution of the trunk and the head")
        for row in range(0, len(entry.positions), 7):  # the same of the model's own losses: every token as the target
            logits = entry.logits[row].expand(1, VOCABULARY, -1)
            nll, _ = entry.losses(logits, torch.arange(VOCABULARY)[None])
            if abs(torch.exp(-nll).sum().item() - 1) > 1e-9:
                raise Violation("C2: the probabilities of all tokens do not sum to 1")
            if (nll[0] - entry.nats[row]).abs().max() > 1e-9:
                raise Violation("C2: a token's loss is not that of the distribution")
    for place in SINGLE:
        after = run(changed(stream(), {place}))
        if not torch.equal(before.distributions[place - 1], after.distributions[place - 1]):
            raise Violation(f"C2: the distribution for token {place} depends on that token")


def check_score_first(run):
    """C3: every target that a backward pass reads, as a target or as context, had its score before."""
    trace, scored, alone = run(stream()), {}, 0
    rules = Rules(trace.c)
    events = sorted([*trace.entries, *trace.reads], key=lambda event: event.time)
    for event in events:
        if isinstance(event, Entry):
            scored |= dict.fromkeys(event.positions.tolist(), event.time)
            alone += sum(LENGTHS[rules.document[p]] == 1 for p in event.positions)
        elif event.positions - set(scored) or event.nameless > alone:
            raise Violation(f"C3: the targets of {sorted(event.positions - set(scored))} are read before their score")
    if (trace.c.ttt_mode != "none") != bool(trace.reads):
        raise Violation("C3: nothing learned, or what should not learn did")


def check_one_pass(run):
    """C4: each target is entered once, from left to right in its document, and what was entered is what counts."""
    trace = run(stream())
    positions = np.concatenate([entry.positions for entry in trace.entries])
    if not np.array_equal(np.sort(positions), np.arange(len(trace.tokens) - 1)):
        raise Violation("C4: not every target is scored exactly once")
    times = np.zeros(len(positions), int)
    for entry in trace.entries:
        times[entry.positions] = entry.time
        if not np.array_equal(trace.nll[entry.positions], entry.nll):
            raise Violation("C4: a score changed after it was entered")
    document = Rules(trace.c).document
    # Overlapping windows of the sliding evaluation stand in any order: nothing changes between them.
    if trace.reads and ((np.diff(times) < 0) & (np.diff(document) == 0)).any() and trace.c.ttt_mode == "phased":
        raise Violation("C4: a document is not scored from left to right")
    if abs(trace.nats - trace.nll.sum(dtype=np.float64)) > 1e-6:
        raise Violation("C4: the sum is not that of the targets")


CHECKS = {"C1": check_causality, "C2": check_distribution, "C3": check_score_first, "C4": check_one_pass}


def runner(folder, name, **knobs):
    """`run(tokens)` of an evaluation; equal streams are evaluated once."""
    base, settings = EVALUATIONS[name]
    known = {}

    def run(tokens):
        if tuple(tokens) not in known:
            known[tuple(tokens)] = record(tokens, folder, base, {**settings, **knobs})
        return known[tuple(tokens)]

    return run


# ------------------------------------------------------------------------------------------------------- what is proven


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_obeys_every_rule(name, tmp_path):
    run = runner(tmp_path, name)
    reach = check_causality(run)
    assert reach.any() == (run(stream()).c.ttt_mode != "none")  # else the proof would be of an empty claim
    check_distribution(run)
    check_score_first(run)
    check_one_pass(run)


def other_tail(tokens, cut, seed):
    """The stream up to a place, then other tokens in documents of other lengths."""
    generator = np.random.default_rng(seed)
    tail = changed(tokens, set(range(len(tokens))))[cut:]
    return tokens[:cut] + [tg.BOS_ID if generator.random() < 0.15 else 4 + (t - 4) % (VOCABULARY - 4) for t in tail]


@pytest.mark.parametrize(
    "name",
    [name for name in EVALUATIONS if name.split(", ")[0] != "phased" or "stream" in name or "one document" in name],
)
def test_in_stream_order_not_even_the_lengths_of_what_follows_matter(name, tmp_path):
    """A tail of other documents leaves every score before it; shapes differ, so all but the last bits are compared."""
    base, knobs = EVALUATIONS[name]
    knobs = dict(knobs, PHASED_TTT_PREFIX_DOCS=6)
    before = record(stream(), tmp_path, base, knobs).nll
    for cut in (61, 90, 150):
        after = record(other_tail(stream(), cut, cut), tmp_path, base, knobs).nll
        np.testing.assert_allclose(after[: cut - 1], before[: cut - 1], rtol=1e-8, atol=0)
        assert not np.allclose(after[cut:], before[cut:], rtol=1e-2)


# ---------------------------------------------------------------------------------------- planted: the proofs must fail


def looks_ahead(patch):
    """The embedding of each token holds a little of the next one's: what is scored is in sight."""
    embed = tg.GPT.embed

    def plant(model, ids, documents, noise):
        return embed(model, ids, documents, noise) + 0.1 * tg.F.embedding(ids, model.embedding).roll(-1, 1)

    patch.setattr(tg.GPT, "embed", plant)


def mask_is_off_by_one(patch):
    """A query sees the key after it, inside its document."""

    def plant(starts):
        positions = torch.arange(starts.size(1))
        return (positions <= positions[:, None] + 1) & (starts[:, None, :] == starts[:, :, None])

    patch.setattr(tg, "document_mask", plant)


def smear_crosses_documents(patch):
    """The SmearGate mixes the token before a document's first into it."""
    smear = tg.SmearGate.forward
    patch.setattr(
        tg.SmearGate,
        "forward",
        lambda gate, x, documents: smear(gate, x, documents._replace(starts=documents.starts - 1)),
    )


def pairs_cross_documents(patch):
    """BigramHash looks at the token before a document's first."""
    buckets = tg.bigram_buckets
    patch.setattr(tg, "bigram_buckets", lambda ids, starts, count: buckets(ids, starts - 1, count))


def signs_cross_documents(patch):
    """The signs of BigramHash depend on the token before a document's first."""
    signs = tg.pair_signs
    patch.setattr(tg, "pair_signs", lambda ids, starts, *rest: signs(ids, starts - 1, *rest))


def attention_crosses_documents(patch):
    """Rows are one document each."""
    patch.setattr(
        tg, "document_mask", lambda starts: torch.ones(starts.size(1), starts.size(1), dtype=bool).tril()[None]
    )


def keys_cross_documents(patch):
    """A document's first key takes dimensions of the token before."""
    offset = tg.offset_keys
    patch.setattr(tg, "offset_keys", lambda k, dims, inside: offset(k, dims, torch.ones_like(inside)))


def target_in_the_logits(patch):
    """A target's own logit is raised before the softmax: normalized, but not blind."""
    forward = tg.GPT.forward

    def plant(model, ids, targets, *arguments, **keywords):
        head = model.logits.register_forward_hook(
            lambda _, inputs, out: out + 0.2 * tg.F.one_hot(targets[:, -out.size(1) :], out.size(-1))
        )
        try:
            return forward(model, ids, targets, *arguments, **keywords)
        finally:
            head.remove()

    patch.setattr(tg.GPT, "forward", plant)


def not_normalized(patch):
    """The log-sum-exp forgets a tenth of a nat."""
    loss = tg.softcapped_cross_entropy
    patch.setattr(tg, "softcapped_cross_entropy", lambda *a: tuple(x - 0.1 for x in loss(*a)))


def temperature_of_the_target(patch):
    """Of two temperatures, each target takes the one that suits it."""
    loss = tg.softcapped_cross_entropy

    def plant(logits, targets, *rest):
        (cold, lse), (warm, _) = loss(2 * logits, targets, *rest), loss(logits, targets, *rest)
        return torch.minimum(cold, warm), lse

    patch.setattr(tg, "softcapped_cross_entropy", plant)


def blind_ledger(patch):
    """The program's own guards are off: whoever plants a violation would see to that."""

    def score(ledger, positions, nll, log_q=None):
        places = positions >= 0
        ledger.own_counts[positions[places]] = 1
        ledger.nll[positions[places]] = nll.detach()[torch.from_numpy(places)].numpy()

    patch.setattr(tg.ScoreLedger, "score", score)
    patch.setattr(tg.ScoreLedger, "train_on", lambda ledger, positions: None)
    patch.setattr(tg.ScoreLedger, "close", lambda ledger, stage="": float(ledger.nll.sum(dtype=np.float64)))


def adapt_by(patch, order):
    """Another loop over a batch's chunks; `order(ttt, documents, chunk, score, learn)` handles one of them."""
    blind_ledger(patch)

    def score_and_adapt(ttt, documents):
        documents = documents[np.argsort(-ttt.chunk_counts[documents], kind="stable")]
        for chunk in range(int(ttt.chunk_counts[documents[0]])):

            def score(chunk=chunk):
                batch, scored = ttt.window(documents[ttt.chunk_counts[documents] > chunk], chunk)
                ttt.ledger.score(scored, ttt.score(ttt.sent(batch, scored))[0])

            def learn(chunk=chunk):
                some = documents[ttt.chunk_counts[documents] > chunk]
                batch, scored = ttt.window(some, chunk)
                nll, leaves, _ = ttt.score(ttt.sent(batch, scored))
                loss = (nll * torch.from_numpy(scored >= 0)).sum(1).sum()
                ttt.adapters.step(len(some), [g[: len(some)] for g in torch.autograd.grad(loss, leaves)])

            order(ttt, documents, chunk, score, learn)

    patch.setattr(tg.PhasedTTT, "score_and_adapt", score_and_adapt)


def learns_before_scoring(patch):
    adapt_by(patch, lambda ttt, documents, chunk, score, learn: (learn(), score()))


def learns_from_the_next_chunk(patch):
    def order(ttt, documents, chunk, score, learn):
        score()
        if chunk + 1 < ttt.chunk_counts[documents[0]]:
            learn(chunk + 1)

    adapt_by(patch, order)


def scores_again_after_learning(patch):
    """The ledger holds the second score; the first was entered in time."""

    def order(ttt, documents, chunk, score, learn):
        score()
        learn()
        batch, scored = ttt.window(documents[ttt.chunk_counts[documents] > chunk], chunk)
        again = ttt.score(ttt.sent(batch, scored))[0].detach()
        ttt.ledger.nll[scored[scored >= 0]] = again[torch.from_numpy(scored >= 0)]

    adapt_by(patch, order)


def scores_twice(patch):
    adapt_by(patch, lambda ttt, documents, chunk, score, learn: (score(), learn(), score()))


def scores_from_right_to_left(patch):
    adapt_by(
        patch,
        lambda ttt, documents, chunk, score, learn: (
            score(int(ttt.chunk_counts[documents[0]]) - 1 - chunk),
            learn(int(ttt.chunk_counts[documents[0]]) - 1 - chunk),
        ),
    )


def skips_one(patch):
    """The first target of a document's second chunk is left out."""
    blind_ledger(patch)
    window = tg.PhasedTTT.window

    def plant(ttt, documents, chunk):
        batch, scored = window(ttt, documents, chunk)
        if chunk == 1:
            scored[0, np.flatnonzero(scored[0] >= 0)[0]] = -1
        return batch, scored

    patch.setattr(tg.PhasedTTT, "window", plant)


def enters_the_better_score(patch):
    """What is entered is not what the forward pass gave."""
    score = tg.PhasedTTT.score

    def plant(ttt, *arguments):
        nll, leaves, log_q = score(ttt, *arguments)
        return nll.clamp(max=6), leaves, log_q

    patch.setattr(tg.PhasedTTT, "score", plant)


def passes_twice(patch):
    """A first pass over everything teaches the weights; the second one is reported."""
    phased = tg.LengthOrderTTT
    patch.setattr(
        tg,
        "LengthOrderTTT",
        lambda evaluator, model, adapt=True: (phased(evaluator, model)(), phased(evaluator, model, adapt))[1],
    )


def keeps_b(patch):
    """A document begins with what the one before it learned."""
    start = tg.Adapters.start

    def plant(adapters, *arguments):
        kept = {key: b.clone() for key, b in adapters.b.items()} if hasattr(adapters, "a") else None
        start(adapters, *arguments)
        for key, b in (kept or {}).items():
            adapters.b[key].copy_(b)

    patch.setattr(tg.Adapters, "start", plant)


def documents_share_gradients(patch):
    """Documents of a batch learn from each other."""
    step = tg.Adapters.step
    patch.setattr(
        tg.Adapters,
        "step",
        lambda adapters, documents, gradients: step(
            adapters, documents, [g.mean(0, keepdim=True).expand_as(g).contiguous() for g in gradients]
        ),
    )


def phase_holds_unscored_documents(patch):
    blind_ledger(patch)
    train = tg.PhasedTTT.train_full_model
    patch.setattr(tg.PhasedTTT, "train_full_model", lambda ttt, documents: train(ttt, ttt.order[: len(documents) + 3]))


def trains_on_the_next_chunk(patch):
    """Each chunk of the stream is learned from before it is scored."""
    blind_ledger(patch)
    step = tg.FullModelSGD.step
    patch.setattr(
        tg.FullModelSGD,
        "step",
        lambda sgd, positions, lr: step(sgd, np.minimum(positions + 24, len(sgd.tokens) - 2), lr),
    )


# What is planted, in which evaluation, and the rules whose proofs must fail.
PLANTED = [
    (looks_ahead, "sliding, tiny", "C2"),
    (looks_ahead, "phased, tiny", "C2"),
    (looks_ahead, "chunk, tiny", "C2"),
    (mask_is_off_by_one, "sliding, tiny", "C1 C2"),
    (mask_is_off_by_one, "chunk, tiny", "C1 C2"),
    (smear_crosses_documents, "sliding", "C1"),
    (smear_crosses_documents, "sliding, poly5", "C1"),
    (pairs_cross_documents, "sliding, poly5", "C1"),
    (signs_cross_documents, "sliding, signed pairs", "C1"),
    (attention_crosses_documents, "sliding, tiny", "C1"),
    (keys_cross_documents, "sliding, key offset", "C1"),
    (target_in_the_logits, "sliding, tiny", "C2"),
    (not_normalized, "sliding, tiny", "C2"),
    (not_normalized, "phased, tiny", "C2"),
    (temperature_of_the_target, "sliding, tiny", "C2"),
    (learns_before_scoring, "phased, tiny", "C3"),
    (learns_from_the_next_chunk, "phased, tiny", "C1 C3"),
    (scores_again_after_learning, "phased, tiny", "C4"),
    (scores_twice, "phased, tiny", "C4"),
    (scores_from_right_to_left, "phased, tiny", "C1 C4"),
    (skips_one, "phased, tiny", "C4"),
    (enters_the_better_score, "phased, tiny", "C4"),
    (passes_twice, "phased, tiny", "C1 C4"),
    (keeps_b, "phased, tiny", "C1"),
    (documents_share_gradients, "phased, tiny", "C1"),
    (phase_holds_unscored_documents, "phased, tiny", "C1 C3"),
    (trains_on_the_next_chunk, "chunk, tiny", "C1 C3"),
]


@pytest.mark.parametrize("plant, name, rules", PLANTED, ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_violation_fails_its_proof(plant, name, rules, tmp_path, monkeypatch):
    plant(monkeypatch)
    run = runner(tmp_path, name, ATTENTION="sdpa")
    for rule in rules.split():
        with pytest.raises(Violation, match=rule):
            CHECKS[rule](run)
