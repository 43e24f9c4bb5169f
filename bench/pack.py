"""Size and speed of entropy coders for the integers of quantized banks: every coder on the same integers, in one run.

    python bench/pack.py --artifact runs/demo/model.pgolf
    python bench/pack.py [--layers 4] [--width 256] [--vocabulary 4096]

Without an artifact the integers are synthetic: normal deviates with a scale for each row and column, and a noisy
low-rank embedding with some similar rows. A trained model's integers differ, so call such figures synthetic.

The reference is the arrangement of the challenge's peers. It puts all matrices of a role together, sorts rows of the
embedding, q and Wup into a chain of nearest neighbours in L1, transposes, and runs `lrzip -z -L 9`. Brotli compresses
the permutations. It needs the `lrzip` binary. `nncodec` (ISO/IEC 15938-17) is measured if it can be imported.

Each coder runs in a process of its own. Its peak memory counts that process, with inherited memory, and its children.
Every coder must restore the integers.

With --ideal, lengths that no coder of ours can beat, or that cost too much, follow for each bank:

- own: -log2 of the probabilities that `pergroup` gives, so what its range coder and headers waste is the difference.
- oracle: the entropy by quantizer and by each integer's scale, in eighths of an octave. The scales of rows and columns
  and the tables cost nothing here.
- mixer: a mixture of adaptive models in the same order, weighted by how well they predicted: own contexts; finer scales
  from what the row and its predecessor have shown; magnitudes of neighbours; the sign of the integer before. The scale
  classes cost what they cost `pergroup`.

Oracle and mixer take the integers as they reach the contexts: of an embedding, the errors of its prediction.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

Banks = dict[str, np.ndarray]  # name -> int8 or int16 [matrices, rows, columns]
Forms = dict[str, t.IntegerBank]
Coder = tuple[Callable[[Banks], tuple[Any, int]], Callable[[Any, Banks], Banks]]  # pack -> (what, bytes), unpack
BANKS = ("embedding", "head", "qo_bank", "kv_bank", "up_bank", "down_bank")
SORTED = ("embedding", "head", "q", "up_bank")


def artifact_banks(path: Path) -> tuple[Banks, Forms]:
    """The codes of an artifact's large tensors, and what their coder knows of them."""
    stored = t.unpack(path.read_bytes())[1]
    banks, forms = {}, {}
    for name in BANKS:
        if name in stored and (q := stored[name]).scales is not None:
            banks[name] = k = t.as_batch(q.codes).numpy()
            exponents = q.extras["columns"].numpy() if "columns" in q.extras else None
            forms[name] = t.IntegerBank(k.shape, q.states, k.dtype.type, q.scales.numpy(), exponents)
    return banks, forms


