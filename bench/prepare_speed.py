"""Speed and memory of data/prepare.py: MB/s of text per core against plain SentencePiece, with one and two workers.

    python bench/prepare_speed.py [--megabytes 96] [--large 1024] [--line 100] [--repeats 3]

The text is the built-in corpus, repeated. In each repetition one word in 50 has its letters shuffled, so that new words
keep coming as in web text. It is read from a .jsonl.zst file, and the tokenizer is trained on it. Plain SentencePiece
is one call of `encode` for all texts, which are in memory. data/prepare.py runs both passes: reading twice, hashing,
tokenizing, verifying, writing.

Two rates are given: by processor time of all processes together (MB/s for a core), and by the clock (MB/s). For
prepare.py, the time of a run with a quarter of the text is subtracted, so that the one or two seconds of starting
processes do not count. Runs take turns; figures are medians.

Peak memory is the largest sum of the resident memory of a command's processes, sampled every 20 ms. It includes
training the tokenizer and the reference compressors. It is measured for the text above, for --large MB, and for lines
of --line MB each.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tools")]
import caseops  # noqa: E402
import corpus  # noqa: E402
import prepare  # noqa: E402
import processes  # noqa: E402

SHUFFLED = 50  # one word in so many is shuffled
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
LINES = {"words": "The quick brown fox (12) jumps. ", "one letter": "x", "emoji": "\U0001fae0", "NUL": "\0"}


@functools.cache
def originals(packages: tuple[str, ...]) -> list[str]:
    """Texts of the documentation in these packages."""
    return [document.text for document in corpus.gather(packages).documents]


def documents(packages: list[str], size: int) -> Iterator[str]:
    """Texts of at least `size` bytes in total."""
    for copy in itertools.count():
        generator = random.Random(copy)
        for text in originals(tuple(packages)):
            if size <= 0:
                return
            if copy:
                words = text.split(" ")
                for at in generator.sample(range(len(words)), len(words) // SHUFFLED):
                    words[at] = "".join(generator.sample(words[at], len(words[at])))
                text = " ".join(words)
            size -= len(text.encode())
            yield text


def write_texts(path: Path, texts: Iterator[str]) -> int:
    """Writes a .jsonl.zst file. Returns the bytes of the texts."""
    size = 0
    with open(path, "wb") as file, zstandard.ZstdCompressor(1).stream_writer(file) as packed:
        for text in texts:
            packed.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            size += len(text.encode())
    return size


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Processor seconds, including finished child processes, and seconds by the clock."""

    def processor() -> float:
        return sum(item.ru_utime + item.ru_stime for item in map(resource.getrusage, WHO))

    before = processor(), time.perf_counter()
    function()
    return processor() - before[0], time.perf_counter() - before[1]


def both_passes(path: Path, model: Path, folder: Path, workers: int, with_caseops: bool) -> None:
    """Runs what prepare.py does with a given tokenizer, without the reference compressors."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        options = prepare.Options((str(path),), Path(out), tokenizer=model, workers=workers, caseops=with_caseops)
        sources = prepare.Sources(options)
        found, _ = prepare.survey(sources, options)
        loaded = prepare.Model(str(model), "", with_caseops)
        prepare.load_codec.cache_clear()  # Each run must start without cached words.
        output = prepare.Shards(Path(out), options.shard_tokens, with_caseops)
        prepare.write_shards(sources, found, loaded, output, options, lambda count: None)
        output.close()


class Speed:
    """One mode's runs: plain SentencePiece, and prepare.py with one and two workers, in turns."""

    def __init__(self, files: list[tuple[Path, int]], folder: Path, vocab_size: int, with_caseops: bool):
        self.files, self.folder = files, folder
        self.with_caseops = with_caseops
        self.model = folder / f"{with_caseops}.model"
        texts = list(itertools.islice(prepare.Sources(self.options()), 4000))
        self.model.write_bytes(prepare.train_tokenizer(texts, vocab_size, with_caseops)[0])
        self.runs: dict[str, list[tuple[float, float]]] = {}

    def options(self) -> prepare.Options:
        return prepare.Options((str(self.files[-1][0]),), self.folder)

    def plain(self) -> tuple[float, float]:
        """MB/s for a core and by the clock, for the larger file's text. CaseOps is applied beforehand."""
        texts = list(prepare.Sources(self.options()))
        texts = [caseops.encode(text) for text in texts] if self.with_caseops else texts
        processor = prepare.Codec(self.model.read_bytes()).processor
        core, clock = timed(lambda: processor.encode(texts, num_threads=1))
        megabytes = self.files[-1][1] / 1e6
        return megabytes / core, megabytes / clock

    def engine(self, workers: int) -> tuple[float, float]:
        """MB/s for a core and by the clock."""
        (_, small), (_, large) = self.files
        less, more = (
            timed(functools.partial(both_passes, path, self.model, self.folder, workers, self.with_caseops))
            for path, _ in self.files
        )
        core, clock = ((large - small) / 1e6 / (b - a) for a, b in zip(less, more, strict=True))
        return core, clock

    def measure(self) -> None:
        """Measures each once."""
        for name, run in (
            ("SentencePiece", self.plain),
            ("1 worker", lambda: self.engine(1)),
            ("2 workers", lambda: self.engine(2)),
        ):
            self.runs.setdefault(name, []).append(run())

    def lines(self) -> Iterator[str]:
        """The lines of the table."""
        medians = {
            name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in self.runs.items()
        }
        for name, (core, clock) in medians.items():
            ratio = core / medians["SentencePiece"][0]
            yield (
                f"{'--caseops' if self.with_caseops else 'plain':9s}  {name:13s}  {core:6.2f} MB/s for a core  "
                f"{clock:6.2f} MB/s  {ratio:5.2f} times SentencePiece for a core"
            )


