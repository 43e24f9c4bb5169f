"""Proves on the script that ships that a score keeps the rules: it looks at scores alone, never at the code.

    python tools/prove.py logs/RUN
    python tools/prove.py submissions/record-1a2b3c4d --seed 42 --nproc 8 --data data/sp8192
    python tools/prove.py logs/RUN --short --out proof.json

The packed script evaluates the artifact in processes of its own, with the settings, the ranks and the compiler that the
run claims. It scores streams made for the purpose, and two streams that begin alike must have the same scores up to
where they part. docs/rules.md says what each rule means and what no such proof can see. Any script can be proven that
takes the variables MODE=eval, ARTIFACT_DIR, DATA_PATH and EVAL_SCORES and writes scores_<stage>.npy.

Exit code: 0 if no rule was seen broken, 1 if one was, 2 for a user's error.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
import caseops  # noqa: E402
import pack_code  # noqa: E402
import processes
import run_submission
import runs
import strangers
import submission
from runs import CAP_BYTES, ROOT, SEEDS, Parser, UserError, command_line, number_type, write_atomic
from streams import BOS, Maker, Stream, read_stream

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
OURS = ("run_id", "artifact_dir", "mode", "data_path", "tokenizer_path", "eval_scores")  # what a proof sets itself
ARTIFACT = "model.pgolf"
SUM_ERROR, NOISY_SUM_ERROR = 5e-5, 0.05  # of a sum of float32 probabilities; where scores are not the same bits
TWINS = 52  # documents that begin alike
# Places of a document, from and to, at which single tokens must not have more than their share.
DEPTHS = ((60, 1000), (1000, 1 << 30))
# Where scores are not the same bits: other kernels for other shapes, summed in bfloat16. Nats; estimated, not measured.
ROUNDING, MEAN_ROUNDING = 0.25, 0.01


@dataclass(frozen=True)
class Size:
    """How much a proof tries."""

    targets: int  # of a stream
    longest: int  # document, in targets
    pairs: int  # of streams, at least
    most_pairs: int  # and as many as this while there is time
    prefix: int  # tokens of the prefix that the whole vocabulary continues
    training: bool  # whether it also trains
    claim: bool  # whether it also repeats the run's own score
    hinted: tuple[float, ...] = (0.5, 2.0)  # nats of the tokens that hints name where the whole vocabulary is tried


FULL = Size(80_000, 20_000, 6, 18, 64, True, True, (0.5, 1.5, 4.0))
SHORT = Size(10_000, 3_000, 3, 3, 4, False, False)
PAIRS_SECONDS = 200  # of the ten minutes that a proof may take


@dataclass
class Verdict:
    """What was tried for a rule, and what was found."""

    rule: str
    holds: bool | None  # None: it could not be tried
    tried: str
    found: str = ""


@dataclass
class Evaluation:
    """What a script says of a stream."""

    scores: dict[str, np.ndarray]  # stage -> NLL of every target
    summary: dict[str, Any]
    seconds: float


class Refused(Exception):
    """The script ended with an error."""


# ---------------------------------------------------------------------------------------------------- what is proven


class Tokens:
    """The vocabulary as the tokenizer's own library describes it."""

    def __init__(self, path: Path):
        try:
            model = self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"--tokenizer {path}: is not a SentencePiece model") from None
        ids = range(model.vocab_size())
        self.silent = np.array([model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i) for i in ids])
        texts = ["x" if model.IsByte(i) else model.IdToPiece(i).replace("\u2581", " ") for i in ids]
        self.spaced = np.array([text.startswith(" ") for text in texts]) & ~self.silent
        self.widths = np.where(self.silent, 0, [len(text.encode()) for text in texts])
        self.ordinary = np.flatnonzero(~self.silent & ~np.array([model.IsByte(i) for i in ids]))

    def bytes_each(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of text of each token. A text does not begin with the space that its first piece has."""
        each = self.widths[tokens]
        each[1:] -= self.spaced[tokens[1:]] & self.silent[tokens[:-1]]
        return each

    def fitted(self, stream: Stream) -> Stream:
        """The stream, with counts that its tokens can have."""
        if stream.counts is None:
            return stream
        return Stream(stream.tokens, np.minimum(stream.counts, self.bytes_each(stream.tokens)))

    def bytes_of(self, stream: Stream) -> int:
        """Bytes of text of a stream's targets."""
        counts = self.fitted(stream).counts
        return int((self.bytes_each(stream.tokens) if counts is None else counts)[1:].sum(dtype=np.int64))

    def decoded_bytes(self, stream: Stream) -> int:
        """Bytes of the text that the stream decodes to, in its original letters where a sidecar goes with it."""
        total = 0
        for part in np.split(stream.tokens, stream.borders):
            text = self.model.decode([int(t) for t in part if t != BOS])
            total += len((caseops.decode(text) if stream.counts is not None else text).encode())
        return total


@dataclass
class Subject:
    """A script with its artifact and the settings that its run claims."""

    script: Path
    artifact: Path
    settings: dict[str, Any]  # a run's config.json
    summary: dict[str, Any]  # a run's summary.json, {} where there is none
    ranks: int
    tokenizer: Path
    tokens: Tokens
    work: Path  # for what an evaluation reads and writes
    exact: bool = True  # whether the same scores are the same bits
    remarks: list[str] = field(default_factory=list)
    count: int = 0  # of evaluations so far

    def environment(self, **more: Any) -> dict[str, str]:
        """The run's settings as variables; None leaves a variable out."""
        values = {name.upper(): value for name, value in self.settings.items() if name not in OURS}
        values |= more
        words = submission.as_environment(values)
        kept = {name: value for name, value in os.environ.items() if name not in {*values, *RANKS, "RUN_ID"}}
        return {**kept, **words, "TOKENIZER_PATH": str(self.tokenizer)}

    def run(self, **values: Any) -> None:
        """Runs the script in a process of its own. Errors: Refused with its last line."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        command = [sys.executable, *(launcher if self.ranks > 1 else []), str(self.script)]
        done = processes.run(command, env=self.environment(**values), errors="replace")
        self.check(done.returncode, done.stderr)

    def check(self, code: int, errors: str) -> None:
        """Errors: Refused for a script that ended with an error; 1 is also the exit code of an artifact too large."""
        if code not in (0, 1) or (code == 1 and "Traceback" in errors):
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            raise Refused((lines or errors.strip().splitlines() or [f"exit code {code}"])[-1])

    def evaluate(self, stream: Stream, scores: bool = True, **values: Any) -> Evaluation:
        """Scores a stream. The artifact's folder is the same each time, as is whatever a script leaves there."""
        self.count += 1
        folder = self.work / "run"
        if not folder.exists():
            folder.mkdir()
            shutil.copyfile(self.artifact, folder / ARTIFACT)
        for old in (*folder.glob("*scores_*.npy"), *folder.glob("*summary.json")):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=self.work, prefix="data") as data:
            self.tokens.fitted(stream).write(Path(data), self.tokenizer)
            begin = time.perf_counter()
            self.run(MODE="eval", ARTIFACT_DIR=folder, DATA_PATH=data, EVAL_SCORES=1 if scores else None, **values)
            seconds = time.perf_counter() - begin
        found = read_evaluation(folder.iterdir(), seconds)
        if found is None or (scores and not found.scores):
            raise Refused("it wrote no summary.json or no scores_<stage>.npy")
        return found

    def train(self, validation: Stream, training: list[Path], *modes: str, **values: Any) -> tuple[str, list]:
        """A short training with a validation stream (MODE=all), and more modes on its artifact.

        Returns the SHA-256 of the artifact, and the Evaluation of each mode that wrote scores.
        """
        with tempfile.TemporaryDirectory(dir=self.work, prefix="train") as name:
            data, folder = Path(name, "data"), Path(name, "run")
            found = []
            data.mkdir()
            self.tokens.fitted(validation).write(data, self.tokenizer)
            for path in training:
                (data / path.name).symlink_to(path.resolve())
            for mode in ("all", *modes):
                before = set(folder.glob("*")) if folder.exists() else set()
                self.run(MODE=mode, ARTIFACT_DIR=folder, DATA_PATH=data, EVAL_SCORES=1, **values)
                evaluation = read_evaluation(set(folder.glob("*")) - before)
                if evaluation and evaluation.scores:
                    found.append(evaluation)
            return hashlib.sha256(Path(folder, ARTIFACT).read_bytes()).hexdigest(), found


