"""The container: what goes in comes out, any damage is refused by name, and nothing in it can run code."""

import dataclasses
import json
import lzma
import os
import random
import resource
import signal
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, build_model, config, examples, loaded_apart, random_batch

ANY_BYTES = ["zstd", "brotli", "lzma"]
CODECS = [*ANY_BYTES, "pergroup"]
SMALL = dict(NUM_LAYERS=2, MODEL_DIM=16, VOCAB_SIZE=64, NUM_KV_HEADS=2, GATE_WINDOW=4)


def stored_model(base=TINY, **knobs):
    """A config, and the stored form of a model with random weights, rounded to nearest."""
    c = config(base, **knobs)
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    return c, tg.quantize(weights, tg.Calibration({}), c)


def stored_with_extras(base=RECORD_LIKE, **knobs):
    """The same after GPTQ for random Hessians, with corrections, salient columns and residuals."""
    c = config(base, **{"LQER_SELECT": "norm", "LQER_ENABLED": 1, "AWQ_GROUPS": 5, "RVQ_ENABLED": 1, **knobs})
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    generator = torch.Generator().manual_seed(4)
    hessians = {}
    for name in (*tg.BANKS, "embedding"):
        x = torch.randn(len(tg.as_batch(weights[name])), 50, weights[name].size(-1), generator=generator)
        hessians[name] = x.mT @ x
    stored = tg.quantize(weights, tg.Calibration(hessians), c)
    return c, tg.with_residuals(stored, tg.fit_residuals(stored, weights, hessians, c)[::2])


def widened(stored, bits=11):
    """The stored tensors with int16 codes in the banks, of a sixteenth of the step."""
    wide = dict(stored)
    for name in (*tg.BANKS, "embedding"):
        q = stored[name]
        codes = 16 * q.codes.short() + torch.arange(q.codes.numel()).view(q.codes.shape).short() % 13
        wide[name] = q._replace(codes=codes.clamp(-tg.WIDE_LIMIT, tg.WIDE_LIMIT), bits=bits, scales=q.scales / 16)
    return wide


def equal(x, y):
    """Whether two stored models are the same in every array of every tensor."""
    return list(x) == list(y) and all(
        (x[n].bits, x[n].states) == (y[n].bits, y[n].states)
        and [p for p, _ in tg.arrays_of(x[n])] == [p for p, _ in tg.arrays_of(y[n])]
        and all(
            a.dtype == b.dtype and torch.equal(a, b)
            for (_, a), (_, b) in zip(tg.arrays_of(x[n]), tg.arrays_of(y[n]), strict=True)
        )
        for n in x
    )


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, dict(TINY, TIE_EMBEDDINGS=0)], ids=["tiny", "record", "untied"])
def test_unpacking_gives_back_what_was_packed(base, codec):
    c, stored = stored_model(base, COMPRESSOR=codec)
    data = tg.pack(stored, c)
    values, back = tg.unpack(data)
    assert values == dataclasses.asdict(c.model) and equal(back, stored)
    assert tg.pack(stored, c) == data  # the same bytes each time


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_corrections_column_scales_and_residuals_come_back(quantizer, codec):
    c, stored = stored_with_extras(COMPRESSOR=codec, QUANTIZER=quantizer, COLUMN_STEPS=0.75)
    assert {part for q in stored.values() for part in q.extras} == set(tg.EXTRAS)
    data = tg.pack(stored, c)
    assert equal(tg.unpack(data)[1], stored)
    model, _ = tg.load_artifact(data, config(), set(), torch.device("cpu"))
    weights = tg.dequantize(stored)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("part", sorted(tg.EXTRAS))
