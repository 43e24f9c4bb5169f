"""tools/pack_code.py: the packed script does what the readable one does, to the last bit, and counts its own bytes."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    RECORD_LIKE,
    ROOT,
    SCRIPT,
    built_once,
    clean_environment,
    examples,
    fork,
    fork_script,
    launch,
    run_command,
    snapshot,
    tg,
)

sys.path.insert(0, str(ROOT / "tools"))
import pack_code  # noqa: E402

TOOL = ROOT / "tools" / "pack_code.py"
RUN = dict(RECORD_LIKE, ITERATIONS=3, TRAIN_LOG_EVERY=0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed script, alone in a folder, as the command makes it."""

    def build(folder):
        done = launch(TOOL, dict(PYTHONHASHSEED=2), "--out", folder / "train_gpt.py")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert f"{(folder / 'train_gpt.py').stat().st_size} bytes" in done.stdout

    return built_once(tmp_path_factory, "packed", build) / "train_gpt.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, data):
    """A folder with the artifact of a short training, and nothing else."""

    def build(folder):
        done = fork_script(dict(RUN, DATA_PATH=data, RUN_ID="run"), "--mode", "train", cwd=folder)
        assert done.returncode == 0, done.stderr
        shutil.move(folder / "logs" / "run" / "model.pgolf", folder)
        shutil.rmtree(folder / "logs")

    return built_once(tmp_path_factory, "artifact_to_pack", build)


def evaluate(script, artifact, data, folder, ranks=1, forked=True, **knobs):
    """MODE=eval by a script from an empty folder: (the process, its summary)."""
    (folder / "empty").mkdir(parents=True)
    shutil.copytree(artifact, folder / "run")
    values = dict(
        PRESET="record",
        MODE="eval",
        ARTIFACT_DIR=folder / "run",
        DATA_PATH=data,
        CPU_THREADS=1,
        COMPUTE_DTYPE="bfloat16",
        VAL_BATCH_SIZE=2048,
        DEVICE="cpu",
        **knobs,
    )
    done = (fork if forked else launch)(script, values, ranks=ranks, cwd=folder / "empty")
    assert not list((folder / "empty").iterdir()) and (folder / "run" / "eval_summary.json").is_file(), done.stderr
    return done, json.loads((folder / "run" / "eval_summary.json").read_text())


def test_both_forms_score_the_same_and_count_the_same_bytes(packed, artifact, data, tmp_path):
    plain_run, plain = evaluate(SCRIPT, artifact, data, tmp_path / "plain")
    run, ours = evaluate(packed, artifact, data, tmp_path / "packed", forked=False)
    same = ("val_bpb", "val_loss", "val_tokens", "val_bytes", "code_bytes", "model_bytes", "artifact_bytes")
    assert {name: ours[name] for name in same} == {name: plain[name] for name in same}
    assert ours["code_bytes"] == packed.stat().st_size
    assert (plain["code_form"], ours["code_form"]) == ("packed by tools/pack_code.py", "as it runs")
    for done, summary in ((plain_run, plain), (run, ours)):
        assert done.returncode == 0 and f"code {summary['code_form']}\n" in done.stdout
        assert f"(code {packed.stat().st_size} + model {summary['model_bytes']})" in done.stdout


def test_the_packed_script_runs_on_two_ranks(packed, artifact, data, tmp_path):
    done, summary = evaluate(packed, artifact, data, tmp_path, ranks=2)
    assert done.returncode == 0 and "2 ranks" in summary["hardware"] and summary["code_bytes"] == packed.stat().st_size


def test_the_packed_script_trains_the_same_artifact(packed, artifact, data, tmp_path):
    done = fork(packed, dict(RUN, DATA_PATH=data, RUN_ID="run"), "--mode", "train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs" / "run" / "model.pgolf").read_bytes() == (artifact / "model.pgolf").read_bytes()


def test_an_artifact_over_its_limit_fails_and_says_by_how_much(packed, artifact, data, tmp_path):
    size = packed.stat().st_size + (artifact / "model.pgolf").stat().st_size
    done, _ = evaluate(packed, artifact, data, tmp_path, ARTIFACT_LIMIT_BYTES=size - 1)
    assert done.returncode == 1 and f"1 bytes over ARTIFACT_LIMIT_BYTES={size - 1}" in done.stdout


