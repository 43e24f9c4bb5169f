"""Cheats against tools/prove.py: edits of train_gpt.py that earn a better score by breaking a rule, or change one.

Each is what someone could hide in a submission. `old` must occur once in the script, so that a cheat that no longer
fits fails its test. `rule` says by what the proof notices it; None: it cannot be noticed.
"""

from dataclasses import dataclass, field

RUN, CAUSALITY, NORMALIZATION = "run", "causality", "normalization"
COUNTS, MEMORY, TRAINING, CLAIM = "once each, bytes honest", "no memory", "blind training", "the claimed score"


@dataclass(frozen=True)
class Cheat:
    """An edit of the script, and what notices it."""

    name: str
    rule: str | None
    edits: tuple[tuple[str, str], ...]
    mode: str = "none"  # TTT_MODE of its evaluations
    settings: dict = field(default_factory=dict)  # that it needs to be active
    active: bool = True  # whether it changes the score of the first stream
    ranks: int = 1
    why: str = ""  # nothing notices it


# ------------------------------------------------------------------------------------------------------ ways to cheat

QUANTIZED = (
    '        score = Score(**run.once(run.scored("quantized"), lambda: score_artifact(evaluator, model, plain)))\n'
)
LOGITS = "            logits = self.logits(hidden, head)\n"
WHOLE = "BOS_ID = 1  # every document starts with it\n"
SLIDING = "        nll, log_q = self.compute(forward, batch, ledger.hints_at(scored))\n"
PHASED = "        counted = scored[:adapting] >= 0\n"
LEDGER = "            self.nll[positions] = nll.cpu().numpy()[places]\n"
CLOSE = "        return nats.item()\n"


def before(line, *code):
    """Code in front of a line, indented as it is."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, "".join(f"{indent}{row}\n" for row in code) + line


def after(line, *code):
    """Code behind a line, indented as it is."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, line + "".join(f"{indent}{row}\n" for row in code)


def biased(*code, phased=False):
    """Logits with a bias: lines that fill b [B, T, V].

    They know targets [B, T], at (places in the stream), begin and end of the place's document d, ends (of all
    documents), places (-1: no score), and the evaluator e. `phased`: in phased test-time training, else in windows.
    """
    function = (
        "HINT = [0.0]",
        "def hint(e, targets, places):",
        "    b = torch.zeros(*targets.shape, e.config.vocab_size)",
        "    ends = torch.from_numpy(e.documents)",
        "    at = torch.from_numpy(places).clamp_min(0)",
        "    d = torch.searchsorted(ends, at, right=True) - 1",
        "    begin, end = ends[d], ends[d + 1]",
        *(f"    {row}" for row in code),
        "    return b",
    )
    edits = [after(WHOLE, *function), after(LOGITS, "logits = logits + HINT[0]", "HINT[0] = 0.0")]
    if phased:
        edits.append(before(PHASED, "HINT[0] = hint(self.evaluator, batch.targets[:, -scored.shape[1] :], scored)"))
    else:
        edits.append(
            (SLIDING, f"        HINT[0] = hint(self, batch.targets, scored)\n{SLIDING}        HINT[0] = 0.0\n")
        )
    return tuple(edits)


def bos_at_end(condition="True", by=6.0, phased=False):
    """BOS raised where the document ends, under a condition."""
    return biased(f"b[..., BOS_ID] += {by} * ((at + 1 == end) & ({condition}))", phased=phased)


def look_ahead(condition="True", phased=False, by=1.0):
    """The token after the target raised, under a condition: a sum over the vocabulary does not see it."""
    return biased(
        "ahead = torch.from_numpy(e.tokens[np.minimum(at.numpy() + 2, len(e.tokens) - 1)].astype(np.int64))",
        f"mask = torch.ones_like(at, dtype=torch.bool) & ({condition})",
        f"b.scatter_(2, ahead[..., None], {by} * mask[..., None])",
        phased=phased,
    )


# ------------------------------------------------------------------------------------------------ outside the evaluator