def tree_memory(root: int) -> int:
    """Bytes of resident memory of a process and all its descendants."""
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # The process has ended.
            continue
        parents[int(folder.name)], sizes[int(folder.name)] = int(fields[1]), int(fields[21])
    total, level = 0, {root}
    while level:
        total += sum(sizes.get(number, 0) for number in level)
        level = {number for number, parent in parents.items() if parent in level}
    return total * resource.getpagesize()


def peak_memory(path: Path, folder: Path, workers: int, *more: str) -> tuple[int, str]:
    """Peak memory of the command's processes together, in bytes, and its output."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        process = processes.start(
            [
                sys.executable,
                str(ROOT / "data" / "prepare.py"),
                str(path),
                "--out",
                out,
                "--workers",
                str(workers),
                "--quiet",
                *more,
            ],
            supervised=False,  # a supervisor's memory would count
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.02)
        printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(printed)
    return peak, printed


def memory_lines(options: argparse.Namespace, file: tuple[Path, int], folder: Path) -> Iterator[str]:
    """The lines of peak memory."""
    vocabulary = ("--vocab-size", str(options.vocab_size))
    for workers in (1, 2):
        peak, _ = peak_memory(file[0], folder, workers, *vocabulary)
        yield f"peak memory  {file[1] / 1e6:7.1f} MB of text, workers: {workers}  {peak / 2**20:5.0f} MiB"
    path = folder / "large.jsonl.zst"
    if options.large:
        size = write_texts(path, documents(options.packages, int(options.large * 1e6)))
        start = time.perf_counter()
        peak, _ = peak_memory(path, folder, 2, *vocabulary)
        yield (
            f"peak memory  {size / 1e6:7.1f} MB of text, workers: 2  {peak / 2**20:5.0f} MiB  "
            f"({time.perf_counter() - start:.0f} s in all)"
        )
    for name, unit in LINES.items() if options.line else ():
        count = int(options.line * 1e6) // len(json.dumps(unit, ensure_ascii=False).strip('"').encode())
        write_texts(path, itertools.chain((unit * count, unit * (count + 1)), documents(options.packages, 10**6)))
        peak, printed = peak_memory(path, folder, 2, "--vocab-size", "512")
        dropped = "dropped" if "dropped" in printed else "none dropped"
        yield (
            f"peak memory  two lines of {options.line:g} MB, {name}, workers: 2  {peak / 2**20:5.0f} MiB  ({dropped})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=96)
    parser.add_argument("--large", type=float, default=1024, help="MB of text for peak memory; 0: skip")
    parser.add_argument("--line", type=float, default=100, help="MB of a line for peak memory; 0: skip")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--packages", nargs="+", choices=corpus.PACKAGES, default=list(corpus.PACKAGES))
    options = parser.parse_args()
    print(
        f"{options.megabytes:g} MB, {options.vocab_size} pieces, median of {options.repeats}; {machine()}", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder, files = Path(name), []
        for part in (0.25, 1):
            path = folder / f"{part}.jsonl.zst"
            files.append((path, write_texts(path, documents(options.packages, int(options.megabytes * part * 1e6)))))
        speeds = [Speed(files, folder, options.vocab_size, with_caseops) for with_caseops in (False, True)]
        for _ in range(options.repeats):
            for speed in speeds:
                speed.measure()
        for line in itertools.chain(*(speed.lines() for speed in speeds), memory_lines(options, files[-1], folder)):
            print(line, flush=True)


def machine() -> str:
    """The processor and versions."""
    import train_gpt

    chip = f"{train_gpt.available_cores()} cores of {train_gpt.cpu_info('model name')}"
    versions = prepare.package_versions(["python", "sentencepiece", "numpy"])
    return "; ".join([chip, *(f"{name} {version}" for name, version in versions.items())])


if __name__ == "__main__":
    main()
