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

QUANTIZED = '        score = evaluator(compiled_forward(model), "quantized")\n'
LOGITS = "        logits = self.logits(hidden, head.to(hidden.dtype))\n"
WHOLE = "BOS_ID = 1  # every document starts with it\n"
SLIDING = "        nll, _ = forward(*batch, looped=self.config.loops, temperature=self.config.temperature)\n"
PHASED = "        with torch.set_grad_enabled(adapts):\n            nll, _ = self.forward(\n"
LEDGER = "        self.nll[positions] = nll.detach()[torch.from_numpy(places).to(nll.device)].cpu().numpy()\n"
CLOSE = "        return nats.item()\n"
STAGES = "EVALUATION_STAGES = "


def before(line, *code):
    """Code in front of a line, indented as it is."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, "".join(f"{indent}{row}\n" for row in code) + line


def after(line, *code):
    """Code behind a line, indented as it is."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, line + "".join(f"{indent}{row}\n" for row in code)


def biased(code, phased=False):
    """Logits with a bias that `code` makes in a function: b [B, T, V], of targets [B, T], places [B, T] (-1: none).

    `e` is the evaluator: its tokens and documents. Sliding evaluation, or phased test-time training.
    """
    function = [
        "HINT = [0.0]",
        "def hint(e, targets, places):",
        "    b = torch.zeros(*targets.shape, e.config.vocab_size)",
        "    ends = torch.from_numpy(e.documents)",
        "    at = torch.from_numpy(places).clamp_min(0)",
        "    d = torch.searchsorted(ends, at, right=True) - 1",
        "    begin, end = ends[d], ends[d + 1]",
        *(f"    {row}" for row in code),
        "    return b",
    ]
    edits = [after(WHOLE, *function), after(LOGITS, "logits = logits + HINT[0]")]
    if phased:
        edits.append(before(PHASED, "HINT[0] = hint(self.evaluator, batch.targets[:, -scored.shape[1] :], scored)"))
    else:
        call = SLIDING.replace("nll, _ = ", "").strip()
        edits.append((SLIDING, f"        HINT[0] = hint(self, batch.targets, scored)\n{SLIDING}        HINT[0] = 0.0\n"))
        assert call
    return tuple(edits)


BOS_AT_END = "b[..., BOS_ID] += 2.0 * (at + 1 == end)"


def bos_if(condition):
    """BOS raised by 2 at the end of a document, under a condition."""
    return [f"b[..., BOS_ID] += 2.0 * ((at + 1 == end) & ({condition}))"]


def next_but_one(condition="True"):
    """The token after the target raised by 1: a look ahead that a sum over the vocabulary does not see."""
    return [
        "ahead = torch.from_numpy(e.tokens[np.minimum(at.numpy() + 2, len(e.tokens) - 1)].astype(np.int64))",
        f"b.scatter_(2, ahead[..., None], (1.0 * (torch.ones_like(at, dtype=torch.bool) & ({condition})))[..., None])",
    ]


def rest_counts(strength, condition="True"):
    """Each token raised by how often the rest of its document holds it."""
    return [
        "for i in range(at.size(0)):",
        "    for j in range(at.size(1)):",
        "        pass",
    ]


# ------------------------------------------------------------------------------------------------ outside the evaluator

OUTSIDE = [
    Cheat(
        "a temperature fitted on the validation text before it is scored",
        CAUSALITY,
        (
            before(
                QUANTIZED,
                "def bpb_at(t):",
                "    evaluator.config = dataclasses.replace(config, temperature=t)",
                "    return evaluator(compiled_forward(model)).bpb",
                "bpb_at(min((0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2), key=bpb_at))",
            ),
        ),
    ),
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
]

BEHIND = []
BORDERS = [
    Cheat("BOS raised where the document ends", NORMALIZATION, biased([BOS_AT_END])),
    Cheat("a look at the token after the target", CAUSALITY, biased(next_but_one())),
    Cheat("the same beyond place 1,000", CAUSALITY, biased(next_but_one("at - begin > 1000"))),
]

CHEATS = [*OUTSIDE, *BEHIND, *BORDERS]
