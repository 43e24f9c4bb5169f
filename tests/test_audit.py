"""The audit finds copies of documents and shared windows as plain references do, and the command records them."""

import ast
import json
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import (
    ROOT,
    audit_of,
    config,
    documents_of,
    examples,
    full_manifest,
    launch,
    make_documents,
    plant,
    shards_of,
    snapshot,
    write_shard,
    write_sidecars,
    write_split,
)

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import audit  # noqa: E402
import audit_data  # noqa: E402
from errors import PrepareError  # noqa: E402


@pytest.fixture
def copy(data, tmp_path):
    """A copy of the data that a test may damage."""
    return shutil.copytree(data, tmp_path / "data")


def test_modules_of_data_import_each_other_in_no_circle():
    """By their syntax trees, so that imports for type checkers alone and imports inside functions count too."""
    files = {path.stem: path for path in (ROOT / "data").glob("*.py")}
    imports = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imports[name] = named & set(files)
    assert not [name for name, named in imports.items() if "prepare" in named] and len(imports) > 8
    while leaves := [name for name, named in imports.items() if not named & set(imports)]:
        for name in leaves:
            del imports[name]
    assert not imports, f"imported in a circle: {imports}"


# --------------------------------------------------------------------------------------------------- shared documents


# Few letters and short documents, so that many are equal, many have the same key, and some are empty.
DOCUMENTS = st.lists(st.lists(st.integers(4, 6), max_size=12), min_size=2, max_size=12)


