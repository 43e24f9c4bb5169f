"""tools/export.py: what other programs load computes the same logits."""

import json
import shutil
import sys

import pytest
import torch

import export
import runs
import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, ROOT, TINY, config, launch, snapshot
from test_generate import caseops_tokenizer
from test_golf import code_blocks, load, write_run

try:
    import transformers
except ImportError:
    transformers = None

NEEDS_TRANSFORMERS = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed (pip install -r requirements-tools.txt)"
)
SIZE = {name: TINY[name] for name in ("VOCAB_SIZE", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "TRAIN_SEQ_LEN")}
SIZE |= dict(DEVICE="cpu", COMPUTE_DTYPE="float32", TRAIN_BATCH_TOKENS=768, MICRO_BATCH_TOKENS=256, EVAL_SEQ_LEN=0)
SIZE |= dict(COMPILE=0, MAX_WALLCLOCK_SECONDS=0, TRAIN_SEQ_SCHEDULE="", EVAL_STRIDE=0, TTT_MODE="none", ROPE_DIMS=4)
SIZE |= dict(GPTQ_RESERVE_SECONDS=0, MATRIX_STEPS=0, ROW_STEPS=0, STD_STEPS=1, GUIDED_HESSIANS=0)  # without calibration
ARCHITECTURES = {preset: dict(SIZE, PRESET=preset) for preset in tg.PRESETS}
ARCHITECTURES |= {
    "like record": RECORD_LIKE,
    "like poly5": POLY_LIKE,
    "untied, with gates and key offset": dict(
        TINY, TIE_EMBEDDINGS=0, GATED_ATTN_ENABLED=1, KEY_OFFSET=1, ROPE_DIMS=4, BIGRAM_VOCAB_SIZE=37, BIGRAM_SIGNS=1
    ),
    "output gate and yarn": dict(TINY, ATTN_OUT_GATE_ENABLED=1, ROPE_YARN=1, ROPE_TYPE="rope", EVAL_SEQ_LEN=48),
    "window": dict(TINY, WINDOW_ATTN_SIZE=4, WINDOW_ATTN_LAYERS="1"),
    "one layer": dict(TINY, NUM_LAYERS=1),
}


