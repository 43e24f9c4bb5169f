"""The audit: what a run refuses to train on, found by one pass over the shards, against plain references."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import ROOT, TINY, config, examples, launch, run_script, single_run, snapshot, strings, write_shard

sys.path.insert(0, str(ROOT / "tools"))
import audit_data  # noqa: E402

BOS = tg.BOS_ID
RUN = dict(TINY, ITERATIONS=1, GPTQ_CALIBRATION_BATCHES=1, RUN_ID="run")


def write_split(folder, split, documents, cuts=()):
    """Shards of documents (lists of tokens without BOS), cut at these places of the stream."""
    stream = np.array([token for document in documents for token in (BOS, *document)], np.uint16)
    for number, part in enumerate(np.split(stream, sorted(cuts))):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", part)


def audit_of(folder, **knobs):
    """The audit of a folder's two splits."""
    c = config(**{"VOCAB_SIZE": 2000, **knobs}, DATA_PATH=folder)
    audit = tg.Audit(c, single_run())
    validation = tg.TokenStream(c, "val")
    audit.validation(validation)
    audit.training(tg.TokenStream(c, "train"), validation)
    return audit


def findings(audit):
    return [str(tg.ConfigError(*finding)) for finding in audit.findings]


def shards(data, split):
    return sorted(data.glob(f"fineweb_{split}_0*.bin"))


def documents_of(data, split):
    """The documents of a split, as lists of tokens without BOS."""
    tokens = np.concatenate([tg.open_shard(path) for path in shards(data, split)])
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]]


@pytest.fixture
def copy(data, tmp_path):
    """A copy of the data that a test may damage."""
    return shutil.copytree(data, tmp_path / "data")


def full_manifest(folder) -> dict:
    """Writes a manifest with the hash and counts of every file there, and returns it."""
    splits = {}
    for split in ("train", "val"):
        rows = []
        for path in shards(folder, split):
            tokens = tg.open_shard(path)
            rows.append(
                dict(
                    file=path.name,
                    tokens=len(tokens),
                    documents=int((tokens == BOS).sum()),
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                )
            )
        splits[split] = dict(
            tokens=sum(r["tokens"] for r in rows), documents=sum(r["documents"] for r in rows), shards=rows
        )
    splits["val"]["bytes"] = json.loads((folder / "manifest.json").read_text())["splits"]["val"]["bytes"]
    tokenizer = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    manifest = dict(splits=splits, tokenizer=dict(file="tokenizer.model", sha256=tokenizer))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def refusal(values, folder, capfd, monkeypatch):
    """Runs main() in a folder; asserts that it ended with one line and code 2 and wrote nothing; returns the line."""
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        capfd.readouterr()
        code = tg.main([], strings(values))
    errors = capfd.readouterr().err
    assert code == 2 and len(errors.splitlines()) == 1, errors
    assert snapshot(folder) == before
    return errors


# --------------------------------------------------------------------------------------------------- shared documents


# Few letters and short documents, so that many are equal, many have the same key, and some are empty.
DOCUMENTS = st.lists(st.lists(st.integers(4, 6), max_size=12), min_size=2, max_size=12)