def test_help_and_plan_are_those_of_the_readable_script(packed, tmp_path, capsys, monkeypatch):
    """But for what knobs mean, which would take 6 KB of the artifact's bytes; --help says where to read it."""
    monkeypatch.chdir(tmp_path)
    assert tg.main(["--dry-run"], clean_environment(RUN)) == 0
    expected = capsys.readouterr()
    done = fork(packed, RUN, "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.out, expected.err)
    meanings = sorted((f.metadata["meaning"] for f in dataclasses.fields(tg.Config)), key=len, reverse=True)
    readable = [line.removesuffix(next(filter(line.endswith, meanings), "")) for line in tg.help_text().splitlines()]
    shown = fork(packed, RUN, "--help", cwd=tmp_path)
    lines = shown.stdout.splitlines()
    (told,) = (n for n, line in enumerate(lines) if line.startswith("docs/knobs.md says what"))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert lines[:told] + lines[told + 1 :] == [line.rstrip() for line in readable]
    assert not list(tmp_path.iterdir())


def test_a_traceback_names_functions_and_shows_lines(tmp_path):
    """And nothing of the packed bytes: an uncaught error deep in a copy of the script with an error planted."""
    source, head = SCRIPT.read_text(), "def help_text() -> str:\n"
    assert source.count(head) == 1
    planted = source.replace(head, head + "    help_text.planted\n")
    (tmp_path / "packed.py").write_bytes(pack_code.pack(planted.encode()))
    done = launch(tmp_path / "packed.py", {}, "--help")
    assert done.returncode == 1 and len(done.stderr) < 3000 and done.stderr.isascii(), done.stderr
    assert re.search(r"in main\n.*help_text\(\)", done.stderr)
    assert re.search(r"in help_text\n.*help_text\.planted", done.stderr)
    assert done.stderr.endswith("AttributeError: 'function' object has no attribute 'planted'\n")


IMPORTED = """
import os, sys
before = dict(os.environ), sys.excepthook, os.listdir()
sys.path.insert(0, sys.argv[1])
import inspect, torch, train_gpt as t
assert t.__file__.startswith(sys.argv[1]) and t.__name__ == "train_gpt"
assert before == (dict(os.environ), sys.excepthook, os.listdir())
for name, value in vars(t).items():
    if inspect.isfunction(value) and value.__module__ == "train_gpt" and value.__name__ == name:
        assert f"def {name}(" in inspect.getsource(value), name
sys.path.insert(0, sys.argv[2])
from helpers import build_model, config, random_batch
c = config(NUM_LAYERS=1, COMPUTE_DTYPE="float64")
model, batch = build_model(c), random_batch(c, 2, 32)
compiled = torch.compile(model, backend="eager", fullgraph=True)
assert torch.allclose(*(f(*batch, looped=False)[0] for f in (model, compiled)))
"""


def test_importing_it_does_nothing_and_it_compiles_as_one_graph(packed, tmp_path):
    command = [sys.executable, "-c", IMPORTED, str(packed.parent), str(ROOT / "tests")]
    done = run_command(command, cwd=tmp_path, env=clean_environment({}))
    assert done.returncode == 0, done.stderr


KERNELS = """
import runpy, sys
_, folder, *sys.argv = sys.argv
sys.path.insert(0, folder)
import train_gpt
assert train_gpt.__file__.startswith(folder)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(tg.triton is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "name, interpreted", [("cross_entropy_edges", 1), ("mlp_edges", 1), ("two_cubins", 0), ("one_graph", 0)]
)
def test_the_packed_kernels_pass_the_kernels_tests(name, interpreted, packed, tmp_path):
    """The checks of test_triton_kernels.py, on the packed module; two cubins, because all sources are the same."""
    environment = clean_environment(
        dict(
            TRITON_INTERPRET=interpreted,
            OMP_NUM_THREADS=1,
            PYTHONWARNINGS="ignore",
            TRITON_CACHE_DIR=tmp_path,
            PYTHONPATH=ROOT / "tests",
        )
    )
    command = [sys.executable, "-c", KERNELS, packed.parent, ROOT / "tests" / "test_triton_kernels.py", name]
    done = run_command(command, env=environment)
    assert done.returncode == 0, done.stderr


def unpacked(content):
    """The source text in a packed script."""
    codec = re.search(rb"traceback,(\w+) as _", content)[1].decode()
    literal = next(
        node
        for node in ast.walk(ast.parse(content))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 1000
    )
    return __import__(codec).decompress(literal.value.encode("latin-1")).decode()


def jit_functions(tree):
    """What Triton compiles of a module: the code of each of its functions, without docstrings."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            node.body = node.body[ast.get_docstring(node) is not None :]
            found[node.name] = ast.unparse(node)
    return found


def test_what_is_taken_out_and_what_stays(packed):
    before, after = (ast.parse(text) for text in (SCRIPT.read_text(), unpacked(packed.read_bytes())))
    named = (ast.FunctionDef, ast.ClassDef)
    names, kept = ([n.name for n in ast.walk(tree) if isinstance(n, named)] for tree in (before, after))
    assert names == kept
    assert not any(ast.get_docstring(n) for n in ast.walk(after) if isinstance(n, (*named, ast.Module)))
    kernels = [jit_functions(tree) for tree in (before, after)]
    assert kernels[0] == kernels[1] and sum(name.endswith("_kernel") for name in kernels[0]) > 9
    assert all("tl.constexpr" in source for source in kernels[0].values())
    assert packed.stat().st_size < SCRIPT.stat().st_size / 4


def test_the_same_script_gives_the_same_bytes(packed, tmp_path):
    done = launch(TOOL, dict(PYTHONHASHSEED=1), SCRIPT, "--out", tmp_path / "again.py")  # the fixture's has another
    assert done.returncode == 0 and (tmp_path / "again.py").read_bytes() == packed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.py"]
    assert pack_code.pack(packed.read_bytes()) == packed.read_bytes()


@examples(max_examples=200)
@given(st.binary(max_size=60) | st.text("\0\r\n\\'\"07{\x1a\x0c\x85", max_size=30).map(lambda s: s.encode("latin-1")))
def test_any_bytes_survive_as_a_literal(data):
    names = {}
    exec(compile(pack_code.HEADER + b"x='''" + pack_code.literal(data) + b"'''\n", "packed", "exec"), names)
    assert names["x"].encode("latin-1") == data


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_the_smallest_compression_that_reads_back_is_taken(size):
    text = "".join(hashlib.sha256(b"%d" % i).hexdigest() for i in range(-(-size // 64)))
    content = pack_code.pack(f"x = '{text}'".encode())
    candidates = pack_code.compressions(pack_code.minify(f"x = '{text}'").encode())
    assert len(content) <= 400 + min(len(pack_code.literal(data)) for data in candidates.values())
    names = dict(__file__="here.py", __name__="here")
    exec(compile(content, "packed", "exec"), names)
    assert names["x"] == text


def test_lines_are_the_interpreters_where_text_has_other_line_ends(tmp_path):
    """Form feeds and Unicode's separators end no line of Python's: a function's text is its own after them too."""
    source = "x = 'a\u2028b\u2029c\x85d\x0ce'\ndef f(long_name: int) -> int:\n    return long_name + 1\n"
    (tmp_path / "oddly.py").write_bytes(pack_code.pack(source.encode()))
    spec = importlib.util.spec_from_file_location("oddly", tmp_path / "oddly.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert inspect.getsource(module.f).startswith("def f(") and module.f(1) == 2
    assert module.x == "a\u2028b\u2029c\x85d\x0ce"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing.py"], "missing.py"),
        (["words.txt"], "words.txt: is not a Python script"),
        (["binary.py"], "binary.py: is not a Python script"),
        (["folder"], "folder"),
        (["fine.py", "--out", "fine.py"], "would be written over"),
        (["fine.py", "--out", "words.txt/x.py"], "words.txt"),
        (["fine.py", "--out", "folder"], "folder"),
    ],
)
def test_what_a_user_can_mend(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("these are words\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\0")
    (tmp_path / "fine.py").write_text("x = 1\n")
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    code = pack_code.main(arguments)
    out, errors = capsys.readouterr()
    assert code == 2 and not out and len(errors.splitlines()) == 1 and errors.startswith("error: ") and words in errors
    assert snapshot(tmp_path) == before


def test_without_the_minifier(monkeypatch, tmp_path, capsys):
    """The command says what to install; a run counts the readable script, and says so."""
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    assert pack_code.main([str(SCRIPT), "--out", str(tmp_path / "out.py")]) == 2
    assert "requirements.txt" in capsys.readouterr().err and not list(tmp_path.iterdir())
    size, form = tg.shipped_code.__wrapped__()
    assert size == SCRIPT.stat().st_size and form.startswith("not packed") and "python_minifier" in form


def test_a_script_without_the_packer_counts_as_it_is(tmp_path, monkeypatch):
    shutil.copy(SCRIPT, tmp_path)
    monkeypatch.setattr(tg, "__file__", str(tmp_path / "train_gpt.py"))
    assert tg.shipped_code.__wrapped__() == (SCRIPT.stat().st_size, "as it runs")


def test_a_script_is_packed_once_for_each_version(tmp_path, monkeypatch):
    """The cache holds what was packed; a damaged file of it, another source, or no place for it packs anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pack_code, "WORTH", 0)
    packed_anew, made = pack_code.packed_anew, []
    monkeypatch.setattr(pack_code, "packed_anew", lambda source: made.append(source) or packed_anew(source))
    first = pack_code.pack(b"value = 1\n")
    assert pack_code.pack(b"value = 1\n") == first == packed_anew(b"value = 1\n") and len(made) == 1
    assert pack_code.pack(b"value = 2\n") != first and len(made) == 2
    (file,) = [path for path in (tmp_path / "pack_code").iterdir() if first in path.read_bytes()]
    file.write_bytes(file.read_bytes()[:-1])
    assert pack_code.pack(b"value = 1\n") == first and len(made) == 3
    for number in range(pack_code.KEPT + 3):
        pack_code.pack(b"value = %d\n" % (10 + number))
    assert len([*(tmp_path / "pack_code").iterdir()]) == pack_code.KEPT
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pack_code.pack(b"value = 1\n") == first