def synthetic_banks(layers: int, width: int, vocabulary: int) -> Banks:
    """Integers in a model's shapes, distributed roughly like GPTQ's at 6 bits (8 bits for the embedding)."""
    rng = np.random.default_rng(0)

    def draw(count: int, rows: int, columns: int) -> np.ndarray:
        scale = 2.6 * np.exp2(rng.normal(0, 0.3, (count, 1, columns)) + rng.normal(0, 0.02, (count, rows, 1)))
        return np.rint(rng.standard_normal((count, rows, columns)) * scale).clip(-31, 31).astype(np.int8)

    rank = width // 16
    rows = rng.standard_normal((vocabulary, rank)) @ rng.standard_normal((rank, width)) * (5 / math.sqrt(rank))
    rows += rng.standard_normal((vocabulary, width)) * 7
    like = rng.random(vocabulary) < 0.1
    rows[like] = rows[0] + rng.standard_normal((like.sum(), width))
    return {
        "embedding": np.rint(rows).clip(-127, 127).astype(np.int8)[None],
        "qo_bank": draw(2 * layers, width, width),
        "kv_bank": draw(2 * layers, width // 2, width),
        "up_bank": draw(layers, 4 * width, width),
        "down_bank": draw(layers, width, 4 * width),
    }


def split_roles(banks: Banks) -> Banks:
    """The banks with q, out, k and v separated."""
    roles = {}
    for name, k in banks.items():
        if name in ("qo_bank", "kv_bank"):
            roles[name[0]], roles[name[1]] = np.split(k, 2)
        else:
            roles[name] = k
    return roles


def join_roles(roles: Banks, like: Banks) -> Banks:
    """The inverse of `split_roles`."""
    return {
        name: np.concatenate([roles[name[0]], roles[name[1]]]) if name in ("qo_bank", "kv_bank") else roles[name]
        for name in like
    }


def plain_bytes(banks: Banks) -> bytes:
    return b"".join(k.tobytes() for k in banks.values())


def from_plain(raw: bytes, like: Banks) -> Banks:
    """Arrays with the shapes of `like`, from their concatenated bytes."""
    cuts = np.cumsum([k.nbytes for k in like.values()])
    parts = [raw[stop - k.nbytes : stop] for k, stop in zip(like.values(), cuts, strict=True)]
    return {n: np.frombuffer(x, k.dtype).reshape(k.shape) for (n, k), x in zip(like.items(), parts, strict=True)}


def byte_coder(codec: str) -> Coder:
    """A general compressor on the concatenated bytes of all banks."""

    def pack(banks: Banks) -> tuple[bytes, int]:
        packed = t.compress(codec, plain_bytes(banks))
        return packed, len(packed)

    def unpack(packed: bytes, like: Banks) -> Banks:
        return from_plain(t.decompress(codec, packed, sum(k.nbytes for k in like.values())), like)

    return pack, unpack


def pergroup_coder(forms: Forms) -> Coder:
    """COMPRESSOR=pergroup, as an artifact has it."""

    def pack(banks: Banks) -> tuple[list[bytes], int]:
        packed = [t.compress("pergroup", k.tobytes(), forms[name]) for name, k in banks.items()]
        return packed, sum(map(len, packed))

    def unpack(packed: list[bytes], like: Banks) -> Banks:
        back = {}
        for data, (name, k) in zip(packed, like.items(), strict=True):
            back[name] = np.frombuffer(t.decompress("pergroup", data, k.nbytes, forms[name]), k.dtype).reshape(k.shape)
        return back

    return pack, unpack


class IdealCoder(t.RangeCoder):
    """Adds up -log2 of the probabilities of what it is given, and keeps the integers that reach the contexts."""

    def __init__(self, data: bytes | None = None):
        super().__init__(data)
        self.categorical = lambda frequencies, perfect: -np.log2((frequencies + 1) / t.PRECISION)
        self.encoder, self.bits = self, 0.0
        self.symbol_bits = 0.0
        self.passes: list[list[tuple[np.ndarray, np.ndarray, int]]] = []  # of columns: integers, classes, contexts

    def code(self, symbols, count, table):
        self.bits += float(table[symbols].sum())
        return symbols

    def get_compressed(self) -> np.ndarray:
        return np.zeros(round(self.bits / 32), np.uint32)


def ideal_coder(codes: np.ndarray, form: t.IntegerBank) -> IdealCoder:
    """The coder after the shorter of a bank's forms."""
    runs: list[IdealCoder] = []
    code_column = t.code_column
    code_scales = t.code_scales

    def make() -> IdealCoder:
        runs.append(IdealCoder())
        return runs[-1]

    def scales(coder, *arguments):
        coder.passes.append([])
        return code_scales(coder, *arguments)

    def column(coder, model, integers, classes, contexts):
        before = coder.bits
        values = code_column(coder, model, integers, classes, contexts)
        coder.symbol_bits += coder.bits - before
        coder.passes[-1].append((integers, classes, contexts - classes * (len(model.counts) // t.CLASSES)))
        return values

    with mock.patch.multiple(t, RangeCoder=make, code_column=column, code_scales=scales):
        t.encode_integers(codes, form.trellis, form.hints)
    return min(runs, key=lambda run: run.bits)


def pass_arrays(columns: list) -> list[np.ndarray]:
    """(integers, classes, quantizers), each [c, n], of a pass."""
    return [np.stack([column[n] for column in columns]).astype(np.int64) for n in range(3)]


def oracle_bits(coder: IdealCoder) -> float:
    """The entropy by quantizer and eighth of an octave of the scales of row and column, of each pass and matrix."""
    groups, integers = [], []
    for columns in coder.passes:
        k, classes, quantizers = pass_arrays(columns)
        square = (k**2 + 1 / 12) / 4.0 ** (classes / t.CLASSES_PER_OCTAVE)  # the classes keep matrices apart
        logs = classes / t.CLASSES_PER_OCTAVE + 0.5 * np.log2(square.mean(0))
        groups.append(2 * np.rint(8 * logs).astype(np.int64) + quantizers)
        integers.append(k)
    group, k = (np.concatenate([x.ravel() for x in parts]) for parts in (groups, integers))
    group -= group.min()
    width = int(k.max() - k.min()) + 1
    pairs = np.unique(group * width + k - k.min(), return_counts=True)
    totals = np.bincount(group)
    return float(-(pairs[1] * np.log2(pairs[1] / totals[pairs[0] // width])).sum())


class Adaptive:
    """Adaptive counts of symbols in contexts, from the coder's own prior for a scale class."""

    def __init__(self, prior: np.ndarray, copies: int):
        self.counts = (prior / t.INCREMENT + 1e-5).repeat(copies, axis=0)

    def learn(self, contexts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The probabilities of symbols [n] in contexts [n], which are counted afterwards."""
        probability = self.counts[contexts, symbols] / self.counts[contexts].sum(1)
        np.add.at(self.counts, (contexts, symbols), 1)
        return probability


def mixer_bits(coder: IdealCoder) -> float:
    """The integers' bits under a mixture of adaptive models (see this file's head)."""
    everything = np.concatenate([column[0] for columns in coder.passes for column in columns])
    low, high = int(everything.min()), max(int(everything.max()), int(everything.min()) + 1)
    prior = t.prior_counts(low, high, np.zeros(t.CLASSES, np.int64))
    copies = (2, 2, 12, 12, 12, 6)
    models = [Adaptive(prior, n) for n in copies]
    posterior = np.ones(len(models))
    bits = 0.0
    for columns in coder.passes:
        level = before = previous = np.ones(columns[0][0].size)
        for k, classes, quantizers in columns:
            classes, quantizers = (np.asarray(x, dtype=np.int64) for x in (classes, quantizers))
            size = abs(k) / 2.0 ** (classes / t.CLASSES_PER_OCTAVE - 3) + 0.05
            above = np.concatenate(([0.8], size[:-1]))  # the row before, in the same column
            row_level = np.rint(t.CLASSES_PER_OCTAVE * np.log2(level)).astype(np.int64)
            cells = (
                0,
                0,
                np.digitize(level, (0.7, 0.85, 1.0, 1.15, 1.3)),
                np.digitize(above, (0.2, 0.5, 0.8, 1.2, 1.8)),
                np.digitize(before, (0.2, 0.5, 0.8, 1.2, 1.8)),
                np.sign(previous).astype(np.int64) + 1,
            )
            found = []
            for n, (model, cell) in enumerate(zip(models, cells, strict=True)):
                shown = (classes + row_level * (n == 1)).clip(0, t.CLASSES - 1)
                found.append(model.learn(shown * copies[n] + 2 * cell + quantizers, k - low))
            joint = (posterior / posterior.sum())[:, None] * np.array(found)
            bits -= float(np.log2(joint.sum(0)).sum())
            posterior = 0.98 * posterior + (joint / joint.sum(0)).sum(1)
            level = 0.95 * level + 0.05 * size / 0.83
            before, previous = size, k
    return bits


def print_ideals(banks: Banks, forms: Forms) -> None:
    """Ideal lengths of each bank, in bits for each integer, and how much more the coder takes."""
    print(f"{'bits each':16} {'pergroup':>9} {'own':>8} {'oracle':>8} {'mixer':>8}   pergroup over each, %")
    totals = np.zeros(4)
    for name, k in banks.items():
        data = t.compress("pergroup", k.tobytes(), forms[name])
        coder = ideal_coder(k, forms[name])
        mixed = mixer_bits(coder) + coder.bits - coder.symbol_bits
        lengths = np.array([8 * len(data), coder.bits, oracle_bits(coder), mixed])
        totals += lengths
        print_ideal(name, lengths, k.size)
    print_ideal("all", totals, sum(k.size for k in banks.values()))


def print_ideal(name: str, lengths: np.ndarray, count: int) -> None:
    each = lengths / count
    over = " ".join(f"{100 * (each[0] / x - 1):7.2f}" for x in each[1:])
    print(f"{name:16} {each[0]:9.4f} {each[1]:8.4f} {each[2]:8.4f} {each[3]:8.4f}   {over}", flush=True)


def nearest_chain(rows: np.ndarray) -> np.ndarray:
    """An order of int8 rows [r, c], uint16 [r]: from row 0 always on to the nearest remaining row, in L1."""
    remaining, order = np.arange(1, len(rows)), [0]
    wide = rows.astype(np.int32)
    while remaining.size:
        n = int(np.abs(wide[remaining] - wide[order[-1]]).sum(1, dtype=np.int32).argmin())
        order.append(int(remaining[n]))
        remaining = np.delete(remaining, n)
    return np.array(order, dtype=np.uint16)


def lrzip(data: bytes, *options: str) -> bytes:
    """The output of the lrzip binary for `data`."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        subprocess.run(["lrzip", "-q", *options, "-o", str(target), str(source)], check=True, capture_output=True)
        return target.read_bytes()


def peers_pack(banks: Banks) -> tuple[tuple[bytes, bytes], int]:
    """Packs one stream of all roles; one archive per role was larger."""
    import brotli

    stream, orders = [], []
    for role, k in split_roles(banks).items():
        for matrix in k:
            if role in SORTED:
                orders.append(nearest_chain(matrix))
                matrix = matrix[orders[-1]]
            stream.append(np.ascontiguousarray(matrix.T).tobytes())
    permutations = b"".join(order.tobytes() for order in orders)
    packed = lrzip(b"".join(stream), "-z", "-L", "9"), brotli.compress(permutations, quality=11)
    return packed, sum(map(len, packed))


def peers_unpack(packed: tuple[bytes, bytes], like: Banks) -> Banks:
    import brotli

    raw, orders = lrzip(packed[0], "-d"), np.frombuffer(brotli.decompress(packed[1]), dtype=np.uint16)
    roles = {}
    at = place = 0
    for role, k in split_roles(like).items():
        roles[role] = np.empty_like(k)
        for matrix in roles[role]:
            rows = np.frombuffer(raw, dtype=matrix.dtype, count=matrix.size, offset=at).reshape(matrix.T.shape).T
            at += matrix.nbytes
            order = slice(None)
            if role in SORTED:
                order = orders[place : place + len(matrix)]
                place += len(matrix)
            matrix[order] = rows
    return join_roles(roles, like)


def standard_pack(banks: Banks) -> tuple[list[np.ndarray], int]:
    """DeepCABAC of the standard's reference software, matrix by matrix, with 10 unary bins."""
    from nncodec.extensions import deepCABAC  # pyright: ignore[reportMissingImports] # compared only where installed

    packed = []
    for matrix in (m for k in banks.values() for m in k.astype(np.int32)):
        coder = deepCABAC.Encoder()
        coder.initCtxModels(11, 1)
        coder.encodeLayer(
            matrix,
            0,
            0,
            0,
            0,
            0,
            np.zeros(len(matrix), np.int32),
            deepCABAC.HdspMode.AlwaysOff,
            np.zeros(2, np.int8),
            0,
            0,
        )
        packed.append(coder.finish())
    return packed, sum(p.size for p in packed)


def standard_unpack(packed: list[np.ndarray], like: Banks) -> Banks:
    from nncodec.extensions import deepCABAC  # pyright: ignore[reportMissingImports] # compared only where installed

    out, parts = {}, iter(packed)
    for name, k in like.items():
        out[name] = np.zeros(k.shape, dtype=k.dtype)
        for n in range(len(k)):
            matrix, decoder = np.zeros(k.shape[1:], dtype=np.int32), deepCABAC.Decoder()
            decoder.setStream(next(parts))
            decoder.initCtxModels(11)
            decoder.decodeLayer(matrix, 0, 0, 0, 0, deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8), 0, 0)
            out[name][n] = matrix
    return out


def coders(forms: Forms) -> dict[str, Coder]:
    """All coders that this machine can run, the reference first."""
    found: dict[str, Coder] = {"pergroup-lrzip": (peers_pack, peers_unpack)} if shutil.which("lrzip") else {}
    found |= {"pergroup": pergroup_coder(forms)}
    found |= {"zstd-22": byte_coder("zstd"), "brotli-11": byte_coder("brotli"), "lzma": byte_coder("lzma")}
    try:
        import nncodec.extensions  # noqa: F401 # pyright: ignore[reportMissingImports] # compared only where installed

        found["nncodec"] = (standard_pack, standard_unpack)
    except ImportError:
        pass
    return found


def measure(coder: Coder, banks: Banks, answers) -> None:
    """Sends (bytes, pack seconds, unpack seconds, peak MiB), after checking that the integers are restored."""
    start = time.perf_counter()
    packed, size = coder[0](banks)
    between = time.perf_counter()
    back = coder[1](packed, banks)
    end = time.perf_counter()
    assert all(np.array_equal(back[name], k) and back[name].dtype == k.dtype for name, k in banks.items())
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    answers.send((size, between - start, end - between, peak / 1024))


def entropy(k: np.ndarray) -> float:
    """Order-0 entropy in bits per integer."""
    share = np.unique(k, return_counts=True)[1]
    share = share / k.size
    return float(-(share * np.log2(share)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="artifact of train_gpt.py (default: synthetic integers)")
    for name, default in (("layers", 4), ("width", 256), ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the synthetic integers")
    parser.add_argument("--only", default="", help="coders to measure, comma-separated (default: all)")
    parser.add_argument("--ideal", action="store_true", help="ideal lengths too (minutes for a large model)")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.artifact:
        (banks, forms), source = artifact_banks(arguments.artifact), str(arguments.artifact)
    else:
        banks, source = synthetic_banks(arguments.layers, arguments.width, arguments.vocabulary), "SYNTHETIC integers"
        forms = {name: t.IntegerBank(k.shape, 0) for name, k in banks.items()}
    if not banks:
        raise SystemExit(f"{arguments.artifact} holds no integers")
    weights = sum(k.size for k in banks.values())
    print(f"{source}: {weights:,} integers,", ", ".join(f"{name} {list(k.shape)}" for name, k in banks.items()))
    floor = sum(entropy(k) * k.size for k in banks.values()) / 8
    print(f"{'':16} {'bytes':>12} {'bits each':>10} {'ratio':>7} {'pack s':>8} {'unpack s':>9} {'time':>7} {'MiB':>6}")
    print(f"{'entropy, order 0':16} {floor:12,.0f} {8 * floor / weights:10.4f}   (of each bank on its own)")
    reference: tuple[float, float] | None = None
    rows, wanted = [], arguments.only.split(",") if arguments.only else coders(forms)
    for name, coder in coders(forms).items():
        if name not in wanted:
            continue
        receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=measure, args=(coder, banks, send))
        process.start()
        send.close()
        try:
            size, pack_s, unpack_s, peak = receive.recv()
        except EOFError:
            raise SystemExit(f"{name} failed") from None
        process.join()
        reference = reference or ((size, pack_s + unpack_s) if name == "pergroup-lrzip" else (0, 0))
        ratios = [f"{x / y:.4f}" if y else "-" for x, y in zip((size, pack_s + unpack_s), reference, strict=True)]
        print(
            f"{name:16} {size:12,} {8 * size / weights:10.4f} {ratios[0]:>7} {pack_s:8.2f} {unpack_s:9.2f} "
            f"{ratios[1]:>7} {peak:6.0f}",
            flush=True,
        )
        rows.append(dict(coder=name, bytes=size, pack_seconds=pack_s, unpack_seconds=unpack_s, peak_mib=peak))
    if arguments.ideal:
        print_ideals(banks, forms)
    if arguments.json:
        t.write_atomic(arguments.json, json.dumps(dict(integers=weights, source=source, rows=rows), indent=1) + "\n")
    print(
        "ratio, time: bytes, and seconds to pack and unpack, relative to lrzip in the peers' arrangement"
        if reference and reference[0]
        else "no lrzip on this machine: no ratios"
    )


if __name__ == "__main__":
    main()