def read_evaluation(files: Iterable[Path], seconds: float = 0.0) -> Evaluation | None:
    """What these files of a run say, summary.json and scores_<stage>.npy; None without a summary."""
    files = sorted(files)
    scores = {path.stem.partition("scores_")[2]: read_scores(path) for path in files if path.match("*scores_*.npy")}
    summary = next((path for path in files if path.name.endswith("summary.json")), None)
    return None if summary is None else Evaluation(scores, read_said(summary, Refused), seconds)


def read_scores(path: Path) -> np.ndarray:
    """The scores [n] that a script wrote, which is a stranger. Errors: Refused."""
    try:
        content = io.BytesIO(strangers.read_bytes(path, "artifact"))
        shape, _, kind = SCORE_HEADERS[np.lib.format.read_magic(content)](content)
        if len(shape) == 1 and kind in (np.float32, np.float64):
            return np.frombuffer(content.read(shape[0] * kind.itemsize), kind, shape[0])
    except (KeyError, ValueError, UserError) as error:
        raise Refused(f"{path.name}: is not an array of scores ({error})") from None
    raise Refused(f"{path.name}: must hold one array of float32 or float64")


SCORE_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SAID = runs.SUMMARY | runs.SUMMARY_SCORES | dict(ranks=strangers.COUNT)


