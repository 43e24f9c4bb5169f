"""tools/generate.py: text from an artifact, by the logits that a score is computed from, the same for the same seed."""

import io
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    RECORD_LIKE,
    ROOT,
    TINY,
    build_model,
    clean_environment,
    config,
    examples,
    fork,
    make_documents,
    snapshot,
    strings,
    tg,
)

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import caseops  # noqa: E402
import generate  # noqa: E402
import runs  # noqa: E402
import tokens  # noqa: E402
from tokens import Tokenizer  # noqa: E402

TOOL = ROOT / "tools" / "generate.py"


def caseops_tokenizer():
    """A tokenizer with the operators as symbols of their own, as data/prepare.py makes it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(caseops.encode(text) for text in make_documents(1, 200)),
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        user_defined_symbols=list(caseops.OPERATORS.values()),
        minloglevel=3,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """A run's folder: a random model with loops and parallel streams, its config, and a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("generate")
    c = config(RECORD_LIKE)
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    (folder / "model.pgolf").write_bytes(tg.pack(tg.quantize(weights, tg.Calibration({}), c), c))
    (folder / "config.json").write_text(json.dumps(dict(data_path=str(data), tokenizer_path="")))
    (folder / "caseops.model").write_bytes(caseops_tokenizer())
    return folder


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    monkeypatch.setenv("CPU_THREADS", "1")