@examples(max_examples=120)
@given(DOCUMENTS, DOCUMENTS, st.sets(st.integers(0, 120), max_size=6))
def test_shared_documents_are_those_of_a_plain_set(tmp_path_factory, training, validation, cuts):
    folder = tmp_path_factory.mktemp("shards")
    write_split(folder, "train", training, cuts)
    write_split(folder, "val", validation, {cut // 2 for cut in cuts})
    found = audit_of(folder, threads=2)
    texts = {tuple(d) for d in training if d}, {tuple(d) for d in validation if d}
    assert found["shared_documents"] == sum(tuple(d) in texts[0] for d in validation)
    assert found["shared_copies"] == sum(tuple(d) in texts[1] for d in training)


@pytest.mark.parametrize("planted", [[7], [7, 8, 9], list(range(4, 12)), list(range(4, 13)), list(range(4, 400))])
@pytest.mark.parametrize("place", [0, 20, 40])
def test_a_planted_document_of_any_length_is_found_wherever_a_shard_ends_in_it(place, planted, tmp_path):
    generator = np.random.default_rng(3)
    training, validation = ([generator.integers(400, 2000, 60).tolist() for _ in range(n)] for n in (40, 9))
    write_split(tmp_path, "val", [*validation[:4], planted, *validation[4:]])
    begin = 61 * place
    for cut in sorted({begin, begin + 1, begin + 2, begin + len(planted), begin + len(planted) + 1}):
        for path in shards_of(tmp_path, "train"):
            path.unlink()
        write_split(tmp_path, "train", [*training[:place], planted, *training[place:]], {cut, 600})
        found = audit_of(tmp_path)
        assert (found["shared_documents"], found["shared_copies"]) == (1, 1)


def test_nearly_equal_documents_are_not_shared(tmp_path):
    """One token more, less, or other, at any place: of the same key or of another."""
    document = np.random.default_rng(1).integers(4, 2000, 100).tolist()
    near = [document[:-1], document + [4], document[1:]]
    near += [[*document[:i], (document[i] + 1) % 1000 + 4, *document[i + 1 :]] for i in range(100)]
    write_split(tmp_path, "val", [document, document])
    write_split(tmp_path, "train", near)
    assert audit_of(tmp_path)["shared_documents"] == 0
    write_split(tmp_path, "train", [*near, document, document, document])
    found = audit_of(tmp_path)
    assert (found["shared_documents"], found["shared_copies"]) == (2, 3)


# ------------------------------------------------------------------------------------------------------ shared windows


def shared_windows(training, validation, length):
    """The positions (document, first token) of validation's windows that training has too."""

    def windows(document):
        return [tuple(document[i : i + length]) for i in range(len(document) - length + 1)]

    seen = {window for document in training for window in windows(document)}
    return [(d, i) for d, document in enumerate(validation) for i, w in enumerate(windows(document)) if w in seen]


@examples(max_examples=80)
@given(
    st.lists(st.lists(st.integers(4, 5), max_size=40), min_size=2, max_size=6),
    st.lists(st.lists(st.integers(4, 5), max_size=40), min_size=2, max_size=6),
    st.sets(st.integers(0, 100), max_size=4),
    st.sampled_from([(6, 3), (7, 3), (8, 4)]),
    st.integers(9, 40),
)
def test_shared_windows_are_those_of_a_plain_set(tmp_path_factory, training, validation, cuts, lengths, block):
    folder = tmp_path_factory.mktemp("shards")
    write_split(folder, "train", training, cuts)
    write_split(folder, "val", validation)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", lengths[0]), ("ANCHOR", lengths[1]), ("BLOCK", block)):
            patch.setattr(audit, name, value)
        row = audit_of(folder)["windows"]
    expected = shared_windows(training, validation, lengths[0])
    assert (row["shared"], row["documents"]) == (len(expected), len({d for d, _ in expected}))
    assert row["of"] == sum(max(0, len(d) - lengths[0] + 1) for d in validation)


@pytest.mark.parametrize("length", [49, 50, 51, 80])
@pytest.mark.parametrize("shift", [0, 1, 24, 25, 26, 49])
def test_a_planted_window_of_50_tokens_is_found_and_one_of_49_is_not(shift, length, tmp_path):
    generator = np.random.default_rng(5)
    training, validation = ([generator.integers(4, 2000, 300).tolist() for _ in range(5)] for _ in range(2))
    training[2][100 : 100 + length] = validation[3][shift : shift + length]
    write_split(tmp_path, "train", training, {2 * 301 + 130})  # a shard ends in it
    write_split(tmp_path, "val", validation)
    found = audit_of(tmp_path)
    assert found["windows"] == dict(length=50, of=5 * 251, shared=max(0, length - 49), documents=int(length >= 50))
    assert found["shared_documents"] == 0


def test_a_line_that_repeats_a_thousand_times_is_no_trouble(tmp_path):
    line = [7] * 2000
    write_split(tmp_path, "train", [[8, *line], line, [9] * 60])
    write_split(tmp_path, "val", [[10, *line], [*line, 11], [9] * 49])
    row = audit_of(tmp_path)["windows"]
    assert (row["shared"], row["documents"], row["of"]) == (2 * 1951, 2, 2 * 1952)


@pytest.mark.parametrize("training", [[[]], [[], []]])
def test_shards_without_text_share_nothing(training, tmp_path):
    write_split(tmp_path, "train", training, {0} if len(training) > 1 else ())
    write_split(tmp_path, "val", [[], []])
    found = audit_of(tmp_path)
    assert (found["shared_documents"], found["windows"]["of"], found["windows"]["shared"]) == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------- the digests


def test_an_audit_holds_the_digest_of_every_file_that_it_read(copy):
    write_shard(copy / "fineweb_val_bytes_000000.bin", [0, 1])
    found, names = audit_of(copy), sorted(path.name for path in copy.glob("fineweb_*.bin"))
    assert list(found["sha256"]) == names and len(names) == 6
    assert found["sha256"] == {name: tg.sha256_of(copy / name) for name in names}


def test_an_audit_of_listed_files_refuses_one_that_was_changed(copy):
    splits = full_manifest(copy)["splits"]
    assert audit.audit_splits(splits, copy.joinpath) == audit_of(copy)
    path = copy / "fineweb_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(PrepareError, match=rf"{path}: was changed after its SHA-256 was taken"):
        audit.audit_splits(splits, copy.joinpath)


def test_a_file_that_is_no_shard_is_named(copy):
    (copy / "fineweb_val_000001.bin").write_bytes(b"short")
    with pytest.raises(PrepareError, match="fineweb_val_000001.bin: not a shard"):
        audit_of(copy)


def test_an_error_ends_the_other_threads(copy, monkeypatch):
    """A failure of the first shard stops the search of the others within a block."""
    write_shard(copy / "fineweb_train_000003.bin", np.full(1 << 20, 7))
    searched, original = [], audit.WindowIndex.search

    def search(self, stream, begin, end):
        searched.append(begin)
        if begin == 0:
            raise OSError("gone")
        return original(self, stream, begin, end)

    monkeypatch.setattr(audit.WindowIndex, "search", search)
    with pytest.raises(OSError, match="gone"):
        audit_of(copy)
    assert len(searched) < 8


# ---------------------------------------------------------------------------------------------------------- the command


def audit_in(folder):
    return json.loads((folder / "manifest.json").read_text())["audit"]


def test_the_command_prints_a_table_and_records_the_audit(copy, capsys):
    manifest = full_manifest(copy)
    assert audit_data.main([str(copy)], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["split", "shards", "hashed", "documents", "tokens", "bytes"]
    train, val = (line.replace(",", "").split() for line in lines[1:3])
    expected = manifest["splits"]
    assert train[:5] == ["train", "3", "3", "400", str(expected["train"]["tokens"])]
    assert val == ["val", "2", "2", "40", str(expected["val"]["tokens"]), str(expected["val"]["bytes"])]
    assert "0 validation documents" in lines[3] and "windows of 50 tokens" in lines[4]
    assert lines[5:7] == [f"written: {copy / 'manifest.json'}", lines[6]] and lines[6].startswith("0 findings")
    written = json.loads((copy / "manifest.json").read_text())
    assert written.pop("audit") == audit_of(copy) and written == manifest
    assert not list(copy.glob("*.part"))


def test_an_earlier_audit_is_replaced_whatever_it_holds(copy, capsys):
    manifest = full_manifest(copy)
    for earlier in ("text", {"windows": 3}, dict(audit_of(copy), shared_documents=7)):
        (copy / "manifest.json").write_text(json.dumps(dict(manifest, audit=earlier)))
        assert audit_data.main([str(copy)], {}) == 0, capsys.readouterr()
        assert audit_in(copy) == audit_of(copy)


@pytest.mark.parametrize("with_sidecars", [False, True])
def test_a_folder_without_a_manifest_gets_one(with_sidecars, copy, capsys):
    """As of the challenge's published shards: what can be known, and a run finds it right."""
    expected = full_manifest(copy)
    (copy / "manifest.json").unlink()
    if with_sidecars:
        write_sidecars(copy)
    assert audit_data.main([str(copy)], {}) == 0
    written = json.loads((copy / "manifest.json").read_text())
    for split, row in expected["splits"].items():
        shown = written["splits"][split]
        assert (shown["tokens"], shown["documents"]) == (row["tokens"], row["documents"])
        assert [(s["file"], s["tokens"], s["sha256"]) for s in shown["shards"]] == [
            (s["file"], s["tokens"], s["sha256"]) for s in row["shards"]
        ]
    assert written["tokenizer"]["sha256"] == expected["tokenizer"]["sha256"]
    assert written["audit"] == audit_of(copy)
    assert ("sidecars" in written["splits"]["val"]) == with_sidecars == ("bytes" not in written["splits"]["train"])
    if not with_sidecars:
        assert written["splits"]["val"]["bytes"] == expected["splits"]["val"]["bytes"]
    capsys.readouterr()
    assert audit_data.main([str(copy)], {}) == 0 and "no manifest" not in capsys.readouterr().out


def test_without_a_tokenizer_one_line_says_what_to_do(copy, capsys):
    (copy / "manifest.json").unlink()
    (copy / "tokenizer.model").rename(copy.parent / "other.model")
    before = snapshot(copy)
    assert audit_data.main([str(copy)], {}) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("error: TOKENIZER_PATH=") and snapshot(copy) == before
    assert audit_data.main([str(copy)], dict(TOKENIZER_PATH=str(copy.parent / "other.model"))) == 0
    assert audit_in(copy) == audit_of(copy)


def test_what_training_shares_is_recorded_and_a_finding(copy, capsys):
    plant(copy)
    assert audit_data.main([str(copy)], {}) == 2
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finding: ")]
    assert len(found) == 1 and found[0].startswith("finding: ALLOW_SHARED_DOCUMENTS=0: 1 of 40 validation documents")
    assert audit_in(copy) == audit_of(copy) and audit_in(copy)["shared_documents"] == 1
    assert audit_data.main([str(copy)], dict(ALLOW_SHARED_DOCUMENTS="1")) == 0


def test_a_shard_that_changes_during_the_audit_is_named_and_nothing_is_written(copy, capsys, monkeypatch):
    original = audit.audit_shards

    def slow(*arguments):
        found = original(*arguments)
        path = copy / "fineweb_train_000002.bin"
        path.write_bytes(path.read_bytes())
        return found

    monkeypatch.setattr(audit, "audit_shards", slow)
    before = (copy / "manifest.json").read_bytes()
    assert audit_data.main([str(copy)], {}) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {copy / 'fineweb_train_000002.bin'}: was rewritten during the audit")
    assert (copy / "manifest.json").read_bytes() == before


def test_the_command_counts_trainings_bytes(copy, capsys):
    manifest, model = full_manifest(copy), tg.Vocabulary(config(DATA_PATH=copy)).model
    manifest["splits"]["train"]["bytes"] = sum(len(model.decode(d).encode()) for d in documents_of(copy, "train"))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert audit_data.main([str(copy)], {}) == 0, capsys.readouterr().out
    manifest["splits"]["train"]["bytes"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert audit_data.main([str(copy)], {}) == 2
    assert f"says {manifest['splits']['train']['bytes']} bytes in the train shards" in capsys.readouterr().out


def test_the_command_lists_every_finding_and_leaves_the_folder_alone(copy):
    full_manifest(copy)
    plant(copy)
    before = snapshot(copy)
    done = launch(ROOT / "tools" / "audit_data.py", {}, copy)
    assert done.returncode == 2 and done.stderr == "" and snapshot(copy) == before
    lines = [line for line in done.stdout.splitlines() if line.startswith("finding: ")]
    assert len(lines) == 5  # the shard's hash, tokens and documents, and the split's two counts


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda d: (d / "fineweb_val_000000.bin").write_bytes(b"short"),
            "fineweb_val_000000.bin: is not a token shard",
        ),
        (lambda d: [p.unlink() for p in d.glob("fineweb_train_*")], "holds no fineweb_train_"),
        (lambda d: write_shard(tg.sidecar_path(d / "fineweb_val_000000.bin"), [1, 2]), "does not hold the byte counts"),
    ],
)
def test_the_command_names_what_cannot_be_read(damage, words, copy, capsys):
    damage(copy)
    assert audit_data.main([str(copy)], {}) == 2
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("finding: ") and words in line]) == 1