def read_said(path: Path, wrong: type[Exception] = UserError) -> dict[str, Any]:
    """What a summary.json says, in the fields that a proof looks at. Errors: `wrong` for another form."""
    problems: list[str] = []
    try:
        said = strangers.checked(strangers.read_object(path), SAID, path.name, problems)
    except UserError as error:
        raise wrong(str(error)) from None
    if problems:
        raise wrong(problems[0])
    return said


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a config.json, those that a proof computes with as numbers. Errors: UserError."""
    settings, problems = submission.read_settings(path), []
    strangers.checked(settings, dict.fromkeys(COUNTED, strangers.COUNT), str(path), problems)
    if problems:
        raise UserError(problems[0])
    return settings


COUNTED = (
    "phased_ttt_prefix_docs",
    "phased_ttt_prefix_tokens",
    "phased_ttt_num_phases",
    "global_ttt_chunk_tokens",
    "ttt_chunk_tokens",
    "hint_chunk_tokens",
    "hint_min_match",
)


def one_of(folder: Path, names: list[str]) -> Path | None:
    """The first of these files that the folder holds."""
    return next((folder / name for name in names if strangers.is_there(folder / name)), None)


def shipped_script(options, work: Path) -> Path:
    """The script to prove: --script, the folder's own, that of `make reproduce`, or this project's, packed."""
    folder = options.folder
    given = options.script or one_of(folder, ["train_gpt.py", "../train_gpt.py"]) or ROOT / "train_gpt.py"
    if not strangers.is_there(given):
        raise UserError(f"--script {given}: there is no such file")
    source = strangers.read_bytes(given, "script")
    if wrong := run_submission.compile_error(source):
        raise UserError(f"--script {given}: does not compile ({wrong})")
    (work / "train_gpt.py").write_bytes(pack_code.pack(source))
    return work / "train_gpt.py"


def claimed_ranks(summary: dict[str, Any]) -> int:
    """The number of ranks that a summary states, in its `ranks` or in its line of hardware."""
    words = str(summary.get("hardware", "")).split(", ")[-1].split()
    stated = summary.get("ranks") or (words[0] if len(words) == 2 and words[1].startswith("rank") else 1)
    ranks = strangers.whole_number(str(stated))
    return ranks if ranks and 1 <= ranks <= 1024 else 1


def read_subject(options, work: Path) -> Subject:
    """What the options name. Errors: UserError for a folder without an artifact, settings or a tokenizer."""
    folder, seed = options.folder, options.seed
    seeds = [seed] if seed is not None else list(SEEDS)
    named = {kind: [f"{stem}.{end}", *(f"{stem}_seed{s}.{end}" for s in seeds)] for kind, stem, end in FILES}
    artifact, config, summary = (one_of(folder, named[kind]) for kind in ("artifact", "config", "summary"))
    if artifact is None:
        raise UserError(
            f"{folder}: holds no {ARTIFACT} (`make reproduce ARGS=--with-artifacts` keeps one for each seed)"
        )
    settings = read_settings(config) if config else {}
    said = read_said(summary) if summary else {}
    if wrong := strangers.wrong_kind(artifact, artifact.parent):
        raise UserError(f"{artifact}: {wrong}")
    data = options.data or strangers.recorded_path(settings.get("data_path", ""), folder)
    tokenizer = options.tokenizer
    if not tokenizer and settings.get("tokenizer_path"):
        tokenizer = strangers.recorded_path(settings["tokenizer_path"], folder)
    tokenizer = tokenizer or data / "tokenizer.model"
    if not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer}: there is no such file; --data must name the run's data")
    options.data = data
    subject = Subject(
        script=shipped_script(options, work),
        artifact=artifact,
        settings=settings,
        summary=said,
        ranks=options.nproc or claimed_ranks(said),
        tokenizer=tokenizer,
        tokens=Tokens(tokenizer),
        work=work,
    )
    settle(subject, options)
    return subject


FILES = (("artifact", "model", "pgolf"), ("config", "config", "json"), ("summary", "summary", "json"))


def settle(subject: Subject, options) -> None:
    """What this machine does otherwise than the run, and settings whose steps a stream of this size never reaches."""
    import torch

    settings, size = subject.settings, options.size
    if settings.get("device") == "cuda" and not torch.cuda.is_available():
        automatic = ("compile", "triton_kernels", "ttt_cuda_graphs", "attention", "compute_dtype")
        settings.update({name: "auto" for name in automatic if name in settings}, device="cpu")
        subject.remarks.append("the run was on GPUs, the proof is on a CPU")
    if subject.ranks != claimed_ranks(subject.summary):
        subject.remarks.append(f"the run had {claimed_ranks(subject.summary)} ranks, the proof has {subject.ranks}")
    on_gpu = settings.get("device") == "cuda" or (not settings and torch.cuda.is_available())
    subject.exact = not on_gpu and str(settings.get("compile", "0")) != "1"
    modes = {
        "phased": {
            "phased_ttt_prefix_docs": size.targets // 40,
            "phased_ttt_prefix_tokens": size.targets // 2,
            "phased_ttt_num_phases": 4,
            "global_ttt_chunk_tokens": size.targets // 20,
        },
        "chunk": {"ttt_chunk_tokens": size.targets // 5},
    }
    for name, most in modes.get(str(settings.get("ttt_mode")), {}).items():
        phases = name == "phased_ttt_num_phases" and settings.get(name) == 0  # as many as the script thinks right
        if phases or (isinstance(settings.get(name), int) and settings[name] > most):
            subject.remarks.append(f"{name.upper()} is {most} in place of {settings[name]}, so that it takes effect")
            settings[name] = most
    if learns_between_chunks(settings):
        settings["hint_chunk_tokens"] = min(int(settings["hint_chunk_tokens"]), max(64, size.targets // 40))
        subject.remarks.append(
            f"HINT_CHUNK_TOKENS is {settings['hint_chunk_tokens']}, so that what is weighed by earlier scores learns; "
            "where documents begin alike it is so large that all of them have the same weights"
        )


def learns_between_chunks(settings: dict[str, Any]) -> bool:
    """Whether hints or a mixture are weighed by the scores of earlier chunks of HINT_CHUNK_TOKENS."""
    mixes = settings.get("ttt_plain_weight") and settings.get("ttt_mode") in ("phased", "chunk")
    return bool(settings.get("hint_enabled") or mixes)


# ---------------------------------------------------------------------------------------------------------- the rules


class Proof:
    """Tries the rules one after another, and shares what they evaluate."""

    def __init__(self, subject: Subject, maker: Maker, size: Size, log: Callable = print):
        self.subject, self.tokens = subject, subject.tokens
        self.maker, self.size = maker, size
        self.log = log
        documents = 120 * size.targets // FULL.targets
        settings = subject.settings
        counted = settings.get("ttt_mode") == "phased" and not settings.get("phased_ttt_prefix_tokens")
        self.lead_documents = 20 + counted * int(settings.get("phased_ttt_prefix_docs") or 0)
        self.stream = maker.base(size.targets, max(documents, self.lead_documents * 5 // 4), size.longest)
        if settings.get("hint_enabled"):
            self.stream = maker.echoes(self.stream)
        self.before: Evaluation | None = None
        self.counted: list[str] = []  # what is wrong with how evaluations count, and of which stream
        self.unequal: list[str] = []  # scores that differ where documents share a prefix
        self.prefix = np.zeros(0, np.int64)

    def base(self) -> Evaluation:
        """The scores of the stream that all others are compared with."""
        if self.before is None:
            self.before = self.evaluate(self.stream, "the first stream")
            self.maker.easy = self.easiest(next(iter(self.before.scores.values())))
            stages = ", ".join(self.before.scores)
            self.log(
                f"{len(self.stream) - 1} targets in {len(self.stream.borders)} documents of up to "
                f"{self.size.longest}; stages {stages}; {self.before.seconds:.1f} s an evaluation"
            )
        return self.before

    def easiest(self, scores: np.ndarray) -> np.ndarray:
        """The tokens of the first stream that were predicted best, without borders."""
        width, tokens = min(32, len(scores)), self.stream.tokens[1:]
        sums = np.convolve(np.where(tokens[: len(scores)] == BOS, np.inf, scores), np.ones(width), "valid")
        found = tokens[int(np.nan_to_num(sums, nan=np.inf).argmin()) :][:width]
        return found[found != BOS] if (found != BOS).any() else self.maker.easy

    def evaluate(self, stream: Stream, name: str, **values: Any) -> Evaluation:
        """Scores a stream, and notes what its counts and sums say wrong: a cheat may need a special stream."""
        found = self.subject.evaluate(stream, **values)
        self.counted += [f"{name}: {problem}" for problem in self.miscounted(stream, found)]
        return found

    def causality(self) -> Verdict:
        """Streams that agree up to a place: so do their scores."""
        before, changes = self.base(), self.maker.changes(self.stream)
        tried: list[str] = []
        begin = time.perf_counter()
        while len(tried) < self.size.pairs or (
            len(tried) < self.size.most_pairs and time.perf_counter() - begin < PAIRS_SECONDS
        ):
            name, other = next(changes)
            same = self.stream.agreement(other)
            after = self.evaluate(other, name)
            tried.append(f"{name} from target {same}")
            self.log(f"causality: {tried[-1]}")
            for stage, scores in before.scores.items():
                found = self.difference(scores[:same], after.scores.get(stage, scores[:0])[:same])
                if found:
                    return Verdict("causality", False, "; ".join(tried), f"{stage}: {found}, after {tried[-1]}")
        found = self.twins()
        tried.append(f"{TWINS} documents that begin alike")
        if found:
            return Verdict("causality", False, "; ".join(tried), found)
        agreed = "bit for bit" if self.subject.exact else f"to {ROUNDING} nats, {MEAN_ROUNDING} in the mean"
        return Verdict("causality", True, f"{'; '.join(tried)}: all scores before it agree {agreed}")

    def twins(self) -> str:
        """Documents of many lengths that begin alike, scored from one state: what differs in their beginnings."""
        if self.by_length:
            return ""
        prefix, rests = self.ending(24), [0, 0, 1, 1, 2, 3, 8, 16, 30, 60, 100, 300, self.size.longest // 4]
        lengths = self.maker.random.permutation(np.resize(rests, TWINS))
        ends = [np.concatenate([prefix, self.maker.noise(length).tokens]) for length in lengths.tolist()]
        for stream, begins, values in self.alike(ends, True, ends[-1]):
            found = self.evaluate(stream, "documents that begin alike", **values)
            for stage, scores in found.scores.items():
                problem = self.unlike(scores, begins, len(prefix) - 1)
                if problem:
                    return f"{stage}: {problem}"
        return ""

    def unlike(self, scores: np.ndarray, begins: np.ndarray, count: int) -> str:
        """How the first scores of documents that begin alike differ, in words; empty if they do not."""
        rows = scores[begins[:, None] + np.arange(count)].astype(np.float64)
        gaps = np.abs(rows - rows[0])
        if not count or (gaps <= (0 if self.subject.exact else ROUNDING)).all():
            return ""
        document, place = np.argwhere(gaps == gaps.max())[0]
        return (
            f"of {len(rows)} documents that begin alike, document {document} has a loss of {rows[document, place]:.6f} "
            f"at place {place}, and the first one {rows[0, place]:.6f}"
        )

    @property
    def by_length(self) -> bool:
        """Whether documents start from states that follow from their lengths."""
        settings = self.subject.settings
        return settings.get("ttt_mode") == "phased" and settings.get("ttt_order") == "length"

    def difference(self, first: np.ndarray, second: np.ndarray) -> str:
        """The first place where scores of equal targets differ, in words; empty if there is none."""
        if len(first) != len(second):
            return f"{len(second)} scores are there in place of {len(first)}"
        gap = np.abs(first.astype(np.float64) - second)
        if self.subject.exact:
            wrong = np.flatnonzero(first != second)
        else:
            wrong = np.flatnonzero(~(gap <= ROUNDING))
            if not len(wrong) and len(gap) and not gap.mean() <= MEAN_ROUNDING:
                wrong = np.array([int(gap.argmax())])
        if not len(wrong):
            return ""
        place, borders = int(wrong[0]), self.stream.borders
        document = int(np.searchsorted(borders, place, side="right")) - 1
        return (
            f"{len(wrong)} of {len(first)} scores differ, first that of target {place} (document {document}, place "
            f"{place - borders[document]}): {first[place]:.6f} became {second[place]:.6f}"
        )

    def once_each(self) -> Verdict:
        """In all evaluations: as many scores as targets, the bytes of the text, and a summary that is their sum."""
        before, count = self.base(), self.subject.count
        targets, expected = len(self.stream) - 1, self.tokens.bytes_of(self.stream)
        tried = f"{targets} targets, {expected} bytes by the tokenizer's pieces, sums of {len(before.scores)} stages"
        found = "; ".join(self.counted[:4])
        return Verdict("once each, bytes honest", not found, f"{tried}; the same of {count} evaluations", found)

    def miscounted(self, stream: Stream, evaluation: Evaluation) -> list[str]:
        """What is wrong with the numbers of targets, scores and bytes, and with the reported sums."""
        said, targets = evaluation.summary, len(stream) - 1
        expected = self.tokens.bytes_of(stream)
        wrong = [
            f"the summary's {name} is {said.get(name)}, not {value}"
            for name, value in (("val_tokens", targets), ("val_bytes", expected))
            if said.get(name) != value
        ]
        for stage, scores in evaluation.scores.items():
            if len(scores) != targets:
                wrong.append(f"{stage} has {len(scores)} scores")
            if not np.isfinite(scores).all():
                wrong.append(f"{stage} has scores that are not finite")
            if (scores < 0).any():
                wrong.append(f"{stage} has negative scores")
            bpb = scores.sum(dtype=np.float64) / math.log(2) / max(expected, 1)
            stated = said.get(f"val_bpb_{stage}")
            if stated is not None and not math.isclose(bpb, stated, rel_tol=1e-6):
                wrong.append(f"the summary's val_bpb_{stage} is {stated}, and its scores give {bpb}")
        last = [s for s in ("hint", "ttt", "quantized") if s in evaluation.scores][:1]
        if last and said.get("val_bpb") != said.get(f"val_bpb_{last[0]}"):
            wrong.append(f"the summary's val_bpb is {said.get('val_bpb')}, which is not that of {last[0]}")
        return wrong

    def memory(self) -> Verdict:
        """The first stream again, after all others, and without asking for scores."""
        before, count = self.base(), self.subject.count
        digest = hashlib.sha256((self.subject.work / "run" / ARTIFACT).read_bytes()).digest()
        again = self.evaluate(self.stream, "the first stream again", scores=False)
        names = [name for name, value in before.summary.items() if name.startswith("val_bpb") and value is not None]
        wrong = [
            f"{name} was {before.summary[name]} and is {again.summary.get(name)}"
            for name in names
            if not self.same_score(before.summary[name], again.summary.get(name))
        ]
        if digest != hashlib.sha256(self.subject.artifact.read_bytes()).digest():
            wrong.append("the evaluations changed the artifact")
        tried = f"the first stream again after {count} evaluations, without EVAL_SCORES: {', '.join(names)}"
        return Verdict("no memory", not wrong, tried, "; ".join(wrong))

    def same_score(self, first: float, second: Any) -> bool:
        """Whether two evaluations of one stream gave one score."""
        near = 1e-12 if self.subject.exact else MEAN_ROUNDING
        return isinstance(second, float) and math.isclose(first, second, rel_tol=near)

    # ------------------------------------------------------------------------------------------- normalization

    def normalization(self) -> Verdict:
        """Documents that share a prefix and end in each token: their probabilities sum to 1."""
        vocabulary = self.tokens.model.vocab_size()
        if self.by_length:
            return Verdict("normalization", None, "documents of TTT_ORDER=length do not start from one state")
        tried, wrong = [], []
        prefixes = [(self.ending(length), None) for length in sorted({4, self.size.prefix})]
        for prefix, likely in [*prefixes, *self.hinted_prefixes()]:
            sums = self.sums(prefix, np.arange(vocabulary), likely=likely)
            tried.append(f"{vocabulary} documents of {len(prefix)} tokens and one more: sums {shown(sums)}")
            wrong += [
                f"{stage}: {value:.6f} in place of 1 after {len(prefix)} tokens"
                for stage, value in sums.items()
                if abs(value - 1) > self.slack
            ]
        for shallow, deep in DEPTHS if not wrong else ():
            for late in (False, True):
                found = self.sure(shallow, deep, late)
                tried += found[:1]
                wrong += found[1:]
        wrong += self.unequal[:2]
        return Verdict("normalization", not wrong, "; ".join(tried), "; ".join(wrong))

    def sure(self, shallow: int, deep: int, late: bool) -> list[str]:
        """What was tried at a place between two of a document where the model is sure, and what is wrong there.

        The likeliest token leaves so little there that a token with more than its share shows, BOS above all, without
        the whole vocabulary. `late`: after the phases or the first chunk of test-time training, else before.
        """
        scores = list(self.base().scores.values())[-1]
        borders = self.stream.borders
        places = np.arange(len(scores))
        starts = borders[np.searchsorted(borders, places, side="right") - 1]
        able = (places - starts >= shallow) & (places - starts < deep) & (self.stream.tokens[1:] != BOS)
        if not able.any():
            return []
        place = int(np.where(able, scores, np.inf).argmin())
        prefix, surest = self.stream.tokens[starts[place] : place + 1], int(self.stream.tokens[place + 1])
        count = min(max(4, min(64, self.size.targets // len(prefix))), self.room(len(prefix), late))
        if count < 2:
            return []
        others = self.maker.random.permutation(np.setdiff1d(np.arange(self.tokens.model.vocab_size()), [BOS, surest]))
        last = np.array([BOS, surest, *others[: count - 2]])
        sums = self.sums(prefix, last, late, surest)
        when = "late" if late else "early"
        said = f"BOS, a token of {math.exp(-scores[place]):.3f} and {len(last) - 2} others after {len(prefix)} tokens"
        wrong = [f"{stage}: {value:.6f} for {said}" for stage, value in sums.items() if value > 1 + self.slack]
        return [f"{said}, {when}: {shown(sums)}, at most 1", *wrong]

    def room(self, length: int, late: bool) -> int:
        """How many documents of a length are scored with the same weights, in phased TTT before its first phase."""
        settings = self.subject.settings
        if settings.get("ttt_mode") != "phased" or late:
            return 1 << 30
        halvings = int(settings.get("phased_ttt_num_phases") or 1) - 1  # the first phase ends there, or later
        if settings.get("phased_ttt_prefix_tokens"):
            return (int(settings["phased_ttt_prefix_tokens"]) >> halvings) // (length + 1)
        return int(settings.get("phased_ttt_prefix_docs") or 1 << 30) >> halvings

    @property
    def slack(self) -> float:
        """How far from 1 a sum of probabilities may be."""
        return SUM_ERROR if self.subject.exact else NOISY_SUM_ERROR

    def ending(self, length: int) -> np.ndarray:
        """BOS and the last tokens of a text of many documents, of which the first were the end of a real one."""
        if len(self.prefix) < length:
            text = self.maker.text
            ends = text.borders[text.borders > 40]
            end = int(self.maker.random.choice(ends)) if len(ends) else len(text)
            real = text.tokens[:end]
            real = real[real != BOS][-self.size.longest :]
            self.prefix = np.resize(real[::-1], self.size.longest)[::-1]
        return np.concatenate(([BOS], self.prefix[len(self.prefix) - length :]))

    def hinted_prefixes(self) -> list[tuple[np.ndarray, int]]:
        """With hints, starts of documents, each with a next token that a hint moves much: of middling probabilities.

        Several, because a cheat may act on few hints, and a model may learn to trust none of one kind.
        """
        settings, borders = self.subject.settings, self.stream.borders
        if not settings.get("hint_enabled"):
            return []
        least, places = int(settings["hint_min_match"]), np.arange(len(self.stream) - 1)
        depths = places - borders[np.searchsorted(borders, places, side="right") - 1]
        able = (depths >= least) & (depths < least + 16) & (self.stream.tokens[1:] != BOS)
        scores = next(scores for stage, scores in reversed(self.base().scores.items()) if stage != "hint")
        found = {int(np.where(able, np.abs(scores - nats), np.inf).argmin()) for nats in self.size.hinted}
        return [(self.stream.tokens[p - depths[p] : p + 1], int(self.stream.tokens[p + 1])) for p in sorted(found)]

    def sums(
        self, prefix: np.ndarray, last: np.ndarray, late: bool = True, likely: int | None = None
    ) -> dict[str, float]:
        """Each stage's sum of the probabilities of these tokens after a prefix, every one in a document of its own.

        likely: the token that hints name there, by default the last one.
        """
        ends = [prefix if token == BOS else np.append(prefix, token) for token in last]
        totals: dict[str, float] = {}
        copy = ends[-1] if likely is None else np.append(prefix, likely)
        for stream, begins, values in self.alike(ends, late, copy):
            found = self.evaluate(stream, "documents that share a prefix", **values)
            for stage, scores in found.scores.items():
                p = np.exp(-scores[begins + len(prefix) - 1].astype(np.float64))
                totals[stage] = totals.get(stage, 0.0) + float(p.sum())
                problem = self.unlike(scores, begins, len(prefix) - 1)
                self.unequal += [f"{stage}: {problem}"] if problem else []
        return totals

    def alike(
        self, documents: list[np.ndarray], late: bool, copy: np.ndarray
    ) -> Iterator[tuple[Stream, np.ndarray, dict[str, Any]]]:
        """Streams of these documents: (stream, where each begins, settings to score it with).

        All of them are scored with the same weights: in the last phase or a late chunk of their stream if `late`, else
        in the first. Hints, if there are some, know the document `copy` then.
        """
        settings, lead = self.subject.settings, self.maker.of(np.zeros(0, np.int64))
        room = 1 << 60
        if settings.get("ttt_mode") == "chunk":
            chunk = int(settings["ttt_chunk_tokens"])
            lead = self.stream[:chunk] if late and chunk < self.size.targets else lead
            # A window that would reach over the chunk's end begins earlier, and its targets see more.
            stride = int(settings.get("eval_stride") or settings.get("eval_seq_len") or settings["train_seq_len"])
            room = max(chunk - stride, chunk // 2)
        elif settings.get("ttt_mode") == "phased" and late:
            lead = self.maker.documents(self.maker.lengths(self.size.targets // 2, self.lead_documents, 500))
        values: dict[str, Any] = {}
        if learns_between_chunks(settings):
            lead, chunk = self.hinted_lead(lead, documents, late, copy)
            room, values = min(room, chunk), dict(HINT_CHUNK_TOKENS=chunk)
        while documents:
            count = max(1, int(np.searchsorted(np.cumsum([len(d) for d in documents]), room, side="right")))
            part, documents = documents[:count], documents[count:]
            begins = len(lead) + np.cumsum([0, *map(len, part)])[:-1]
            yield lead + self.maker.of(np.concatenate([*part, [BOS]])), begins, values

    def hinted_lead(
        self, lead: Stream, documents: list[np.ndarray], late: bool, copy: np.ndarray
    ) -> tuple[Stream, int]:
        """What stands before documents that begin alike, and a HINT_CHUNK_TOKENS by which they share a chunk.

        If `late`, two chunks stand before them. Both hold copies of the document `copy`, so that the weights have
        learned what such a hint is worth, and its hint is known.
        """
        settings = self.subject.settings
        whole, longest = sum(map(len, documents)), max(map(len, documents))
        if settings.get("ttt_mode") == "chunk":
            chunk = int(settings["ttt_chunk_tokens"])
            lead = lead[: chunk // 2]
        else:
            chunk = max(min(whole, self.size.targets), longest + 1, len(lead) + 4 * len(copy))
        if not late:
            return lead[:0], chunk
        copies = np.resize(copy, 2 * chunk - len(lead))
        return self.maker.of(np.concatenate([lead.tokens, copies])), chunk

    # ---------------------------------------------------------------------------------- the run behind the scores

    def training(self, data: Path) -> Verdict:
        """Trainings with different validation text give the same artifact."""
        shards = sorted(data.glob("fineweb_train_*.bin"))
        if not shards:
            return Verdict("blind training", None, f"{data} holds no training shards")
        settings = self.subject.settings
        batch, length = (int(settings.get(name) or 1024) for name in ("train_batch_tokens", "train_seq_len"))
        values: dict[str, Any] = dict(ITERATIONS=6, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, VAL_LOSS_EVERY=2)
        if settings.get("device") != "cuda" and batch > 16384:
            values |= dict(TRAIN_BATCH_TOKENS=length * self.subject.ranks, MICRO_BATCH_TOKENS=length)
        lengths, one = [900, 40, 1500, 560], np.full(3000, self.maker.ordinary[-1])
        texts = {
            "real text": self.maker.documents(lengths),
            "noise": self.maker.document(1) + self.maker.noise(5000),
            "one token over and over": self.maker.document(1) + self.maker.of(one),
        }
        found, wrong = {}, []
        modes = ("eval",)
        for name, text in texts.items():
            found[name], scored = self.subject.train(text, shards[:1], *modes, **values)
            wrong += self.other_in_eval(*scored) if len(scored) == 2 else []
            if len(set(found.values())) > 1:
                wrong.append("the artifacts differ")
            if wrong:
                break
            modes = ()
            values["TTT_MODE"] = "none"  # nothing new
        tried = (
            f"6 steps, quantized and packed, with {', '.join(found)} as validation; scored in MODE=all and MODE=eval"
        )
        return Verdict("blind training", not wrong, tried, "; ".join(wrong[:4]))

    def other_in_eval(self, trained: Evaluation, alone: Evaluation) -> list[str]:
        """What a run that trains scores otherwise than MODE=eval does from the same artifact."""
        wrong = []
        for stage in sorted(set(trained.scores) & set(alone.scores)):
            found = self.difference(trained.scores[stage], alone.scores[stage])
            if found:
                wrong.append(f"{stage} in MODE=all and in MODE=eval: {found.split(',')[0]}")
        if not self.same_score(trained.summary.get("val_bpb", math.nan), alone.summary.get("val_bpb")):
            wrong.append(
                f"val_bpb is {trained.summary.get('val_bpb')} in MODE=all, {alone.summary.get('val_bpb')} in MODE=eval"
            )
        return wrong

    def claim(self) -> Verdict:
        """The run's own validation set gives the run's own score, and its bytes are those of its text."""
        said, stream = self.subject.summary, self.maker.text
        if said.get("val_tokens") != len(stream) - 1:
            return Verdict("the claimed score", None, "the run's whole validation set is not here, or too long")
        bytes_here, decoded = self.tokens.bytes_of(stream), self.tokens.decoded_bytes(stream)
        wrong = []
        if said.get("val_bytes") != bytes_here:
            wrong.append(f"the run counted {said.get('val_bytes')} bytes, and its text has {bytes_here}")
        if bytes_here != decoded:
            wrong.append(f"the pieces have {bytes_here} bytes, and the decoded text has {decoded}")
        if stream.counts is not None and (stream.counts > self.tokens.widths[stream.tokens]).any():
            place = int((stream.counts > self.tokens.widths[stream.tokens]).argmax())
            wrong.append(f"the sidecar counts {stream.counts[place]} bytes for token {place}, more than its piece has")
        again = self.evaluate(stream, "the run's validation set", scores=False)
        if not self.same_score(said.get("val_bpb", math.nan), again.summary.get("val_bpb")):
            wrong.append(f"the run says {said.get('val_bpb')}, and its artifact gives {again.summary.get('val_bpb')}")
        tried = f"{len(stream) - 1} targets and {decoded} decoded bytes of the run's validation set, scored again"
        return Verdict("the claimed score", not wrong, tried, "; ".join(wrong))

    def bytes_in_all(self) -> Verdict:
        """Script and artifact are within the challenge's limit."""
        code, model = (path.stat().st_size for path in (self.subject.script, self.subject.artifact))
        tried = f"code {code} + model {model} = {code + model} bytes of {CAP_BYTES}"
        return Verdict("size", code + model <= CAP_BYTES, tried)