@pytest.mark.parametrize("change", ["missing", "longer", "large", "negative"])
def test_extras_that_do_not_fit_are_refused(part, change):
    c, stored = stored_with_extras(dict(TINY, **SMALL), AWQ_GROUPS=3)
    name, q = next((n, q) for n, q in stored.items() if part in q.extras)
    array = q.extras[part]
    numbers = part in ("corrected", "refined")
    if change in ("large", "negative"):
        if not numbers:
            return  # any codes and scales are values that a tensor may have
        q.extras[part] = torch.full_like(array, 10**6 if change == "large" else -1)
    elif change == "missing" and part == "columns":
        return  # then all columns have the same scale, which is a tensor too
    elif change == "missing":
        del q.extras[part]
    else:
        q.extras[part] = torch.cat((array, array))
    with pytest.raises(tg.ArtifactError, match=f"its tensor '{name}' is not possible: its extras"):
        tg.load_artifact(tg.pack(stored, c), config(), set(), torch.device("cpu"))


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_bits(bits):
    c, stored = stored_model(MATRIX_BITS=bits, EMBED_BITS=bits, **SMALL)
    assert equal(tg.unpack(tg.pack(stored, c))[1], stored)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_wide_codes_come_back(quantizer, codec):
    """Codes of 9 to 12 bits, in sections of their own and, where they are few, in one that they share."""
    for base, own in ((RECORD_LIKE, True), (dict(RECORD_LIKE, **SMALL), False)):
        c, stored = stored_with_extras(base, COMPRESSOR=codec, QUANTIZER=quantizer, NUM_LAYERS=6, AWQ_GROUPS=3)
        for bits in (9, 12):
            wide = widened(stored, bits)
            data = tg.pack(wide, c)
            assert equal(tg.unpack(data)[1], wide)
            sections = {section.name for section in tg.read_header(data)[0].sections}
            assert ("embedding.codes" in sections) is own and (own or "int16" in sections)
            model, _ = tg.load_artifact(data, config(), set(), torch.device("cpu"))
            weights = tg.dequantize(wide)
            assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("value", [-2048, 2048, 2**15 - 1, -(2**15)])
def test_wide_codes_that_no_quantizer_gives_are_refused(value):
    c, stored = stored_model(**SMALL, COMPRESSOR="pergroup")
    stored = widened(stored)
    stored["embedding"].codes[3, 2] = value
    with pytest.raises(tg.ArtifactError, match="its codes are not within -2047..2047"):
        tg.load_artifact(tg.pack(stored, c), config(), set(), torch.device("cpu"))


@pytest.mark.parametrize("codec", ["brotli", "pergroup"])
def test_a_cache_changes_no_byte(codec):
    """Also where only a scale, which is in another section, has changed: it tells what the codes are like."""
    c, stored = stored_model(RECORD_LIKE, COMPRESSOR=codec, QUANTIZER="uniform")
    cache = {}
    assert tg.pack(stored, c, cache) == tg.pack(stored, c)
    first = set(cache)
    assert tg.pack(stored, c, cache) == tg.pack(stored, c) and set(cache) == first
    q = stored["up_bank"]
    changed = dict(stored, up_bank=q._replace(codes=q.codes.flip(0)))
    assert tg.pack(changed, c, cache) == tg.pack(changed, c)
    assert {name for name, _ in set(cache) - first} == {"up_bank.codes"}
    changed = dict(stored, up_bank=q._replace(scales=q.scales * torch.rand(q.scales.shape).half()))
    assert tg.pack(changed, c, cache) == tg.pack(changed, c)
    for key in cache:
        cache[key] = b"cached"
    assert b"cached" * len(first) in tg.pack(stored, c, cache)


def test_scales_tell_the_codes_in_any_order_of_sections():
    c, stored = stored_with_extras(COMPRESSOR="pergroup", COLUMN_STEPS=0.75)
    data = tg.pack(stored, c)
    header, offset = tg.read_header(data)
    payloads = []
    for section in header.sections:
        payloads.append(data[offset : offset + section.packed_size])
        offset += section.packed_size
    assert header.sections[-1].name not in tg.SCALE_SECTIONS
    turned = {**header.fields(), "sections": [s.row() for s in header.sections[::-1]]}
    assert equal(tg.unpack(signed(turned, b"".join(payloads[::-1])))[1], stored)


def test_fewer_bits_take_fewer_bytes():
    sizes = [len(tg.pack(stored, c)) for c, stored in (stored_model(MATRIX_BITS=b, EMBED_BITS=b) for b in (2, 4, 6, 8))]
    assert sizes == sorted(sizes) and sizes[0] < 0.5 * sizes[-1]