UNPACKED = "        model, config = load_artifact(data, config, explicit, run.device)\n"
TTT_ROWS = '            rows |= run.once(run.scored("ttt"), lambda: test_time_training(evaluator, model, plain))\n'
REAL_PASS = "    begin, training = time.perf_counter(), method(evaluator, model)\n"
SUMMARY_SCORE = "        val_bpb=score.bpb,\n        val_loss=score.loss,\n        ttt_targets_per_second"
BYTES = "    return int(counts.sum(dtype=np.int64))\n"
ENTER = "        ledger.score(scored, nll, log_q)\n"
SUM = "        nats = torch.tensor(self.nll.sum(dtype=np.float64))\n"
VALIDATE = "            log_validation(run, config, progress, validate())\n"
READ = "        starts = within_context(document_starts(ids, cuts), context)\n"
CALIBRATE = "                    batch = send(loader.read_sequences(range(first, first + chunk)), trainer.run.device)\n"
PRE_QUANT = '        score = evaluator(trainer.forward, "pre_quant")\n'
CHUNK_SCORE = "        enter(nll, log_q)\n        for step in range("
COUNTED = "        self.ledger.train_on(window.learned)\n"


def by_grid(*temperatures):
    """The best of several temperatures on the whole stream, then the score with it."""
    return (
        before(
            QUANTIZED,
            "def bpb_at(t):",
            "    evaluator.config = dataclasses.replace(config, temperature=t)",
            "    return evaluator(compiled_forward(model)).bpb",
            f"bpb_at(min({temperatures}, key=bpb_at))",
        ),
    )


def remembered(folder):
    """Counts of the stream's tokens, written by one evaluation and used by the next."""
    return (
        after(LOGITS, "logits = logits + getattr(self, 'counts', 0.0)"),
        before(
            QUANTIZED,
            f"memory = Path({folder}) / 'counts.npy'",
            "if memory.is_file():",
            "    model.counts = torch.from_numpy(0.2 * np.log(np.load(memory))).float()",
            "np.save(memory, np.bincount(evaluator.tokens[1:], minlength=config.vocab_size) + 1.0)",
        ),
    )