def shown(sums: dict[str, float]) -> str:
    """Sums of stages in words."""
    return ", ".join(f"{stage} {value:.6f}" for stage, value in sums.items())


# ------------------------------------------------------------------------------------------------------- command line


def prove(proof: Proof, data: Path) -> Iterator[Verdict]:
    """Every rule's verdict. A script that ends with an error breaks the rule that it was tried for."""
    yield proof.bytes_in_all()
    rules: dict[str, Callable[[], Verdict]] = {
        "causality": proof.causality,
        "normalization": proof.normalization,
    }
    if proof.size.claim:
        rules["the claimed score"] = proof.claim
    if proof.size.training:
        rules["blind training"] = lambda: proof.training(data)
    rules["no memory"] = proof.memory
    rules["once each, bytes honest"] = proof.once_each
    for name, rule in rules.items():
        try:
            yield rule()
        except Refused as error:
            yield Verdict(name, False, "the script was run", f"it ended: {error}")


def report(subject: Subject, verdicts: list[Verdict], form: str, seconds: float) -> dict[str, Any]:
    """The result as JSON."""
    return dict(
        form=form,
        script_sha256=hashlib.sha256(subject.script.read_bytes()).hexdigest(),
        artifact_sha256=hashlib.sha256(subject.artifact.read_bytes()).hexdigest(),
        ranks=subject.ranks,
        compile=str(subject.settings.get("compile", "")),
        exact=subject.exact,
        evaluations=subject.count,
        seconds=round(seconds, 1),
        remarks=subject.remarks,
        rules=[dataclasses.asdict(v) for v in verdicts],
    )


