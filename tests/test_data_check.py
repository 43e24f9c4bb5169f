"""What a run checks of its data before it trains, and that they are the same files when the training ends."""

import json
import math
import os
import shutil

import numpy as np
import pytest

import train_gpt as tg
from helpers import (
    TINY,
    audit_of,
    config,
    documents_of,
    fork_script,
    full_manifest,
    plant,
    shards_of,
    single_run,
    snapshot,
    strings,
    write_shard,
    write_sidecars,
    write_split,
)

BOS = tg.BOS_ID
RUN = dict(TINY, ITERATIONS=1, GPTQ_CALIBRATION_BATCHES=1, RUN_ID="run")


def check_of(folder, **knobs):
    """The check of a folder's two splits, without what is in the way of its end."""
    made = config(**{"VOCAB_SIZE": 2000, **knobs}, DATA_PATH=folder)
    check = tg.DataCheck(made, single_run(), tg.Manifest.read(folder))
    check.validation(tg.TokenStream(made, "val"))
    check.training(tg.TokenStream(made, "train"))
    check.leaks()
    return check


def findings(check):
    return [str(tg.ConfigError(*finding)) for finding in check.findings]


@pytest.fixture
def copy(data, tmp_path):
    """A copy of the data that a test may damage."""
    return shutil.copytree(data, tmp_path / "data")