def test_each_codec_packs_and_takes_exactly_the_expected_bytes():
    noise = random.Random(0).randbytes(3000)
    for data in (b"", b"a", b"abc" * 5000, noise, bytes(2**20)):
        packed = {codec: tg.compress(codec, data) for codec in ANY_BYTES}
        for codec, content in packed.items():
            assert tg.decompress(codec, content, len(data)) == data
            for wrong in {len(data) + 1, max(0, len(data) - 1), 0, 2 * len(data) + 7} - {len(data)}:
                with pytest.raises(tg.ArtifactError):
                    tg.decompress(codec, content, wrong)
        assert len(data) < 10_000 or all(len(content) < len(data) / 50 for content in packed.values())
    with pytest.raises(tg.ArtifactError, match="unknown codec 'zip'"):
        tg.decompress("zip", b"", 0)


NUMBERS = st.integers(0, 9) | st.integers(0, 65535)


@examples(max_examples=100)
@given(st.lists(NUMBERS, max_size=300), st.data())
def test_a_table_gives_back_its_numbers_or_refuses(numbers, data):
    content = np.array(numbers, dtype="<u2").tobytes()
    packed = tg.compress("table", content)
    assert tg.decompress("table", packed, len(content)) == content
    for wrong in (len(content) + 2, max(0, len(content) - 2), len(content) + 1):
        if wrong != len(content):
            with pytest.raises(tg.ArtifactError):
                tg.decompress("table", packed, wrong)
    forged = mutated(data.draw, tg.decompress("brotli", packed, 4 + 2 * len(set(numbers)) + len(content)))
    try:
        assert len(tg.decompress("table", tg.compress("brotli", forged), len(content))) == len(content)
    except tg.ArtifactError:
        return


def test_numbers_of_few_values_take_fewer_bytes_as_a_table():
    grid = np.exp2(np.random.default_rng(0).integers(-80, -40, 20_000) / 16).astype("<f2").tobytes()
    assert len(tg.compress("table", grid)) < 0.9 * len(tg.compress("brotli", grid))
    every = np.arange(1 << 16, dtype="<u2").tobytes()
    assert tg.decompress("table", tg.compress("table", every), len(every)) == every


@pytest.mark.parametrize("codec", [*ANY_BYTES, "table"])
def test_a_bomb_is_not_unpacked(codec):
    """16 MiB of zeros where 100 bytes are expected: refused without allocating them (LZMA's window takes 64 MiB)."""
    if codec == "lzma":  # as `compress` does it, but for the effort, which takes seconds
        filters = [dict(id=lzma.FILTER_LZMA1, preset=0, dict_size=2**26)]
        bomb = lzma.compress(bytes(2**27), format=lzma.FORMAT_ALONE, filters=filters)
    else:
        bomb = tg.compress(codec, bytes(2**24))
    tracemalloc.start()
    try:
        with pytest.raises(tg.ArtifactError, match="another length|does not unpack"):
            tg.decompress(codec, bomb, 100)
        assert tracemalloc.get_traced_memory()[1] < (2**21 if codec != "lzma" else 2**26 + 2**21)
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module", params=CODECS)
def container(request):
    c, stored = stored_model(
        RECORD_LIKE, COMPRESSOR=request.param, **SMALL, NUM_LOOPS=0, PARALLEL_START_LAYER=-1, XSA_LAST_N=2
    )
    return tg.pack(stored, c)


def refused(data):
    """The message of the only kind of error that damage may cause."""
    with pytest.raises(tg.ArtifactError) as caught:
        tg.load_artifact(data, config(), set(), torch.device("cpu"))
    assert str(caught.value).startswith("artifact: ") and "\n" not in str(caught.value)
    return str(caught.value)