def parse(arguments: list[str]):
    """The command line. Errors: UserError."""
    parser = Parser(prog="prove.py", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a run, or a submission with its artifacts")
    add("--short", action="store_true", help="a form of about a minute: small streams, fewer pairs, no training")
    add("--script", type=Path, metavar="FILE", help="script to prove (default: the folder's, or this project's)")
    add("--data", type=Path, metavar="DIR", help="shards to take text from (default: the run's DATA_PATH)")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: the run's)")
    add("--seed", type=number_type(int, 0), metavar="N", help="which seed of a submission (default: 42, 0 or 314)")
    add("--nproc", type=number_type(int, 1), metavar="N", help="number of ranks (default: as the run claims)")
    add("--targets", type=number_type(int, 2000, 10_000_000), metavar="N", help="targets of a stream")
    add("--draw", type=number_type(int, 0), default=1, metavar="N", help="seed of the streams (default: 1)")
    add("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: is not a folder")
    options.size = SHORT if options.short else FULL
    if options.targets:
        longest = min(options.size.longest, options.targets // 3)
        options.size = dataclasses.replace(options.size, targets=options.targets, longest=longest)
    return options


def main(arguments: list[str]) -> int:
    """Proves what the arguments name. Returns the exit code."""
    options, begin = parse(arguments), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="proof") as name:
        subject = read_subject(options, Path(name))
        tokens, verdicts = subject.tokens, []
        maker = Maker(read_stream(options.data), tokens.widths, tokens.ordinary, options.draw)
        for remark in subject.remarks:
            print(f"remark: {strangers.visible(remark)}")
        proof = Proof(subject, maker, options.size, lambda text: print(text, flush=True))
        for verdict in prove(proof, options.data):
            verdicts.append(verdict)
            words = strangers.visible(verdict.found or verdict.tried, 10_000)
            print(f"{SIGNS[verdict.holds]}  {verdict.rule}: {words}", flush=True)
        result = report(subject, verdicts, "short" if options.short else "full", time.perf_counter() - begin)
    if options.out:
        write_atomic(options.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    broken = [v.rule for v in verdicts if v.holds is False]
    work = f"{len(verdicts)} rules, {subject.count} evaluations, {result['seconds']} s"
    print(f"{work}; broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


SIGNS = {True: "holds", False: "BROKEN", None: "not tried"}

if __name__ == "__main__":
    sys.exit(command_line(main))