@pytest.mark.parametrize(
    "arguments, words", [([], "make audit-data"), (["a", "b"], "make audit-data"), (["no/such"], "DATA=no/such")]
)
def test_the_command_says_how_it_is_used(arguments, words, capsys):
    assert audit_data.main(arguments, {}) == 2
    assert words in capsys.readouterr().err


def test_a_prepared_folder_passes_with_its_sidecars_and_every_file_is_under_a_hash(tmp_path):
    """What data/prepare.py writes, case operators included; then a flipped bit in each file that it lists."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(make_documents(3, 60)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text.title() + f" {number}")
    done = launch(
        ROOT / "data" / "prepare.py",
        {},
        tmp_path / "texts",
        "--out",
        tmp_path / "out",
        "--vocab-size",
        330,
        "--caseops",
        "--val-fraction",
        0.2,
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    c = config(VOCAB_SIZE=330, DATA_PATH=out)
    recorded = audit_in(out)
    assert recorded == audit_of(out) and recorded["windows"]["of"] > 0
    check, problems = audit_data.audited(c)
    assert problems == [] and check.rows["val"]["bytes"] > 0 and "bytes" not in check.rows["train"]
    assert audit_in(out) == recorded
    names = [p.name for p in out.iterdir() if p.name != "manifest.json"]
    assert any("bytes" in name for name in names) and len(names) >= 4
    for name in names:
        content = bytearray((out / name).read_bytes())
        content[-1] ^= 1
        (out / name).write_bytes(content)
        assert any(f"{out / name}: was changed" in problem for problem in audit_data.audited(c)[1])
        content[-1] ^= 1
        (out / name).write_bytes(content)
