"""A trained model in Python: logits, text and bits per byte (docs/model.md).

from train_gpt import load_model
model, tokenizer = load_model("logs/RUN")
print(model.generate("The function returns"), model.score("A text."))
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import strangers  # noqa: E402
import train_gpt as tg  # noqa: E402
from strangers import UserError  # noqa: E402
from tokens import Tokenizer, sample, settings_of, tokenizer_of  # noqa: E402


class Model:
    """A run's model as its artifact holds it. A document's tokens begin with BOS, as those of `tokenizer.encode` do."""

    def __init__(self, gpt: tg.GPT, tokenizer: Tokenizer, config: tg.Config):
        self.gpt, self.config = gpt.eval(), config
        self.tokenizer = tokenizer

    def batch(self, ids: np.ndarray, targets: np.ndarray) -> tg.Batch:
        """Sequences [B, T] as the model takes them. Errors: UserError for tokens that it cannot take."""
        context, vocabulary = self.config.eval_context, self.config.vocab_size
        if not (0 < ids.shape[1] <= context and ids.min() >= 0 and ids.max() < vocabulary):
            raise UserError(f"ids: must be 1 to {context} tokens, from 0 to {vocabulary - 1}")
        return tg.to_device(ids, targets, tg.document_starts(ids), self.gpt.cos.device)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], last: int | None = None) -> torch.Tensor:
        """Softcapped logits of what follows each token, or each of the last ones: [T, V] float32, on the CPU."""
        tokens, c = np.array([ids], dtype=np.int64), self.config
        batch = self.batch(tokens, tokens)
        hidden = self.gpt.trunk(batch.ids, batch.documents, looped=c.loops, last_tokens=last)
        return tg.softcap_plain(self.gpt.head_logits(hidden)[0], c.logit_softcap, c.softcap_type).float().cpu()

    @torch.no_grad()
    def losses(self, ids: Sequence[int]) -> np.ndarray:
        """Nats of each token after the first, [n - 1] float64, by the evaluation's windows: any length."""
        tokens, nats = np.array(ids, dtype=np.int64), np.zeros(len(ids) - 1)
        c = self.config
        windows = tg.evaluation_windows(np.array([0, len(nats)]), c.eval_context, c.eval_step)
        for (size, first), group in itertools.groupby(windows.tolist(), lambda window: window[1:]):
            begins = np.array([window[0] for window in group])
            for at in range(0, len(begins), c.eval_rows):
                place = begins[at : at + c.eval_rows, None] + np.arange(size)  # [B, T]
                batch = self.batch(tokens[place], tokens[place + 1])
                nll, _ = self.gpt(*batch, looped=c.loops, temperature=c.temperature)
                nats[place[:, first:]] = nll[:, first:].double().cpu()
        return nats

    def score(self, text: str) -> float:
        """Bits per byte of a text, as the one document of an evaluation; nan for an empty text."""
        ids = self.tokenizer.encode(text)
        nats, count = self.losses(ids).sum(), self.tokenizer.target_bytes(np.array(ids)).sum()
        return tg.Score(float(nats), len(ids) - 1, int(count)).bpb

    def tokens(self, ids: Sequence[int], most: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
        """Sampled tokens that follow these, up to the end of the document, `most` at most."""
        written, held = list(ids), b""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(most):
            row = self.logits(written[-self.config.eval_context :], last=1)[0]
            row[self.tokenizer.unfit(held)] = -torch.inf
            written.append(sample(row, temperature, top_k, generator))
            if written[-1] == tg.BOS_ID:
                return
            held = self.tokenizer.unfinished(held, written[-1])
            yield written[-1]

    def stream(self, prompt="", *, tokens=100, temperature=0.8, top_k=40, seed=0) -> Iterator[str]:
        """The prompt and a text that follows it, in pieces, each as soon as it is final."""
        ids = self.tokenizer.encode(prompt)
        yield from self.tokenizer.stream(itertools.chain(ids[1:], self.tokens(ids, tokens, temperature, top_k, seed)))

    def generate(self, prompt="", **options) -> str:
        """The prompt and a text that follows it. Options: tokens=100, temperature=0.8, top_k=40 (0: all), seed=0."""
        return "".join(self.stream(prompt, **options))


def load_model(path: str | Path, tokenizer: str | Path = "", **knobs: object) -> tuple[Model, Tokenizer]:
    """The model of a run's folder, or of its model.pgolf, and the run's tokenizer.

    `knobs` are settings such as device="cpu", compute_dtype="float32". Errors: UserError, tg.ConfigError.
    """
    path = Path(path) / tg.CONTAINER_FILE if Path(path).is_dir() else Path(path)
    if not strangers.is_there(path):
        raise UserError(f"{path}: there is no such artifact; a run writes {tg.CONTAINER_FILE} to its folder")
    environment = settings_of(path, Path(tokenizer or tokenizer_of(path)), knobs)
    c, explicit, _ = tg.config_from_env(environment, torch.cuda.is_available())
    if c.device == "cpu" and c.cpu_threads:
        torch.set_num_threads(c.cpu_threads)
    gpt, c = tg.load_artifact(strangers.read_bytes(path, "artifact"), c, explicit, torch.device(c.device))
    found = Tokenizer(c)
    return Model(gpt, found, c), found