@pytest.fixture(scope="module")
def plain(data):
    return (data / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Whatever transformers copies stays in the tests' folder, and it asks nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        if transformers:
            patch.setattr(
                transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
            )
        yield


def exported(folder, *options):
    assert export.main([str(folder), *options]) == 0


def test_every_preset_is_tried():
    assert set(tg.PRESETS) == {"demo", "baseline", "record", "poly5", "frontier"}


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_computes_the_same_logits(name, plain, tmp_path):
    c = config(ARCHITECTURES[name])
    folder = write_run(tmp_path / name.replace(",", ""), c, plain)
    model, tokenizer = load(folder, eval_seq_len=c.eval_context)
    export.write(export.hf_files(model, dict(model.gpt.named_parameters())), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    ids = torch.randint(4, 384, (2, c.eval_context), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = ids[0, 9] = tg.BOS_ID
    with torch.no_grad():
        found = theirs(ids).logits
    for row, logits in zip(ids.tolist(), found, strict=True):
        ours = model.logits(row)
        assert (ours - logits).abs().max() < 1e-5 and ours.std() > 0.05
    assert sum(p.numel() for p in theirs.parameters()) == tg.parameter_count(c)


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("kind", ["plain", "caseops"])
def test_transformers_reads_and_writes_the_same_text(kind, plain, tmp_path):
    folder = write_run(tmp_path / "run", config(RECORD_LIKE), plain if kind == "plain" else caseops_tokenizer())
    exported(folder, "--to", "hf", "--out", str(tmp_path / "hf"))
    model, ours = load(folder)
    for place in (tmp_path / "hf", tmp_path / "again"):
        theirs = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=True)
        for text in ("the river", " The HTTP café\n\n of <s> 😀 McDonald", "", "a\ue001b"):
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text) and theirs.decode(ids, skip_special_tokens=True) == text, text
        assert len(theirs) == 384
        theirs.save_pretrained(tmp_path / "again")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    texts = ["the river", "the river was quiet and the"]
    for side, last in (("left", -1), ("right", len(ours.encode(texts[0])) - 1)):
        batch = theirs(texts, return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            logits = network(**batch).logits
        assert (logits[0, last] - model.logits(ours.encode(texts[0]))[-1]).abs().max() < 1e-5
    prompt = theirs("the river", return_tensors="pt")
    silent = sorted({*ours.silent.tolist(), *ours.bytes})  # transformers does not know which bytes break a character
    model.tokenizer.unfit_after[b""] = torch.tensor(silent)
    written = network.generate(**prompt, max_new_tokens=40, do_sample=False, suppress_tokens=silent)[0]
    text = theirs.decode(written, skip_special_tokens=True)
    assert text == model.generate("the river", tokens=40, temperature=0)  # beyond the context of 32, too


@NEEDS_TRANSFORMERS
def test_transformers_generates_in_every_usual_way(plain, tmp_path):
    """With and without a cache, which the model does not have; in batches, by beams, and in a pipeline."""
    exported(write_run(tmp_path / "run", config(RECORD_LIKE), plain), "--to", "hf", "--out", str(tmp_path / "hf"))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    texts, options = ["the river", "the river was quiet and the"], dict(max_new_tokens=6, do_sample=False)
    alone = [network.generate(**tokenizer(t, return_tensors="pt"), **options)[0, -6:].tolist() for t in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for use_cache in (True, False):
        assert network.generate(**batch, use_cache=use_cache, **options)[:, -6:].tolist() == alone
    beams = network.generate(**batch, num_beams=2, num_return_sequences=2, **options)
    assert beams.shape[0] == 4 and beams[:, : batch["input_ids"].shape[1]].tolist()[::2] == batch["input_ids"].tolist()
    write = transformers.pipeline("text-generation", model=network, tokenizer=tokenizer)
    (found,) = write("the river", **options)
    assert found["generated_text"].startswith("the river")


@NEEDS_TRANSFORMERS
def test_transformers_trains_and_saves_it(plain, tmp_path):
    folder = write_run(tmp_path / "run", config(POLY_LIKE), plain)
    exported(folder, "--to", "hf", "--out", str(tmp_path / "hf"))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = torch.tensor([load(folder)[1].encode("the river was quiet and the captain")])
    loss = network(ids, labels=ids).loss
    assert loss.item() == pytest.approx(load(folder)[0].losses(ids[0].tolist()).mean(), abs=1e-5)
    loss.backward()
    assert network.golf.qo_bank.grad.abs().sum() > 0
    with torch.no_grad():
        network.golf.qo_bank.sub_(0.01)
    network.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, network.eval()(ids).logits)
    with pytest.raises(ValueError, match="33 tokens: the context holds 32"):
        network(torch.ones(1, 33, dtype=torch.int64))


@NEEDS_TRANSFORMERS
@pytest.mark.slow
def test_the_pages_example_runs(plain, tmp_path):
    """docs/model.md's second example, as it stands, in a process that does not know this repository."""
    folder = write_run(tmp_path / "logs" / "RUN", config(TINY), plain)
    exported(folder, "--to", "hf")
    (tmp_path / "example.py").write_text(code_blocks("python")[1])
    values = dict(HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1, PYTHONPATH="")
    done = launch(tmp_path / "example.py", values, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("The function returns"), done.stderr


def test_safetensors_hold_the_weights_the_settings_and_the_tokenizer(plain, tmp_path):
    c = config(RECORD_LIKE)
    folder = write_run(tmp_path / "run", c, plain)
    before = snapshot(folder)
    exported(folder, "--to", "safetensors")
    out = folder / "safetensors"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (out / "tokenizer.model").read_bytes() == plain
    settings = json.loads((out / "config.json").read_text())
    assert settings == json.loads(tg.to_json(tg.dataclasses.asdict(c.model)))
    own = dict(load(folder)[0].gpt.named_parameters())
    found = read_safetensors(out / "model.safetensors")
    assert set(found) == set(own) and all(torch.equal(found[name], own[name]) for name in own)
    shutil.rmtree(out)
    assert snapshot(folder) == before


def read_safetensors(path):
    """The tensors of a file, read as its description says; by the package too, where it is installed."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    assert table.pop("__metadata__") == {"format": "pt"} and size % 8 == 0
    found = {}
    for name, row in table.items():
        begin, end = row["data_offsets"]
        part = bytearray(data[8 + size + begin : 8 + size + end])
        found[name] = torch.frombuffer(part, dtype=torch.float32).view(row["shape"])
    if transformers:
        from safetensors.torch import load_file

        theirs = load_file(path)
        assert theirs.keys() == found.keys() and all(torch.equal(theirs[name], found[name]) for name in found)
    return found


def test_float_exports_the_weights_of_before_quantization(plain, tmp_path):
    c = config(TINY)
    folder = write_run(tmp_path / "run", c, plain)
    weights = {name: p.detach() for name, p in build_weights(c).items()}
    tg.write_tensors(folder / "weights.safetensors", weights, {})
    exported(folder, "--to", "safetensors", "--float")
    found = read_safetensors(folder / "safetensors" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def build_weights(c):
    return dict(tg.new_model(c).named_parameters())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{run}", "--to", "gguf"], "--to gguf: GGUF holds no graph"),
        (["{run}", "--to", "onnx"], "onnx"),
        (["{run}"], "--to"),
        (["{run}", "--to", "hf", "--float"], "SAVE_WEIGHTS=1"),
        (["{run}", "--to", "hf", "--out", "full"], "must be new or an empty folder"),
        (["nothing", "--to", "hf"], "nothing: there is no such artifact"),
        (["{run}", "--to", "safetensors", "--tokenizer", "nothing"], "there is no such file"),
    ],
)
def test_what_a_user_can_mend(arguments, words, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", config(RECORD_LIKE), plain)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", *(a.format(run=folder) for a in arguments)])
    code = runs.command_line(export.main)
    out, errors = capsys.readouterr()
    assert code == 2 and not out and len(errors.splitlines()) == 1 and words in errors
    assert snapshot(tmp_path) == before


def test_the_reason_against_gguf_names_what_is_in_the_model(plain, tmp_path):
    problems = {name: export.gguf_problem(config(ARCHITECTURES[name])) for name in ("one layer", "like record")}
    assert "U-Net" not in problems["one layer"] and "repeated" not in problems["one layer"]
    assert all(word in problems["like record"] for word in ("U-Net", "repeated", "in parallel", "smear"))


def test_the_modeling_file_needs_torch_and_transformers_alone():
    source = export.modeling_source()
    compile(source, "modeling_golf.py", "exec")
    roots = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert roots - sys.stdlib_module_names == {"torch", "transformers", "numpy", ""} - {"numpy"} | roots & {"numpy"}
    assert "triton" not in roots and str(ROOT) not in source