def run(capsys, *arguments):
    """What the command prints."""
    assert generate.main([*map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def loaded(folder):
    """The model of a run's folder and its tokenizer, as the command loads them."""
    model = generate.load(SimpleNamespace(artifact=folder, tokenizer=None, device="cpu"))
    return model, model.tokenizer


def test_the_command_streams_the_prompt_and_the_same_text_for_the_same_seed(folder, data, capsys):
    done = fork(TOOL, dict(CPU_THREADS=1), folder, "the river", "--tokens", 30, "--seed", 5, cwd=folder)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("the river"), done.stderr
    first = run(capsys, folder, "the river", "--tokens", 30, "--seed", 5)
    assert first == done.stdout == run(capsys, folder / "model.pgolf", "the river", "--tokens", 30, "--seed", 5)
    assert first != run(capsys, folder, "the river", "--tokens", 30, "--seed", 6)


def test_every_beginning_of_a_character_can_be_finished():
    """Otherwise no token would be left to sample, as after the first two bytes of a surrogate."""
    beginnings, whole = [b""], 0
    while beginnings:
        held = beginnings.pop()
        after = [tokens.begin_of_character(held + bytes([byte])) for byte in range(256)]
        assert any(found is not None for found in after), held
        beginnings += [found for found in after if found]
        whole += after.count(b"")
    assert whole == sys.maxunicode + 1 - 2048  # every character, and no surrogate


def test_temperature_and_top_k(folder, capsys):
    greedy = run(capsys, folder, "the", "--tokens", 20, "--temperature", 0)
    assert greedy == run(capsys, folder, "the", "--tokens", 20, "--top-k", 1, "--seed", 9)
    cold = run(capsys, folder, "the", "--tokens", 20, "--temperature", 1e-6, "--top-k", 0)
    assert cold == greedy != run(capsys, folder, "the", "--tokens", 20, "--temperature", 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_logits_are_those_that_the_score_comes_from(dtype, folder, monkeypatch):
    """The score of each next token, whichever it is; a token further back than the context holds changes nothing."""
    monkeypatch.setenv("COMPUTE_DTYPE", dtype)
    kept, _ = loaded(folder)
    model, ids = kept.gpt, torch.randint(4, 384, (1, 19), generator=torch.Generator().manual_seed(1)).numpy()
    ids[0, 0] = tg.BOS_ID
    batch = tg.to_device(ids, ids, tg.document_starts(ids), torch.device("cpu"))
    row = torch.log_softmax(kept.logits(ids[0].tolist(), last=1)[0].double(), 0)
    for target in (1, 4, 200, 383):
        with torch.no_grad():
            nll, _ = model(batch.ids, torch.full((1, 1), target), batch.documents, looped=True)
        assert -row[target] == pytest.approx(nll.item(), abs=1e-5)
    long = [1, *torch.randint(4, 384, (80,), generator=torch.Generator().manual_seed(2)).tolist()]
    following = [list(kept.tokens(ids, 3, 0, 0, 0)) for ids in (long, long[-32:], long[-60:])]
    assert kept.config.eval_context == 32 and following[0] == following[1] == following[2]
    assert not torch.equal(kept.logits(long[-32:])[-1], kept.logits(long[-31:])[-1])


def test_nothing_is_left_in_the_model(folder):
    """No hook: the model that was loaded gives the same scores after text was generated with it."""
    model, _ = loaded(folder)
    before = model.logits([1, 20, 30])
    assert model.generate("the", tokens=3) and model.score("the river") > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.gpt.modules())
    assert torch.equal(model.logits([1, 20, 30]), before) and before.shape == (3, 384) and before.dtype == torch.float32


def test_the_text_ends_with_its_document_and_holds_no_special_token(folder, monkeypatch):
    model, text = loaded(folder)
    assert {0, 2, 3} == set(text.silent.tolist())

    def planted(tokens, last):
        row = torch.zeros(384)
        row[:4] = 50.0
        row[tg.BOS_ID] = 100.0 if len(tokens) > 6 else -100.0
        row[300] = 40.0
        return row[None]

    monkeypatch.setattr(model, "logits", planted)
    assert list(model.tokens([1, 200], 50, 1.0, 0, 0)) == [300] * 5


@pytest.mark.parametrize("kind", ["plain", "caseops"])
def test_streamed_pieces_join_to_the_text(kind, folder, data):
    values = dict(TINY, TOKENIZER_PATH=data / "tokenizer.model" if kind == "plain" else folder / "caseops.model")
    text = Tokenizer(tg.config_from_env(strings(values), False)[0])
    assert text.caseops == (kind == "caseops")

    @examples(max_examples=60)
    @given(st.text(max_size=20) | st.text("aAbB \ue001\ue002\ue003\ue004é.", max_size=20))
    def check(sample):
        sample = sample.replace("\u2581", "")  # SentencePiece's own mark is a space to it
        ids = text.encode(sample)
        assert ids[0] == tg.BOS_ID and text.decode(ids) == sample == text.decode(ids[1:])

    check()
    if kind == "caseops":
        pieces = list(text.stream(iter(text.encode("The HTTP McDonald")[1:])))
        assert len(pieces) == 3 and "".join(pieces) == "The HTTP McDonald"  # word by word


def test_operators_where_no_encoder_puts_them_are_left_out():
    title, caps, capnext, esc = caseops.OPERATORS.values()
    assert tokens.original(f"{title}the {title} {caps}a b{capnext}c {esc}") == "The  a bC "
    assert tokens.original(f"{esc}{title}x") == f"{title}x"


def test_bytes_that_are_no_character_yet_wait(folder, data):
    _, text = loaded(folder)
    ids = [text.model.PieceToId(f"<0x{byte:02X}>") for byte in "😀".encode()]
    assert list(text.stream(iter(ids))) == ["", "", "", "😀", ""]
    assert text.decode(ids[:2]) == "\ufffd"
    assert "".join(text.stream(iter([*text.encode("the")[1:], *ids[:3]]))) == "the"  # half a character is no text yet
    assert "".join(text.stream(iter([*ids[:2], *ids]))) == "\ufffd😀"


def test_a_sampled_text_has_no_broken_character(folder):
    """A random model writes half of the bytes as tokens of their own. All that it writes is UTF-8."""
    model, text = loaded(folder)
    byte = {value: text.model.PieceToId(f"<0x{value:02X}>") for value in range(256)}
    unfit = {held: {*text.unfit(held).tolist()} for held in (b"", "世".encode()[:1], "😀".encode()[:3])}
    assert byte[0x80] in unfit[b""] and byte[0xFF] in unfit[b""] and byte[0xE4] not in unfit[b""]
    assert tg.BOS_ID not in unfit[b""] and byte[ord("a")] not in unfit[b""]
    for held in list(unfit)[1:]:
        fit = {*range(len(text.pieces))} - unfit[held]
        assert fit <= {byte[value] for value in range(0x80, 0xC0)} and len(fit) in (32, 64)
    assert text.unfinished(b"\xe4\xb8", byte[0x96]) == b"" and text.unfinished(b"\xe4", byte[0xB8]) == b"\xe4\xb8"
    written = [model.generate("世", tokens=60, temperature=5, top_k=0, seed=seed) for seed in range(4)]
    assert all("\ufffd" not in sample for sample in written)
    assert any(ord(character) > 255 for sample in written for character in sample[1:])


def test_lines_ends_the_text_after_so_many_that_hold_something():
    assert "".join(generate.lines_of(iter(["\na", "b\n", "\n", "c\nd"]), 2)) == "\nab\n\nc"
    assert "".join(generate.lines_of(iter(["a\nb", "c"]), 0)) == "a\nbc"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing"], "missing: there is no such artifact"),
        (["."], "model.pgolf: there is no such artifact"),
        (["broken.pgolf", "--tokenizer", "t"], "artifact: is"),
        (["{folder}", "--top-k", "-1"], "--top-k: -1"),
        (["{folder}", "--temperature", "hot"], "hot: must be a number"),
        (["{folder}", "--temperature", "nan"], "nan"),
        (["{folder}", "--tokenizer", "none.model"], "none.model: there is no such file"),
        (["broken.pgolf"], "--tokenizer: is needed"),
        (["{folder}", "x", "--steps"], "--steps"),
    ],
)
def test_what_a_user_can_mend(arguments, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pgolf").write_bytes(b"PGOLF")
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", *(a.format(folder=folder) for a in arguments)])
    code = runs.command_line(generate.main)
    out, errors = capsys.readouterr()
    assert code == 2 and not out and errors.startswith("error: ") and len(errors.splitlines()) == 1 and words in errors
    assert snapshot(tmp_path) == before


def test_a_temperature_near_zero_is_the_most_likely_token(folder, capsys):
    greedy = run(capsys, folder, "the", "--tokens", 12, "--temperature", 0)
    for temperature in ("1e-40", "5e-324", "1e-300"):
        assert run(capsys, folder, "the", "--tokens", 12, "--temperature", temperature, "--top-k", 0) == greedy
    assert run(capsys, folder, "the", "--tokens", 3, "--temperature", "1e300").startswith("the")


# ------------------------------------------------------------------------------------ other people's terminals


def command(folder, prompt, more=(), **environment):
    """The command in a process of its own, by bytes: (exit code, stdout, stderr)."""
    values = dict(clean_environment({}), CPU_THREADS="1", OMP_NUM_THREADS="1", **environment)
    words = [sys.executable, str(TOOL), str(folder), prompt, "--device", "cpu", *more]
    done = subprocess.run(words, env=values, capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_prompt_of_bytes_that_are_no_text_is_one_line(folder):
    code, out, errors = command(folder, b"caf\xe9", PYTHONUTF8="1")
    assert code == 2 and not out and errors.count(b"\n") == 1
    assert errors.startswith(b"error: PROMPT: must be UTF-8 (") and b"at byte 3" in errors


@pytest.mark.slow
def test_an_ascii_terminal_reads_and_shows_any_text(folder):
    ascii_only = dict(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    code, out, errors = command(folder, "café".encode(), ("--tokens", "2"), **ascii_only)
    assert code == 0 and out.startswith(b"caf\\xe9") and not errors, errors


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_without_a_word(folder):
    line = f'"{sys.executable}" "{TOOL}" "{folder}" "the river" --device cpu --tokens 60 --temperature 3'
    values = dict(clean_environment({}), CPU_THREADS="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -c 5; exit ${{PIPESTATUS[0]}}"], env=values, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, b"the r", b"")