@examples(max_examples=300)
@given(st.data())
def test_any_changed_byte_is_noticed(container, data):
    place, change = data.draw(st.integers(0, len(container) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(container)
    changed[place] ^= change
    refused(bytes(changed))


def test_every_byte_of_the_prefix_is_checked(container):
    for place in range(16):
        for bit in range(8):
            changed = bytearray(container)
            changed[place] ^= 1 << bit
            refused(bytes(changed))


@examples(max_examples=200)
@given(st.data())
def test_any_truncation_is_noticed(container, data):
    refused(container[: data.draw(st.integers(0, len(container) - 1))])


@examples(max_examples=50)
@given(st.binary(min_size=1, max_size=40))
def test_any_addition_is_noticed(container, extra):
    assert "too many" in refused(container + extra)


@examples(max_examples=200)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content):
    refused(content)
    refused(tg.MAGIC + content)


@examples(max_examples=50)
@given(st.data())
def test_swapped_parts_are_noticed(container, data):
    a, b = sorted(data.draw(st.lists(st.integers(16, len(container)), min_size=2, max_size=2, unique=True)))
    mixed = container[:16] + container[a:b] + container[16:a] + container[b:]
    if mixed != container:
        refused(mixed)


def with_header(container, change):
    """The container with another header, whose checksum is right: what only a forger makes."""
    header, offset = tg.read_header(container)
    changed = change(json.loads(json.dumps(header.fields())))
    packed = zlib.compress(json.dumps(changed).encode() if not isinstance(changed, bytes) else changed)
    return struct.pack("<8sII", tg.MAGIC, len(packed), zlib.crc32(packed)) + packed + container[offset:]


def test_an_unchanged_header_is_no_forgery(container):
    assert equal(tg.unpack(with_header(container, lambda h: h))[1], tg.unpack(container)[1])


FORGERIES = {
    "not json": lambda h: b"hello",
    "not utf-8": lambda h: b"\xff\xfe{",
    "a list": lambda h: [],
    "null": lambda h: None,
    "empty": lambda h: {},
    "deep": lambda h: b"[" * 100_000,
    "no sections": lambda h: {**h, "sections": []},
    "no tensors": lambda h: {**h, "tensors": []},
    "no model": lambda h: {**h, "model": {}},
    "unknown knob": lambda h: {**h, "model": {**h["model"], "evil": 1}},
    "knob of another type": lambda h: {**h, "model": {**h["model"], "num_layers": "many"}},
    "null knob": lambda h: {**h, "model": {**h["model"], "model_dim": None}},
    "no width": lambda h: {**h, "model": {**h["model"], "num_heads": 0}},
    "negative depth": lambda h: {**h, "model": {**h["model"], "num_layers": -1}},
    "enormous": lambda h: {**h, "model": {**h["model"], "model_dim": 2**40, "num_layers": 2**20}},
    "enormous rows": lambda h: {**h, "model": {**h["model"], "train_seq_len": 2**50}},
    "a path": lambda h: {**h, "model": {**h["model"], "tokenizer_path": "/etc/passwd", "data_path": "/"}},
    "unknown codec": lambda h: {**h, "sections": [[s[0], "pickle", *s[2:]] for s in h["sections"]]},
    "short sections": lambda h: {**h, "sections": [s[:3] for s in h["sections"]]},
    "negative length": lambda h: {**h, "sections": [[*s[:2], -5, *s[3:]] for s in h["sections"]]},
    "negative size": lambda h: {**h, "sections": [[*s[:3], -1, s[4]] for s in h["sections"]]},
    "a float": lambda h: {**h, "sections": [[*s[:2], float(s[2]), *s[3:]] for s in h["sections"]]},
    "enormous size": lambda h: {**h, "sections": [[*s[:3], 2**33, s[4]] for s in h["sections"]]},
    "negative shape": lambda h: {**h, "tensors": [[n, b, [-x for x in s], e, t] for n, b, s, e, t in h["tensors"]]},
    "large shape": lambda h: {**h, "tensors": [[n, b, [2**20, *s[1:]], e, t] for n, b, s, e, t in h["tensors"]]},
    "text shape": lambda h: {**h, "tensors": [[n, b, "ab", e, t] for n, b, s, e, t in h["tensors"]]},
    "other names": lambda h: {**h, "tensors": [[n + "x", b, s, e, t] for n, b, s, e, t in h["tensors"]]},
    "other bits": lambda h: {**h, "tensors": [[n, 16 if b < 16 else 6, s, e, t] for n, b, s, e, t in h["tensors"]]},
    "unknown trellis": lambda h: {**h, "tensors": [[n, b, s, e, 7] for n, b, s, e, t in h["tensors"]]},
    "another trellis": lambda h: {**h, "tensors": [[n, b, s, e, 32] for n, b, s, e, t in h["tensors"]]},
    "twice": lambda h: {**h, "tensors": h["tensors"] * 2},
    "sections twice": lambda h: {**h, "sections": h["sections"] * 2},
    "wider": lambda h: {**h, "tensors": [[n, b if b == 16 else 9, s, e, t] for n, b, s, e, t in h["tensors"]]},
    "odd bits": lambda h: {**h, "tensors": [[n, 99 if b < 16 else b, s, e, t] for n, b, s, e, t in h["tensors"]]},
    "a bool for an int": lambda h: {**h, "tensors": [[n, b, s, e, False] for n, b, s, e, t in h["tensors"]]},
    "unknown array": lambda h: {**h, "tensors": [[n, b, s, {"code": [1]}, t] for n, b, s, e, t in h["tensors"]]},
    "a base of 2^64": lambda h: {**h, "model": {**h["model"], "rope_base": 2**64}},
    "a base of 10^400": lambda h: {**h, "model": {**h["model"], "rope_base": 10**400}},
    "a base that is no number": lambda h: {**h, "model": {**h["model"], "rope_base": float("nan")}},
    "an infinite base": lambda h: {**h, "model": {**h["model"], "rope_base": float("inf")}},
}


def out_of_time(*_):
    raise AssertionError("took more than 10 seconds")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_refused(name):
    """Also by a right checksum: with one line, at once, and without believing any size before it is checked."""
    c, stored = stored_model(**SMALL)
    forged = with_header(tg.pack(stored, c), FORGERIES[name])
    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(10)
    try:
        with pytest.raises(tg.ConfigError):
            tg.load_artifact(forged, config(), set(), torch.device("cpu"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_small_file_that_claims_long_sequences_takes_no_memory(tmp_path):
    """Rotary tables of 2^20 positions: nothing in the file pays for them, so they are never formed."""
    c, stored = stored_model(**{**SMALL, "MODEL_DIM": 256, "NUM_HEADS": 2, "NUM_LAYERS": 1, "COMPRESSOR": "brotli"})
    stored = {name: q._replace(codes=torch.zeros_like(q.codes)) for name, q in stored.items()}
    data = with_header(tg.pack(stored, c), lambda h: {**h, "model": {**h["model"], "train_seq_len": 2**20}})
    assert len(data) < 4000
    grown, message = loaded_apart(data, tmp_path)
    assert grown < 64 and "sequences of 1048576 tokens" in message


def test_a_small_file_that_claims_much_content_takes_no_memory(tmp_path):
    """Half a gigabyte of zeros in a few hundred bytes."""
    c, stored = stored_model(**SMALL)
    header = tg.read_header(tg.pack(stored, c))[0]
    size = 2**29
    sections = (*header.sections[:-1], dataclasses.replace(header.sections[-1], size=size))
    forged = dataclasses.replace(header, sections=sections)
    data = with_header(tg.pack(stored, c), lambda h: forged.fields())
    grown, message = loaded_apart(data, tmp_path)
    assert grown < 64 and "bytes of content, which is more than" in message


def test_a_header_says_what_is_wrong_with_it():
    section = ["a", "zstd", 1, 2, 3]
    assert tg.SectionHeader.parse(section).row() == section
    tensor = ["w", 6, [3, 4], {"columns": [1, 4]}, 8]
    assert tg.TensorHeader.parse(tensor).row() == tensor
    assert tg.TensorHeader.parse(tensor).parts() == {"codes": (3, 4), "scales": (3,), "columns": (1, 4)}
    for parse, row, reason in (
        (tg.SectionHeader.parse, section[:4], "section row that is not str, str, int, int, int"),
        (tg.SectionHeader.parse, ["a", "zstd", 1, 2.0, 3], "section row"),
        (tg.SectionHeader.parse, ["a", "zstd", -1, 2, 3], "negative size"),
        (tg.TensorHeader.parse, ["w", 6, [3, -4], {}, 0], "not a list of sizes"),
        (tg.TensorHeader.parse, ["w", 6, [3, True], {}, 0], "not a list of sizes"),
        (tg.TensorHeader.parse, ["w", 7.0, [3, 4], {}, 0], "tensor row"),
        (tg.TensorHeader.parse, ["w", 13, [3, 4], {}, 0], "has 13 bits"),
        (tg.TensorHeader.parse, ["w", 6, [3, 4], {"columns": [4]}, 0], "array 'columns'"),
        (tg.TensorHeader.parse, ["w", 6, [3, 4], {"rows": [4]}, 0], "array 'rows'"),
        (tg.TensorHeader.parse, ["w", 6, [3, 4], {}, 5], "trellis with 5 states"),
    ):
        with pytest.raises(tg.ArtifactError, match=reason):
            parse(row)


# ----------------------------------------------------------------------------------------------------------------- fuzz

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", 1_500))  # over all codecs; a longer run sets more


def mutated(draw, content):
    """The bytes after one to three changes: a byte, a cut, an insertion, a repetition, two parts exchanged."""
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
        kind = draw(st.sampled_from(["byte", "bytes", "cut", "end", "insert", "repeat", "exchange"]))
        if kind == "byte" and a < len(content):
            content = content[:a] + bytes([draw(st.integers(0, 255))]) + content[a + 1 :]
        elif kind == "bytes":
            content = content[:a] + draw(st.binary(max_size=9)) + content[a + 9 :]
        elif kind == "cut":
            content = content[:a] + content[b:]
        elif kind == "end":
            content = content[:b]
        elif kind == "insert":
            content = content[:a] + draw(st.binary(max_size=9)) + content[a:]
        elif kind == "repeat":
            content = content[:b] + content[a:b] + content[b:]
        elif kind == "exchange":
            content = content[b:] + content[a:b] + content[:a]
    return content


def signed(header, payload):
    """A container of this header (JSON bytes, or an object) and these sections, all checksums right."""
    packed = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode(), 1)
    return struct.pack("<8sII", tg.MAGIC, len(packed), zlib.crc32(packed)) + packed + payload


def forge(draw, container):
    """A mutation anywhere, or one inside the header or a section with the checksums made to fit."""
    where = draw(st.sampled_from(["anywhere", "header", "section"]))
    if where == "anywhere":
        return mutated(draw, container)
    header, offset = tg.read_header(container)
    header = header.fields()
    if where == "header":
        return signed(mutated(draw, json.dumps(header).encode()), container[offset:])
    number = draw(st.integers(0, len(header["sections"]) - 1))
    start = offset + sum(s[2] for s in header["sections"][:number])
    section = header["sections"][number]
    content = mutated(draw, container[start : start + section[2]])
    payload = container[offset:start] + content + container[start + section[2] :]
    section[2], section[4] = len(content), zlib.crc32(content)
    return signed(header, payload)


@pytest.mark.parametrize("codec", CODECS)
def test_no_mutation_does_more_than_be_refused(codec):
    """Bounded memory, and one kind of error or a model that the file describes: whatever the bytes are."""
    # A looped layer and one of two lanes: more layers would make a model slower to build, and no other section.
    layers = dict(NUM_LAYERS=3, LOOP_START=1, LOOP_END=1, PARALLEL_START_LAYER=2, XSA_LAST_N=3)
    c, stored = stored_with_extras(dict(RECORD_LIKE, **SMALL), COMPRESSOR=codec, AWQ_GROUPS=3, **layers)
    wide = dict(stored, up_bank=widened(stored)["up_bank"], embedding=widened(stored)["embedding"])
    containers, here = [tg.pack(stored, c), tg.pack(wide, c)], config()

    @examples(max_examples=MUTATIONS // len(CODECS))
    @given(st.data())
    def attack(data):
        forged = forge(data.draw, data.draw(st.sampled_from(containers)))
        try:
            model, _ = tg.load_artifact(forged, here, set(), torch.device("cpu"))
            assert all(p.dim() <= 3 for p in model.parameters())
        except tg.ConfigError as error:
            assert "\n" not in str(error)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20  # KiB


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@examples(max_examples=300)
@given(st.data())
def test_junk_in_a_header_is_refused_or_harmless(data):
    """Anything at any place of the header: unpacking gives an ArtifactError or tensors, nothing else."""

    def forge(header):
        node, path = header, []
        while isinstance(node, (dict, list)) and node and (not path or data.draw(st.booleans())):
            path.append(
                (
                    node,
                    data.draw(
                        st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1)
                    ),
                )
            )
            node = path[-1][0][path[-1][1]]
        path[-1][0][path[-1][1]] = data.draw(JUNK)
        return header

    try:
        values, stored = tg.unpack(with_header(FORGED, forge))
    except tg.ArtifactError:
        return
    assert all(isinstance(q, tg.Quantized) for q in stored.values())


FORGED = tg.pack(*reversed(stored_model(**SMALL)))


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "base", [TINY, RECORD_LIKE, dict(TINY, TIE_EMBEDDINGS=0), POLY_LIKE], ids=["tiny", "record", "untied", "poly"]
)
@torch.no_grad()
def test_a_loaded_model_is_the_dequantized_one(base):
    """The same NLLs, bit for bit, as weights that are dequantized and set by hand; the preset at loading is another."""
    c, stored = stored_model(base)
    other = config({"PRESET": "record"}, DEVICE="cpu", COMPUTE_DTYPE="bfloat16")
    loaded, found = tg.load_artifact(tg.pack(stored, c), other, set(), torch.device("cpu"))
    by_hand = tg.new_model(c)
    weights = tg.dequantize(stored)
    for name, p in by_hand.named_parameters():
        p.copy_(weights[name])
    assert found.model == c.model
    assert [p.dtype for p in loaded.parameters()] == [torch.float32] * len(weights)
    batch = random_batch(c, 3, 32)
    for looped in {False, c.loops}:
        assert all(map(torch.equal, loaded(*batch, looped=looped), by_hand(*batch, looped=looped)))


def test_knobs_that_contradict_the_artifact_are_refused():
    c, stored = stored_model()
    data = tg.pack(stored, c)
    for name, value in dict(
        NUM_LAYERS=4,
        MODEL_DIM=64,
        LOGIT_SOFTCAP=20.0,
        LN_SCALE=1,
        ROPE_BASE=500.0,
        BIGRAM_VOCAB_SIZE=50,
        VE_LAYERS="1",
        SMEAR_GATE_TYPE="channel",
    ).items():
        other = config(**{name: value})
        shown = getattr(other, name.lower())
        with pytest.raises(tg.ConfigError, match=rf"^{name}={shown}: the artifact was made with "):
            tg.load_artifact(data, other, {name.lower()}, torch.device("cpu"))
        assert tg.load_artifact(data, other, {"seed"}, torch.device("cpu"))[1].model == c.model
    everything = {f.name for f in tg.dataclasses.fields(tg.Config)}
    assert tg.load_artifact(data, c, everything, torch.device("cpu"))[1] == c  # what agrees may be said


def test_an_artifact_of_a_row_length_that_the_preset_does_not_fit_can_be_read():
    """Training's own settings (here 4096 tokens a batch, no multiple of 48) play no part in reading an artifact."""
    c, stored = stored_model(TRAIN_SEQ_LEN=48, TRAIN_BATCH_TOKENS=96)
    here = config(TINY, MODE="eval", TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=4096)
    _, found = tg.load_artifact(tg.pack(stored, c), here, set(), torch.device("cpu"))
    assert found.train_seq_len == 48


def test_the_longest_context_may_be_longer_than_the_training_rows():
    c, stored = stored_model()
    model, found = tg.load_artifact(tg.pack(stored, c), config(EVAL_SEQ_LEN=100), set(), torch.device("cpu"))
    assert found.eval_context == 100
    nll, _ = model(*random_batch(c, 1, 100), looped=False)
    assert nll.shape == (1, 100) and torch.isfinite(nll).all()


def test_a_model_travels_through_a_file(tmp_path):
    c, stored = stored_model()
    tg.write_atomic(tmp_path / "model", tg.pack(stored, c))
    assert equal(tg.unpack((tmp_path / "model").read_bytes())[1], stored)
    assert np.frombuffer((tmp_path / "model").read_bytes()[:8], np.uint8).tobytes() == tg.MAGIC