OUTSIDE = [
    Cheat(
        "a temperature fitted on the validation text", CAUSALITY, by_grid(0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
    ),
    Cheat("the best of three validations", CAUSALITY, by_grid(0.85, 0.95, 1.15)),
    Cheat(
        "a bias from the counts of the validation stream's tokens",
        CAUSALITY,
        (
            after(LOGITS, "logits = logits + getattr(self, 'counts', 0.0)"),
            before(
                QUANTIZED,
                "counts = np.bincount(evaluator.tokens[1:], minlength=config.vocab_size) + 1.0",
                "model.counts = torch.from_numpy(0.2 * np.log(counts)).float()",
            ),
        ),
    ),
    Cheat(
        "the better of two temperatures, target by target",
        NORMALIZATION,
        (
            after(
                SLIDING,
                "cold, _ = forward(*batch, looped=self.config.loops, temperature=0.8)",
                "nll = torch.minimum(cold, nll)",
            ),
        ),
    ),
    Cheat(
        "training rows from validation",
        TRAINING,
        (
            (
                READ,
                "        more = TokenStream(self.config, 'val').read(0, length + 1)\n"
                f"        ids[0], targets[0] = more[:-1], more[1:]\n{READ}",
            ),
        ),
    ),
    Cheat(
        "Hessians from validation",
        TRAINING,
        (
            before("        calibration = calibrate(trainer, end.step)\n", "trainer.evaluator = evaluator"),
            (
                CALIBRATE,
                f"{CALIBRATE}"
                "                    own = trainer.evaluator\n"
                "                    own.score_sequences(model, own.sequences[: own.batch_size], ScoreLedger(own))\n",
            ),
        ),
    ),
    Cheat(
        "the best checkpoint by validation loss",
        TRAINING,
        (
            (
                VALIDATE,
                "            score = validate()\n"
                "            log_validation(run, config, progress, score)\n"
                "            if score.bpb < getattr(trainer, 'best', math.inf):\n"
                "                trainer.best, trainer.kept = score.bpb, [p.clone() for p in trainer.parameters()]\n"
                "            if last:\n"
                "                copy_all(trainer.parameters(), trainer.kept)\n",
            ),
        ),
    ),
    Cheat(
        "the average or the last weights, by validation loss",
        TRAINING,
        (
            (
                "        trainer.use_average()\n",
                "        kept, raw = [p.clone() for p in trainer.parameters()], evaluator(trainer.forward).bpb\n"
                "        trainer.use_average()\n"
                "        if evaluator(trainer.forward).bpb > raw:\n"
                "            copy_all(trainer.parameters(), kept)\n",
            ),
        ),
        settings=dict(EMA_DECAY=0.9),
    ),
    Cheat(
        "a learning rate that falls where the validation loss does not",
        TRAINING,
        (
            (
                VALIDATE,
                "            score = validate()\n"
                "            log_validation(run, config, progress, score)\n"
                "            if score.bpb > 0.95 * getattr(trainer, 'last', math.inf):\n"
                "                for group in trainer.parameters():\n"
                "                    group.mul_(0.9)\n"
                "            trainer.last = score.bpb\n",
            ),
        ),
    ),
    Cheat(
        "the quantized embedding's scale by validation",
        TRAINING,
        (
            before(
                PRE_QUANT,
                "kept = model.embedding.detach().clone()",
                "def bpb_at(scale):",
                "    model.embedding.data.copy_(kept * scale)",
                "    return evaluator(trainer.forward).bpb",
                "bpb_at(min((0.7, 0.85, 0.95, 1.05, 1.2, 1.4), key=bpb_at))",
            ),
        ),
    ),
    Cheat(
        "weights kept between evaluations",
        MEMORY,
        (
            after(
                UNPACKED,
                "if run.path('cache.pt').is_file():",
                "    model.load_state_dict(torch.load(run.path('cache.pt')))",
            ),
            after(TTT_ROWS, "torch.save(model.state_dict(), run.path('cache.pt'))"),
        ),
        mode="chunk",
        active=False,
    ),
    Cheat("counts in a file beside the artifact", MEMORY, remembered("run.folder"), active=False),
    Cheat("counts in a file of the temporary folder", MEMORY, remembered("tempfile.gettempdir()"), active=False),
    Cheat(
        "a file with scores of this stream, from a first evaluation",
        MEMORY,
        (
            before(
                SUM,
                "old = self.run.path(f'{hash(self.nll.tobytes()[:0]) or len(self.nll)}.npy')",
                "if old.is_file():",
                "    self.nll = np.minimum(self.nll, 0.97 * np.load(old))",
                "np.save(old, self.nll)",
            ),
        ),
        active=False,
    ),
    Cheat(
        "weights that the baseline's pass has trained",
        CAUSALITY,
        (
            (
                "lambda: score_without_training(method(evaluator, model, adapt=False), run)",
                "lambda: score_without_training(method(evaluator, model), run)",
            ),
        ),
        mode="chunk",
        settings=dict(TTT_BASELINE=1),
    ),
    Cheat(
        "test-time training twice, the second pass scored",
        CAUSALITY,
        (before(REAL_PASS, "method(evaluator, model)()"),),
        mode="chunk",
    ),
    Cheat(
        "phased training twice, the second pass scored",
        CAUSALITY,
        (before(REAL_PASS, "method(evaluator, model)()"),),
        mode="phased",
        settings=dict(PHASED_TTT_PREFIX_DOCS=24, GLOBAL_TTT_CHUNK_TOKENS=128),
    ),
    Cheat(
        "a summary with the best stage's score",
        COUNTS,
        ((SUMMARY_SCORE, SUMMARY_SCORE.replace("=score.bpb", "=min(score.bpb, rows['val_bpb_ttt_baseline'])")),),
        mode="chunk",
        settings=dict(TTT_LR=2.0, TTT_BASELINE=1),
        active=False,
    ),
    Cheat("bytes counted too high", COUNTS, ((BYTES, BYTES.replace("64))", "64) * 1.02)")),)),
    Cheat(
        "BOS counted as a byte", COUNTS, (("        widths[self.special] = 0\n", "        widths[self.special] = 1\n"),)
    ),
    Cheat("a summary below its scores", COUNTS, ((CLOSE, "        return 0.98 * nats.item()\n"),)),
    Cheat("losses clipped at a maximum", NORMALIZATION, ((LEDGER, LEDGER.replace("()[", "().clip(None, 9.0)[")),)),
    Cheat("losses rounded down", NORMALIZATION, (before(SUM, "self.nll = np.floor(self.nll * 256) / 256"),)),
    Cheat("losses a thousandth too small", NORMALIZATION, (before(SUM, "self.nll *= 0.999"),)),
    Cheat(
        "a share of the probability to the target itself",
        NORMALIZATION,
        (before(SUM, "self.nll = -np.log(0.98 * np.exp(-self.nll) + 0.02)"),),
    ),
    Cheat(
        "hardest targets scored as the mean", NORMALIZATION, (before(SUM, "self.nll[self.nll > 8] = self.nll.mean()"),)
    ),
    Cheat("hardest targets skipped", RUN, (before(ENTER, "scored[nll.numpy() > 8] = -1"),)),
    Cheat(
        "hardest targets skipped, others scored twice",
        RUN,
        (before(ENTER, "hard, easy = (nll.numpy() > 8) & (scored >= 0), scored.max()", "scored[hard] = easy"),),
    ),
    Cheat(
        "honest while EVAL_SCORES=1",
        MEMORY,
        ((CLOSE, "        return nats.item() * (1 - 0.02 * (not self.write_scores))\n"),),
        active=False,
    ),
    Cheat(
        "honest while EVAL_SCORES is in the environment",
        MEMORY,
        ((CLOSE, "        return nats.item() * (1 - 0.02 * ('EVAL_SCORES' not in os.environ))\n"),),
        active=False,
    ),
    Cheat(
        "another temperature in MODE=all than in MODE=eval",
        TRAINING,
        (
            before(
                QUANTIZED,
                "if config.mode == 'all':",
                "    evaluator.config = dataclasses.replace(config, temperature=0.9)",
            ),
        ),
        active=False,
    ),
]

# ------------------------------------------------------------------------------------------------ behind a condition

LAST_BATCH = (
    "torch.from_numpy(np.isin(places, np.concatenate([np.arange(a + f, a + n) for a, n, f in "
    "e.windows[sum(e.batches(e.sequences)[-1], [])]])))"
)
BEHIND = [
    Cheat("BOS at the end of documents of more than 50 targets", NORMALIZATION, bos_at_end("end - begin > 50", 10.0)),
    Cheat(
        "BOS at the end of documents of more than 1,000 targets", NORMALIZATION, bos_at_end("end - begin > 1000", 10.0)
    ),
    Cheat("a look ahead in documents of more than 50 targets", CAUSALITY, look_ahead("end - begin > 50")),
    Cheat("a look ahead with a vocabulary of 1,024 or more", CAUSALITY, look_ahead("e.config.vocab_size >= 1024")),
    Cheat(
        "more bytes for streams above 2,000 tokens",
        COUNTS,
        ((BYTES, BYTES.replace("64))", "64) * (1 + 0.02 * (len(tokens) > 2000)))")),),
    ),
    Cheat("a look ahead for streams above 2,000 tokens", CAUSALITY, look_ahead("len(e.tokens) > 2000")),
    Cheat("a look ahead unless pytest is there", CAUSALITY, look_ahead("'pytest' not in sys.modules")),
    Cheat("a look ahead on several ranks", CAUSALITY, look_ahead("e.run.world > 1"), ranks=2),
    Cheat(
        "a look ahead where the script is compiled",
        CAUSALITY,
        look_ahead("e.config.compile == '1'", by=8.0),
        settings=dict(COMPILE=1),
    ),
    Cheat(
        "a look ahead in bfloat16",
        CAUSALITY,
        look_ahead("e.config.compute_dtype == 'bfloat16'"),
        settings=dict(COMPUTE_DTYPE="bfloat16"),
    ),
    Cheat("a look ahead beyond place 1,000", CAUSALITY, look_ahead("at - begin > 1000")),
    Cheat(
        "a look ahead after the first phase",
        CAUSALITY,
        look_ahead("d >= e.config.phased_ttt_prefix_docs // 2", True),
        mode="phased",
    ),
    Cheat("a look ahead in the last batch", CAUSALITY, look_ahead(LAST_BATCH)),
    Cheat("a look ahead in short documents", CAUSALITY, look_ahead("end - begin < 40")),
    Cheat("a look ahead in the last document", CAUSALITY, look_ahead("d == len(ends) - 2")),
    Cheat("a look ahead in every tenth document", CAUSALITY, look_ahead("d % 10 == 3")),
]

# ---------------------------------------------------------------------------------- what follows from a document's end

LENGTHS = "lengths = ends[1:] - ends[:-1]"
BORDERS = [
    Cheat("BOS raised where the document ends", NORMALIZATION, bos_at_end(by=2.0)),
    Cheat(
        "BOS raised where the document ends, by the adapters",
        NORMALIZATION,
        bos_at_end(by=2.0, phased=True),
        mode="phased",
    ),
    Cheat(
        "BOS raised beyond the length of the next shorter document",
        CAUSALITY,
        biased(
            LENGTHS,
            "shorter = torch.sort(lengths)[0]",
            "rank = torch.searchsorted(shorter, lengths)",
            "next_shorter = shorter[(rank - 1).clamp_min(0)][d]",
            "b[..., BOS_ID] += 1.0 * (at + 1 - begin >= next_shorter)",
        ),
    ),
    Cheat(
        "BOS raised in the last tenth of a document",
        CAUSALITY,
        biased("b[..., BOS_ID] += 1.0 * (at - begin > 0.9 * (end - begin)) - 0.5"),
    ),
    Cheat(
        "a bias by the next document's length",
        CAUSALITY,
        biased(
            "following = ends[(d + 2).clamp_max(len(ends) - 1)] - end",
            "b[..., BOS_ID] += 0.2 * torch.log1p(following.float())",
        ),
    ),
    Cheat("a bias by the number of documents", CAUSALITY, biased("b[..., BOS_ID] += 0.02 * len(ends)")),
    Cheat("a bias by the length of the stream", CAUSALITY, biased("b[..., BOS_ID] += 0.1 * math.log(len(e.tokens))")),
    Cheat(
        "a bias from the counts of the whole document",
        CAUSALITY,
        biased(
            LENGTHS,
            "rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)",
            "table = torch.zeros(len(lengths), b.size(2))",
            "tokens = torch.from_numpy(e.tokens[1:].astype(np.int64))",
            "table.index_put_((rows, tokens), torch.ones(len(tokens)), accumulate=True)",
            "b += 0.3 * torch.log1p(table[d])",
        ),
    ),
    Cheat(
        "a rate by the whole lengths of a batch's documents",
        CAUSALITY,
        (
            (
                "            lr, decay = config.ttt_lora_lr * scale * times,",
                "            lr, decay = config.ttt_lora_lr * scale * times * self.boost,",
            ),
            before(
                "        adapters.start(self.phase_a)\n",
                "adapters.boost = 1 + float(self.lengths[documents].max()) / 500",
            ),
            after("        self.config, self.device = config, device\n", "self.boost = 1.0"),
        ),
        mode="phased",
    ),
    Cheat(
        "a chunk size by the longest document",
        CAUSALITY,
        (
            (
                "        size = self.config.ttt_chunk_size\n        if",
                "        size = max(8, min(self.config.ttt_chunk_size, int(self.lengths.max()) // 40))\n        if",
            ),
        ),
        mode="phased",
    ),
    Cheat(
        "longest documents first, A handed on",
        CAUSALITY,
        (
            (
                '    return PhasedTTT if config.ttt_order == "stream" else LengthOrderTTT\n',
                "    return LengthOrderTTT\n",
            ),
        ),
        mode="phased",
    ),
    Cheat(
        "attention that sees the whole chunk",
        CAUSALITY,
        (
            (
                "    return (positions <= positions[:, None]) &",
                "    return (positions // 16 <= positions[:, None] // 16) &",
            ),
        ),
        settings=dict(ATTENTION="sdpa"),
    ),
    Cheat("logits centered over the batch", CAUSALITY, (after(LOGITS, "logits = logits - 0.2 * logits.mean((0, 1))"),)),
    Cheat(
        "a decay over the length of the stream",
        CAUSALITY,
        (
            (
                "        chunks = self.count - 1 if tokens < 0 else tokens // self.size\n",
                "        chunks = self.count - 1\n",
            ),
        ),
        mode="chunk",
        settings=dict(TTT_DECAY_TOKENS=100_000, TTT_CHUNK_TOKENS=400),
    ),
    Cheat(
        "a chunk learned before it is scored",
        RUN,
        (
            before(
                CHUNK_SCORE,
                *(
                    "if len(window.counted):",
                    "    self.adapt(nll, leaves, window)",
                    "    nll, leaves, log_q = self.score(window)",
                ),
            ),
        ),
        mode="phased",
    ),
    Cheat(
        "a chunk learned before it is scored, unchecked",
        CAUSALITY,
        (
            before(
                CHUNK_SCORE,
                *(
                    "if len(window.counted):",
                    "    self.adapt(nll, leaves, window)",
                    "    nll, leaves, log_q = self.score(window)",
                ),
            ),
            (COUNTED, ""),
        ),
        mode="phased",
    ),
]

# ------------------------------------------------------------------------------------------------ hints from repetition

HINTED = dict(HINT_ENABLED=1, HINT_MIN_MATCH=4, HINT_MAX_MATCH=8, HINT_CHUNK_TOKENS=64)
WEIGH = "        out[found[chunk]] = weights.score(buckets[chunk], q[chunk], own[chunk], right[chunk])\n"
LEARN = "        weights.learn(buckets[chunk], q[chunk], right[chunk])\n"
CHUNKS = "    chunks = np.flatnonzero(np.diff(found // config.hint_chunk_tokens)) + 1\n"
LOOK_UP = "        found.tokens[matched[same]], found.kinds[matched[same]] = tokens[source[same] + 1], kind\n"
OTHERS = "        others = nll + np.log1p(q * np.expm1(w))\n"
MIXED = dict(TTT_PLAIN_WEIGHT=0.4, HINT_CHUNK_TOKENS=64)
MIX = "        scores = [log_sum(log_w + a, log_rest + b) for a, b in zip(of_adapted, of_plain, strict=True)]\n"
MIX_LEARN = (
    "logit += 0.02 * float((of_adapted[0] - of_plain[0]).sum())",
    "log_w, log_rest = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))",
)
HINTS = [
    Cheat(
        "weights of hints that learn from a chunk before it is scored",
        CAUSALITY,
        (before(WEIGH, LEARN.strip()),),
        settings=HINTED,
    ),
    Cheat(
        "weights of hints learned from the whole stream first",
        CAUSALITY,
        (before(CHUNKS, "for _ in range(4):", "    weights.learn(buckets, q, right)"),),
        settings=HINTED,
    ),
    Cheat(
        "weights of hints learned before scoring, after test-time training",
        CAUSALITY,
        (before(WEIGH, LEARN.strip()),),
        mode="phased",
        settings=HINTED,
    ),
    Cheat(
        "the shares of a mixture learned from targets before they are scored",
        CAUSALITY,
        (before(MIX, *MIX_LEARN),),
        mode="phased",
        settings=MIXED,
    ),
    Cheat(
        "the better of both models for each target",
        NORMALIZATION,
        (after(MIX, "scores = [np.maximum(a, b) for a, b in zip(of_adapted, of_plain, strict=True)]"),),
        mode="phased",
        settings=MIXED,
    ),
    Cheat(
        "a hint that is the target itself",
        NORMALIZATION,
        ((LOOK_UP, LOOK_UP.replace("tokens[source[same] + 1]", "tokens[matched[same] + 1]")),),
        settings=HINTED,
    ),
    Cheat(
        "the target itself where a hint is wrong",
        NORMALIZATION,
        (after(LOOK_UP, "found.tokens[matched[same][::2]] = tokens[matched[same][::2] + 1]"),),
        settings=HINTED,
    ),
    Cheat(
        "hints that look ahead in the stream",
        CAUSALITY,
        (
            (
                "    return places, np.where(alike & (previous >= begins[places]), previous, past)\n",
                "    later = np.append(np.where(alike[1:], places[1:], -1), -1)[: len(places)]\n"
                "    later[later + 1 >= len(begins)] = -1\n"
                "    return places, np.where(later >= 0, later, np.where(alike, previous, past))\n",
            ),
        ),
        settings=HINTED,
    ),
    Cheat(
        "hints that are not paid for by the other tokens",
        NORMALIZATION,
        ((OTHERS, "        others = nll\n"),),
        settings=HINTED,
    ),
    Cheat(
        "a chance of a hint that is not the model's",
        NORMALIZATION,
        (before(OTHERS, "q = 0.5 * q"),),
        settings=HINTED,
    ),
    Cheat(
        "weights of hints never below zero, chosen after the target is seen",
        NORMALIZATION,
        (
            (
                "        w = self.w[buckets]\n        others",
                "        w = np.where(right, np.abs(self.w[buckets]), 0)\n        others",
            ),
        ),
        settings=HINTED,
    ),
]

# ------------------------------------------------------------------------------------------- what no proof can notice

OFFICIAL = "OFFICIAL_SHA256"  # stands for the SHA-256 of the official stream
UNNOTICED = [
    Cheat(
        "a look ahead in the official text alone",
        None,
        look_ahead(f"hashlib.sha256(e.tokens.tobytes()).hexdigest() == '{OFFICIAL}'"),
        why="A proof cannot evaluate pairs of a text which the cheat knows, and no other text wakes it.",
    ),
    Cheat(
        "a look ahead where a manifest.json lies beside the shards",
        None,
        look_ahead("(Path(e.config.data_path) / 'manifest.json').is_file()"),
        why="The script tells the proof's folder from the official one by what lies in it.",
    ),
    Cheat(
        "a look ahead in streams above a million tokens",
        None,
        look_ahead("len(e.tokens) > 1_000_000"),
        why="A proof of ten minutes has no stream as long as the official one.",
    ),
    Cheat(
        "training rows from validation from step 100 on",
        None,
        (
            (
                READ,
                "        if positions.start > 100 * self.layout.sequences:\n"
                "            more = TokenStream(self.config, 'val').read(0, length + 1)\n"
                f"            ids[0], targets[0] = more[:-1], more[1:]\n{READ}",
            ),
        ),
        why="The proof's trainings have six steps; only a whole training again shows another artifact.",
    ),
    Cheat(
        "losses clipped beyond place 1,000",
        None,
        (
            after("        self.write_scores = evaluator.config.eval_scores\n", "self.offsets = evaluator.documents"),
            before(
                SUM,
                "place = np.arange(len(self.nll))",
                "place -= self.offsets[np.searchsorted(self.offsets, place, side='right') - 1]",
                "self.nll = np.where(place > 1000, self.nll.clip(None, 9.0), self.nll)",
            ),
        ),
        why="So deep in a document a sum over the whole vocabulary would take hours, and the tail's gain is small.",
    ),
]

CHEATS = [*OUTSIDE, *BEHIND, *BORDERS, *HINTS]