def write_manifest(folder, **changes):
    """Replaces entries of the folder's manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return folder


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


# -------------------------------------------------------------------------------- hashes, counts, vocabulary, BOS


def test_whole_data_pass(copy):
    full_manifest(copy, audited=True)
    check = check_of(copy, VOCAB_SIZE=384)
    assert not check.findings and check.rows["manifest"]
    assert (check.rows["train"]["hashed"], check.rows["val"]["hashed"]) == (3, 2)
    assert check.rows["train"]["documents"] == 400 and check.rows["leak_audit"]["shared_documents"] == 0


@pytest.mark.parametrize("audited", [False, True])
@pytest.mark.parametrize(
    "name", ["fineweb_train_000000.bin", "fineweb_train_000002.bin", "fineweb_val_000001.bin", "tokenizer.model"]
)
def test_one_flipped_bit_is_found_by_its_hash(name, audited, copy):
    full_manifest(copy, audited)
    expected = tg.sha256_of(copy / name)
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    assert [f for f in findings(check_of(copy)) if "SHA-256" in f or "audit" in f] == [
        f"{copy / name}: was changed: its SHA-256 is {tg.sha256_of(copy / name)}, but {copy / 'manifest.json'} says "
        f"{expected}"
    ]


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
    right = row[key]
    row[key] = right + 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    holder = f"the {split} shards" if shard is None else row["file"]
    assert findings(check_of(copy)) == [
        f"{copy / 'manifest.json'}: says {right + 1} {key} in {holder}, which hold {right}"
    ]


def test_shards_that_the_manifest_does_not_know_or_misses_are_found(copy):
    full_manifest(copy)
    (copy / "fineweb_train_000002.bin").rename(copy / "fineweb_train_000007.bin")
    found = findings(check_of(copy))
    assert f"{copy / 'fineweb_train_000007.bin'}: is not named in {copy / 'manifest.json'}" in found
    assert f"{copy / 'manifest.json'}: names fineweb_train_000002.bin, which is not there" in found


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary_are_found_by_shard(split, data):
    tokens = {path: int(tg.open_shard(path).max()) for path in shards_of(data, split)}
    highest = max(tokens.values())
    assert not [f for f in findings(check_of(data, VOCAB_SIZE=highest + 1)) if f"fineweb_{split}" in f]
    found = [f for f in findings(check_of(data, VOCAB_SIZE=highest)) if f"fineweb_{split}" in f]
    assert found == [
        f"{path}: holds token id {highest}, and VOCAB_SIZE={highest} needs ids below it"
        for path, value in tokens.items()
        if value == highest
    ]


def test_a_stream_must_begin_with_bos_and_its_other_shards_need_not(tmp_path):
    write_split(tmp_path, "train", [[5, 6, 7], [8, 9]], {2})
    write_split(tmp_path, "val", [[10, 11], [12]], {1, 4})
    assert not check_of(tmp_path).findings
    for split, tokens in (("train", [5, 6, BOS, 7]), ("val", [6, BOS, 6])):
        path = tmp_path / f"fineweb_{split}_000000.bin"
        before = path.read_bytes()
        write_shard(path, tokens)
        assert findings(check_of(tmp_path)) == [f"{path}: does not begin with BOS, 1: every document must"]
        path.write_bytes(before)
    # Shards from the middle of a published data set: training may begin inside a document, validation may not.
    (tmp_path / "fineweb_train_000000.bin").unlink()
    assert not check_of(tmp_path).findings
    (tmp_path / "fineweb_val_000000.bin").unlink()
    assert len(check_of(tmp_path).findings) == 1


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
    assert findings(check_of(without_manifest(copy))) == [
        f"{copy / 'fineweb_train_000001.bin'}: is not the same on all machines"
    ]


# ---------------------------------------------------------------------------------------------------- the leak audit


def one_token_changed(folder):
    """Puts all of validation into training, with one token of each document changed."""
    documents = documents_of(folder, "val")
    for document in documents:
        document[len(document) // 2] = document[len(document) // 2] % 300 + 20
    write_split(folder, "train", documents_of(folder, "train") + documents)
    for path in shards_of(folder, "train")[1:]:
        path.unlink()


def test_validation_with_one_token_of_each_document_changed_is_refused(copy, tmp_path, capfd, monkeypatch):
    one_token_changed(copy)
    write_manifest(copy, audit=audit_of(copy))
    windows = audit_of(copy)["windows"]
    share = windows["shared"] / windows["of"]
    assert audit_of(copy)["shared_documents"] == 0 and 0.3 < share < 1
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line.startswith(
        f"error: ALLOW_SHARED_WINDOWS=0.05: {share:.2%} of the validation windows of 50 tokens in DATA_PATH={copy} "
        f"({windows['shared']} of {windows['of']}, in {windows['documents']} documents) are in its training shards too"
    )
    monkeypatch.chdir(tmp_path)
    assert tg.main([], strings(dict(RUN, DATA_PATH=copy, ALLOW_SHARED_WINDOWS=share))) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shared_document_stops_the_script(ranks, copy, tmp_path):
    plant(copy)
    write_manifest(copy, audit=audit_of(copy))
    done = fork_script(dict(RUN, DATA_PATH="data"), ranks=ranks, cwd=tmp_path)
    line = "error: ALLOW_SHARED_DOCUMENTS=0: 1 of 40 validation documents in DATA_PATH=data are in its training shards"
    errors = [e for e in done.stderr.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(line + " too, which must not hold them")
    assert done.returncode != 0 and "step:" not in done.stdout and not (tmp_path / "logs").exists()
    assert ranks > 1 or done.returncode == 2


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"])
def test_a_file_changed_after_the_audit_is_refused(name, copy, tmp_path, capfd, monkeypatch):
    write_sidecars(copy, lambda counts: np.where(counts > 2, 2 + np.arange(len(counts)) % 2, 0))
    row = dict(tokens=sum(len(tg.open_shard(path)) for path in shards_of(copy, "val")))
    row["bytes"] = int(sum(tg.open_shard(path).sum(dtype=int) for path in shards_of(copy, "val_bytes")))
    write_manifest(copy, splits=dict(val=row), audit=audit_of(copy))
    assert not check_of(copy).findings
    values = tg.open_shard(copy / name).copy()
    place = next(i for i in range(9, len(values)) if values[i] != values[i + 1] and min(values[i : i + 2]) > 1)
    values[place : place + 2] = values[[place + 1, place]]  # all counts stay
    write_shard(copy / name, values)
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line == (
        f"error: {copy / name}: was changed after the leak audit in {copy / 'manifest.json'}: "
        f"make audit-data DATA={copy}\n"
    )


def test_an_audit_of_another_folder_is_refused(copy, tmp_path, capfd, monkeypatch):
    shutil.copytree(copy, tmp_path / "other")
    one_token_changed(tmp_path / "other")
    write_manifest(tmp_path / "other", audit=audit_of(copy))
    line = refusal(dict(RUN, DATA_PATH="other"), tmp_path, capfd, monkeypatch)
    assert line.startswith("error: other/fineweb_train_000000.bin: was changed after the leak audit")
    assert line.endswith("(2 more: make audit-data DATA=other)\n")


def test_an_audit_must_have_read_each_shard_and_no_other(copy):
    found = audit_of(copy)
    write_shard(copy / "fineweb_train_000003.bin", [BOS, 5, 6])
    assert findings(check_of(copy)) == [
        f"{copy / 'fineweb_train_000003.bin'}: was not read by the leak audit in {copy / 'manifest.json'}: "
        f"make audit-data DATA={copy}"
    ]
    (copy / "fineweb_train_000003.bin").unlink()
    (copy / "fineweb_train_000002.bin").unlink()
    assert findings(check_of(copy)) == [
        f"{copy / 'manifest.json'}: holds a leak audit that read fineweb_train_000002.bin, which is not there: "
        f"make audit-data DATA={copy}"
    ]
    assert "fineweb_train_000002.bin" in found["sha256"]


def test_without_an_audit_a_training_warns_and_says_none(copy, tmp_path, monkeypatch, capfd):
    content = json.loads((copy / "manifest.json").read_text())
    del content["audit"]
    (copy / "manifest.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert tg.main([], strings(dict(RUN, DATA_PATH=copy))) == 0
    warning = (
        f"warning: audit: nobody has looked for validation text in the training shards: make audit-data DATA={copy}"
    )
    assert warning in (tmp_path / "logs/run/log.txt").read_text().splitlines()
    assert json.loads((tmp_path / "logs/run/summary.json").read_text())["audit"]["leak_audit"] == "none"


def test_an_allowed_overlap_is_loud_and_recorded_and_eval_needs_no_training_shards(copy, tmp_path, capfd, monkeypatch):
    plant(copy)
    found = audit_of(copy)
    write_manifest(copy, audit=found)
    monkeypatch.chdir(tmp_path)
    values = dict(RUN, DATA_PATH=copy, ALLOW_SHARED_DOCUMENTS=1, ALLOW_SHARED_WINDOWS=0.5)
    assert tg.main([], strings(values)) == 0
    run = tmp_path / "logs" / "run"
    lines = (run / "log.txt").read_text().splitlines()
    assert "warning: audit: 1 validation documents are in the training shards too" in lines
    windows = found["windows"]
    assert (
        f"audit: {windows['shared']} of {windows['of']} validation windows of 50 tokens "
        f"({windows['shared'] / windows['of']:.2%}) are in the training shards too, in {windows['documents']} documents"
    ) in lines
    summary = json.loads((run / "summary.json").read_text())
    audit = summary["audit"]
    assert audit["leak_audit"] == dict(
        shared_documents=1,
        shared_copies=1,
        windows=windows,
        allowed_shared_documents=1,
        allowed_shared_windows=0.5,
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["audit"] for row in rows if "audit" in row] == [audit] and summary["seconds"]["audit"] >= 0
    for path in shards_of(copy, "train"):
        path.unlink()
    assert tg.main([], strings(dict(values, MODE="eval"))) == 0
    evaluated = json.loads((run / "eval_summary.json").read_text())["audit"]
    assert evaluated["val"] == audit["val"] and set(evaluated) == {"manifest", "val"}


# ---------------------------------------------------------------------------------------------------- the script's runs


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
    path = shards_of(copy, "train")[0]
    write_shard(path, [5, *tg.open_shard(path)])
    write_manifest(copy, audit=audit_of(copy))
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line == (
        f"error: {path}: does not begin with BOS, 1: every document must (1 more: make audit-data DATA={copy})\n"
    )


# ---------------------------------------------------------------------------------------------------------- manifests


def nested(*keys, value):
    """A change of a manifest: the value at this place."""

    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


# What is done to a whole manifest, and what the error line says.
HOSTILE = {
    "splits a list": (nested("splits", value=[]), "splits must be an object"),
    "no splits": (lambda m: m.pop("splits"), "splits must be an object"),
    "splits nested": (nested("splits", value={"val": {"val": {}}}), "splits.val.tokens must be a whole number"),
    "no validation": (lambda m: m["splits"].pop("val"), "splits.val must be an object"),
    "a split of text": (nested("splits", "train", value="many"), "splits.train must be an object"),
    "negative tokens": (nested("splits", "val", "tokens", value=-1), "splits.val.tokens must be a whole number"),
    "huge bytes": (nested("splits", "val", "bytes", value=2**63), "splits.val.bytes must be a whole number"),
    "no bytes": (lambda m: m["splits"]["val"].pop("bytes"), "splits.val.bytes must be a whole number"),
    "NaN documents": (nested("splits", "train", "documents", value=math.nan), "splits.train.documents must be a whole"),
    "infinite tokens": (nested("splits", "train", "tokens", value=math.inf), "splits.train.tokens must be a whole"),
    "fractional tokens": (nested("splits", "train", "tokens", value=5.5), "splits.train.tokens must be a whole number"),
    "true tokens": (nested("splits", "train", "tokens", value=True), "splits.train.tokens must be a whole number"),
    "null tokens": (nested("splits", "train", "tokens", value=None), "splits.train.tokens must be a whole number"),
    "tokens nested": (nested("splits", "train", "tokens", value={"tokens": 5}), "splits.train.tokens must be a whole"),
    "shards an object": (nested("splits", "train", "shards", value={}), "splits.train.shards must be a list"),
    "shards of text": (nested("splits", "train", "shards", value=["a"]), "splits.train.shards[0] must be an object"),
    "no file name": (
        lambda m: m["splits"]["val"]["shards"][1].pop("file"),
        "splits.val.shards[1].file must be the name",
    ),
    "a path for a name": (nested("splits", "val", "shards", 0, "file", value="../x.bin"), "shards[0].file must be the"),
    "a long name": (nested("splits", "val", "shards", 0, "file", value="x" * 300), "shards[0].file must be the name"),
    "a name with a zero": (nested("splits", "val", "shards", 0, "file", value="x\0.bin"), "shards[0].file must be the"),
    "a numeric hash": (nested("splits", "train", "shards", 0, "sha256", value=7), "shards[0].sha256 must be a SHA-256"),
    "a short hash": (
        nested("splits", "train", "shards", 0, "sha256", value="ab"),
        "shards[0].sha256 must be a SHA-256",
    ),
    "sidecars of lists": (nested("splits", "val", "sidecars", value=[[]]), "splits.val.sidecars[0] must be an object"),
    "a tokenizer of text": (nested("tokenizer", value="tokenizer.model"), "tokenizer must be an object"),
    "a tokenizer's hash": (nested("tokenizer", "sha256", value=["a"]), "tokenizer.sha256 must be a SHA-256"),
    "compressors a list": (nested("reference_compressors", value=[1.5]), "reference_compressors must be an object"),
    "a compressor of text": (
        nested("reference_compressors", value={"xz": "2"}),
        "reference_compressors.xz must be bits",
    ),
    "a compressor of null": (nested("reference_compressors", value={"xz": None}), "reference_compressors.xz must be"),
    "a NaN compressor": (nested("reference_compressors", value={"xz": math.nan}), "reference_compressors.xz must be"),
    "a true compressor": (nested("reference_compressors", value={"xz": True}), "reference_compressors.xz must be bits"),
    "a huge compressor": (nested("reference_compressors", value={"xz": 10**400}), "reference_compressors.xz must be"),
    "lines in a name": (
        nested("reference_compressors", value={"x\nz": 2.0}),
        "a name in reference_compressors must be",
    ),
    "an audit of text": (nested("audit", value="clean"), "audit must be an object"),
    "a null audit": (nested("audit", value=None), "audit must be an object"),
    "an empty audit": (nested("audit", value={}), "audit.sha256 must be an object"),
    "no shared documents": (lambda m: m["audit"].pop("shared_documents"), "audit.shared_documents must be a whole"),
    "fewer than none": (nested("audit", "shared_documents", value=-1), "audit.shared_documents must be a whole number"),
    "copies of text": (nested("audit", "shared_copies", value="0"), "audit.shared_copies must be a whole number"),
    "windows a list": (nested("audit", "windows", value=[50, 9, 0, 0]), "audit.windows must be an object"),
    "NaN windows": (
        nested("audit", "windows", "shared", value=math.nan),
        "audit.windows.shared must be a whole number",
    ),
    "more than all": (nested("audit", "windows", "shared", value=10**9), "audit.windows.shared must be at most"),
    "other windows": (nested("audit", "windows", "length", value=500), "audit.windows.length must be 50"),
    "digests a list": (nested("audit", "sha256", value=["a"]), "audit.sha256 must be an object"),
    "a digest of null": (
        nested("audit", "sha256", "fineweb_val_000000.bin", value=None),
        "audit.sha256.fineweb_val_000000.bin must be a SHA-256",
    ),
    "a digest of a path": (
        nested("audit", "sha256", "../x", value="0" * 64),
        "a name in audit.sha256 must be the name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_ends_a_run_in_one_line(case, copy, tmp_path, capfd, monkeypatch):
    manifest = {**full_manifest(copy, audited=True), "reference_compressors": {"xz -9": 2.5}}
    change, words = HOSTILE[case]
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: {copy / 'manifest.json'}: is not a valid manifest: ") and words in line


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"splits": 1' + b"0" * 5000 + b"}"],
)
def test_a_file_that_is_no_json_object_ends_a_run_in_one_line(content, copy, tmp_path, capfd, monkeypatch):
    (copy / "manifest.json").write_bytes(content)
    line = refusal(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: {copy / 'manifest.json'}: is not a valid manifest: ")


# ------------------------------------------------------------------------------------------ the same files at the end


def rewritten(path, monkeypatch, change):
    """Changes a file after the first step of a training."""
    original = tg.Trainer.step

    def step(self, *arguments, **named):
        change(path)
        return original(self, *arguments, **named)

    monkeypatch.setattr(tg.Trainer, "step", step)


def same_bytes_and_time(path):
    """Another file under the name, as after a copy that keeps times."""
    status = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes())
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("fineweb_train_000002.bin", lambda path: path.write_bytes(path.read_bytes())),
        ("fineweb_train_000000.bin", same_bytes_and_time),
        ("fineweb_val_000001.bin", lambda path: os.utime(path)),
        ("fineweb_val_bytes_000000.bin", lambda path: path.unlink(missing_ok=True)),
    ],
)
def test_a_file_rewritten_during_the_training_ends_the_run_with_its_name(
    name, change, copy, tmp_path, capfd, monkeypatch
):
    without_manifest(copy)
    write_sidecars(copy)
    rewritten(copy / name, monkeypatch, change)
    monkeypatch.chdir(tmp_path)
    assert tg.main([], strings(dict(RUN, DATA_PATH=copy))) == 2
    errors = capfd.readouterr().err
    assert errors == f"error: {copy / name}: was rewritten during the training: run it again on files that stay\n"
    assert not (tmp_path / "logs/run" / tg.CONTAINER_FILE).exists()
    assert not (tmp_path / "logs/run" / tg.SUMMARY_FILE).exists()


def test_several_rewritten_files_are_counted(copy):
    check = check_of(copy)
    check.refuse_rewritten("the training")
    for path in shards_of(copy, "train"):
        os.utime(path, (1, 1))
    with pytest.raises(
        tg.ConfigError, match=r"fineweb_train_000000.bin: was rewritten during the training \(and 2 more\)"
    ):
        check.refuse_rewritten("the training")