@examples(max_examples=120)
@given(DOCUMENTS, DOCUMENTS, st.sets(st.integers(0, 120), max_size=6))
def test_shared_documents_are_those_of_a_plain_set(tmp_path_factory, training, validation, cuts):
    folder = tmp_path_factory.mktemp("shards")
    write_split(folder, "train", training, cuts)
    write_split(folder, "val", validation, {cut // 2 for cut in cuts})
    audit = audit_of(folder, CPU_THREADS=2)
    texts = {tuple(d) for d in training if d}, {tuple(d) for d in validation if d}
    assert audit.rows["shared_documents"] == sum(tuple(d) in texts[0] for d in validation)
    assert audit.rows["shared_copies"] == sum(tuple(d) in texts[1] for d in training)
    assert audit.rows["train"]["documents"] == len(training) and audit.rows["val"]["documents"] == len(validation)
    assert bool(audit.findings) == (audit.rows["shared_documents"] > 0)


@pytest.mark.parametrize("planted", [[7], [7, 8, 9], list(range(4, 12)), list(range(4, 13)), list(range(4, 400))])
@pytest.mark.parametrize("place", [0, 20, 40])
def test_a_planted_document_of_any_length_is_found_wherever_a_shard_ends_in_it(place, planted, tmp_path):
    generator = np.random.default_rng(3)
    training, validation = ([generator.integers(400, 2000, 60).tolist() for _ in range(n)] for n in (40, 9))
    write_split(tmp_path, "val", [*validation[:4], planted, *validation[4:]])
    begin = 61 * place
    for cut in sorted({begin, begin + 1, begin + 2, begin + len(planted), begin + len(planted) + 1}):
        for path in shards(tmp_path, "train"):
            path.unlink()
        write_split(tmp_path, "train", [*training[:place], planted, *training[place:]], {cut, 600})
        audit = audit_of(tmp_path)
        assert (audit.rows["shared_documents"], audit.rows["shared_copies"]) == (1, 1)
        assert findings(audit) == [
            f"ALLOW_SHARED_DOCUMENTS=0: 1 of 10 validation documents in DATA_PATH={tmp_path} "
            "are in its training shards too, which must not hold them; where that is known of a "
            "published data set, this knob allows so many"
        ]


def test_nearly_equal_documents_are_not_shared(tmp_path):
    """One token more, less, or other, at any place: of the same key or of another."""
    document = np.random.default_rng(1).integers(4, 2000, 100).tolist()
    near = [document[:-1], document + [4], document[1:]]
    near += [[*document[:i], (document[i] + 1) % 1000 + 4, *document[i + 1 :]] for i in range(100)]
    write_split(tmp_path, "val", [document, document])
    write_split(tmp_path, "train", near)
    assert audit_of(tmp_path).rows["shared_documents"] == 0
    write_split(tmp_path, "train", [*near, document, document, document])
    audit = audit_of(tmp_path)
    assert (audit.rows["shared_documents"], audit.rows["shared_copies"]) == (2, 3)


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
        for name, value in (("WINDOW", lengths[0]), ("ANCHOR", lengths[1]), ("AUDIT_BLOCK", block)):
            patch.setattr(tg, name, value)
        row = audit_of(folder, AUDIT="windows").rows["shared_windows"]
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
    audit = audit_of(tmp_path, AUDIT="windows")
    assert audit.rows["shared_windows"] == dict(
        length=50, of=5 * 251, shared=max(0, length - 49), documents=int(length >= 50)
    )
    assert audit.rows["shared_documents"] == 0 and not audit.findings  # a report: boilerplate repeats


def test_a_line_that_repeats_a_thousand_times_is_no_trouble(tmp_path):
    line = [7] * 2000
    write_split(tmp_path, "train", [[8, *line], line, [9] * 60])
    write_split(tmp_path, "val", [[10, *line], [*line, 11], [9] * 49])
    row = audit_of(tmp_path, AUDIT="windows").rows["shared_windows"]
    assert (row["shared"], row["documents"], row["of"]) == (2 * 1951, 2, 2 * 1952)


# -------------------------------------------------------------------------------- hashes, counts, vocabulary, BOS


def test_whole_data_pass(copy):
    full_manifest(copy)
    audit = audit_of(copy, VOCAB_SIZE=384)
    assert not audit.findings and audit.rows["manifest"]
    assert (audit.rows["train"]["hashed"], audit.rows["val"]["hashed"]) == (3, 2)
    assert audit.rows["train"]["documents"] == 400 and audit.rows["shared_documents"] == 0


@pytest.mark.parametrize(
    "name", ["fineweb_train_000000.bin", "fineweb_train_000002.bin", "fineweb_val_000001.bin", "tokenizer.model"]
)
def test_one_flipped_bit_is_found_by_its_hash(name, copy):
    full_manifest(copy)
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    assert [f for f in findings(audit_of(copy)) if f.startswith(f"{copy / name}: was changed: its SHA-256 is ")]


@pytest.mark.parametrize(
    "split, shard, key",
    [
        ("train", 1, "tokens"),
        ("train", 1, "documents"),
        ("val", 0, "tokens"),
        ("val", 1, "documents"),
        ("train", None, "tokens"),
        ("train", None, "documents"),
        ("val", None, "tokens"),
        ("val", None, "documents"),
    ],
)
def test_counts_that_are_not_the_manifests_are_found(split, shard, key, copy):
    manifest = full_manifest(copy)
    row = manifest["splits"][split] if shard is None else manifest["splits"][split]["shards"][shard]
    right, row[key] = row[key], row[key] + 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    holder = f"the {split} shards" if shard is None else row["file"]
    assert findings(audit_of(copy)) == [
        f"{copy / 'manifest.json'}: promises {right + 1} {key} in {holder}, which hold {right}"
    ]


def test_shards_that_the_manifest_does_not_know_or_misses_are_found(copy):
    full_manifest(copy)
    (copy / "fineweb_train_000002.bin").rename(copy / "fineweb_train_000007.bin")
    found = findings(audit_of(copy))
    assert f"{copy / 'fineweb_train_000007.bin'}: is not named in {copy / 'manifest.json'}" in found
    assert f"{copy / 'manifest.json'}: names fineweb_train_000002.bin, which is not there" in found


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary_are_found_by_shard(split, data):
    tokens = {path: int(tg.open_shard(path).max()) for path in shards(data, split)}
    highest = max(tokens.values())
    assert not [f for f in findings(audit_of(data, VOCAB_SIZE=highest + 1)) if f"fineweb_{split}" in f]
    found = [f for f in findings(audit_of(data, VOCAB_SIZE=highest)) if f"fineweb_{split}" in f]
    assert found == [
        f"{path}: holds token id {highest}, and VOCAB_SIZE={highest} needs ids below it"
        for path, value in tokens.items()
        if value == highest
    ]


def test_a_stream_must_begin_with_bos_and_its_other_shards_need_not(tmp_path):
    write_split(tmp_path, "train", [[5, 6, 7], [8, 9]], {2})
    write_split(tmp_path, "val", [[10, 11], [12]], {1, 4})
    assert not audit_of(tmp_path).findings
    for split, tokens in (("train", [5, 6, BOS, 7]), ("val", [6, BOS, 6])):
        path = tmp_path / f"fineweb_{split}_000000.bin"
        before = path.read_bytes()
        write_shard(path, tokens)
        assert findings(audit_of(tmp_path)) == [f"{path}: does not begin with BOS, 1: every document must"]
        path.write_bytes(before)
    # Shards from the middle of a published data set: training may begin inside a document, validation may not.
    (tmp_path / "fineweb_train_000000.bin").unlink()
    assert not audit_of(tmp_path).findings
    (tmp_path / "fineweb_val_000000.bin").unlink()
    assert len(audit_of(tmp_path).findings) == 1


def test_machines_with_other_files_are_found(copy, monkeypatch):
    """What two machines see of a shard differs: the second one's answer comes with the first one's."""

    def other_machine(run, value):
        changed = (
            {number: scan._replace(documents=scan.documents + (number == 1)) for number, scan in value.items()}
            if isinstance(value, dict)
            else value
        )
        return [value, changed]

    monkeypatch.setattr(tg.Run, "gather", other_machine)
    assert findings(audit_of(copy)) == [f"{copy / 'fineweb_train_000001.bin'}: is not the same on all machines"]


# ---------------------------------------------------------------------------------------------------- the script's runs


def plant(folder):
    """Adds a document of validation to the last training shard."""
    document = documents_of(folder, "val")[5]
    path = shards(folder, "train")[-1]
    write_shard(path, [*tg.open_shard(path), BOS, *document])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shared_document_stops_the_script(ranks, copy, tmp_path):
    plant(copy)
    done = run_script(dict(RUN, DATA_PATH="data"), ranks=ranks, cwd=tmp_path)
    line = "error: ALLOW_SHARED_DOCUMENTS=0: 1 of 40 validation documents in DATA_PATH=data are in its training shards"
    errors = [e for e in done.stderr.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(line + " too, which must not hold them")
    assert done.returncode != 0 and "step:" not in done.stdout and not (tmp_path / "logs").exists()
    assert ranks > 1 or done.returncode == 2


def test_a_damaged_shard_stops_the_run(copy, tmp_path, capfd, monkeypatch):
    full_manifest(copy)
    shard = copy / "fineweb_train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content)
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: {shard}: was changed: its SHA-256 is ")


def test_several_findings_are_one_line_that_says_where_all_are_listed(copy, tmp_path, capfd, monkeypatch):
    plant(copy)
    path = shards(copy, "train")[0]
    write_shard(path, [5, *tg.open_shard(path)])
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line == (
        f"error: {path}: does not begin with BOS, 1: every document must (1 more: make audit-data DATA={copy})\n"
    )


def test_an_allowed_overlap_is_loud_and_recorded_and_eval_needs_no_training_shards(copy, tmp_path, capfd, monkeypatch):
    plant(copy)
    monkeypatch.chdir(tmp_path)
    values = dict(RUN, DATA_PATH=copy, ALLOW_SHARED_DOCUMENTS=1)
    assert tg.main([], strings(values)) == 0
    run = tmp_path / "logs" / "run"
    warning = "warning: audit: 1 validation documents are in the training shards too"
    assert warning in (run / "log.txt").read_text().splitlines()
    summary = json.loads((run / "summary.json").read_text())
    audit = summary["audit"]
    assert (audit["shared_documents"], audit["shared_copies"], audit["allowed_shared_documents"]) == (1, 1, 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["audit"] for row in rows if "audit" in row] == [audit] and summary["seconds"]["audit"] >= 0
    for path in shards(copy, "train"):
        path.unlink()
    assert tg.main([], strings(dict(values, MODE="eval"))) == 0
    evaluated = json.loads((run / "eval_summary.json").read_text())["audit"]
    assert evaluated["val"] == audit["val"] and set(evaluated) == {"manifest", "val"}


# --------------------------------------------------------------------------------------------------------- audit_data


def test_the_command_prints_a_table_and_no_finding(copy, capsys):
    manifest = full_manifest(copy)
    assert audit_data.main([str(copy)], dict(AUDIT="windows")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["split", "shards", "hashed", "documents", "tokens", "bytes"]
    train, val = (line.replace(",", "").split() for line in lines[1:3])
    expected = manifest["splits"]
    assert train[:5] == ["train", "3", "3", "400", str(expected["train"]["tokens"])]
    assert val == ["val", "2", "2", "40", str(expected["val"]["tokens"]), str(expected["val"]["bytes"])]
    assert "0 validation documents" in lines[3] and "runs of 50 tokens" in lines[4]
    assert lines[5].startswith("0 findings")


def test_the_command_counts_trainings_bytes(copy, capsys):
    manifest, model = full_manifest(copy), tg.Vocabulary(config(DATA_PATH=copy)).model
    manifest["splits"]["train"]["bytes"] = sum(len(model.decode(d).encode()) for d in documents_of(copy, "train"))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert audit_data.main([str(copy)], {}) == 0, capsys.readouterr().out
    manifest["splits"]["train"]["bytes"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert audit_data.main([str(copy)], {}) == 2
    assert f"promises {manifest['splits']['train']['bytes']} bytes in the train shards" in capsys.readouterr().out


def test_the_command_lists_every_finding_and_leaves_the_folder_alone(copy):
    full_manifest(copy)
    plant(copy)
    before = snapshot(copy)
    done = launch(ROOT / "tools" / "audit_data.py", {}, copy)
    assert done.returncode == 2 and done.stderr == "" and snapshot(copy) == before
    lines = [line for line in done.stdout.splitlines() if line.startswith("finding: ")]
    assert len(lines) == 6  # the shard's hash, tokens and documents, the split's two counts, and the shared document
    assert sum("ALLOW_SHARED_DOCUMENTS=0: 1 of 40" in line for line in lines) == 1


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
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Document {number} of THE collection. " * (number % 7 + 1))
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
    audit, problems = audit_data.audited(c)
    assert problems == [] and audit.rows["val"]["bytes"] > 0 and "bytes" not in audit.rows["train"]
    names = [p.name for p in out.iterdir() if p.name != "manifest.json"]
    assert any("bytes" in name for name in names) and len(names) >= 4
    for name in names:
        content = bytearray((out / name).read_bytes())
        content[-1] ^= 1
        (out / name).write_bytes(content)
        assert any(f"{out / name}: was changed" in problem for problem in audit_data.audited(c)[1])
        content[-1] ^= 1
        (out / name).write_bytes(content)
