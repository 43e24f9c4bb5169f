"""Every reader of strangers' files on damaged files of a good folder: findings or a user's error, never a traceback.

tools/fuzz.py has the damage, and goes on for longer (`make fuzz`).
"""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from helpers import examples
from strangers import UserError, markdown, parse_json, visible


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good folder, put back after each try."""
    return fuzz.good_folder(tmp_path_factory.mktemp("fuzz") / "folder")


NAMES = st.sampled_from(
    [
        "submission.json",
        "README.md",
        "train_seed0.log",
        "metrics_seed0.jsonl",
        "summary_seed0.json",
        "config_seed0.json",
        "baseline.json",
        "proof.json",
        "data/manifest.json",
        "sweep/study.json",
        "run/summary.json",
        "run/config.json",
        "run/metrics.jsonl",
        "run/log.txt",
    ]
)


def attempt(folder, name, reader, draws):
    """One try with random damage: an empty text, or what went wrong."""
    return fuzz.attempt(folder, name, reader, fuzz.mutate(name, (folder / name).read_bytes(), draws))


def test_what_is_raised_is_reported(folder, monkeypatch):
    monkeypatch.setitem(fuzz.READERS, "check", lambda folder: {}["missing"])
    assert "KeyError: 'missing'" in fuzz.attempt(folder, "README.md", "check", b"")
    monkeypatch.setitem(fuzz.READERS, "check", lambda folder: fuzz.judge_text("\x1b"))
    before = (folder / "README.md").read_bytes()
    assert "AssertionError: prints" in fuzz.attempt(folder, "README.md", "check", b"")
    assert (folder / "README.md").read_bytes() == before


def test_the_list_of_damaged_files_is_complete(folder):
    kinds = {str(path.relative_to(folder)).replace("42", "0").replace("314", "0") for path in fuzz.files_of(folder)}
    assert kinds == set(NAMES.elements)


@pytest.mark.parametrize("reader", ["check", "table", "others"])
@examples(max_examples=60)
@given(name=NAMES, draws=st.randoms(use_true_random=False))
def test_random_damage(reader, folder, name, draws):
    assert attempt(folder, name, reader, draws) == ""


@pytest.mark.parametrize("reader", ["check", "table", "others"])
def test_600_mutations_of_one_field(reader, folder):
    """Fields deleted, replaced, renamed, wrapped and doubled, evenly over all files; the same ones each time."""
    draws, tried = random.Random(3), 0
    for name in NAMES.elements * 15:
        assert attempt(folder, name, reader, draws) == "", name
        tried += 1
    assert tried * 3 >= 600


@examples(max_examples=4)
@given(
    name=st.sampled_from(["sweep/study.json", "run/metrics.jsonl", "train_seed0.log", "summary_seed0.json"]),
    draws=st.randoms(use_true_random=False),
)
def test_random_damage_to_what_is_drawn(folder, name, draws):
    assert attempt(folder, name, "draw", draws) == ""


@pytest.mark.parametrize("content", fuzz.RAW, ids=range(len(fuzz.RAW)))
def test_whole_files_of_another_form(content, folder):
    for name in NAMES.elements:
        for reader in ("check", "table", "others"):
            assert fuzz.attempt(folder, name, reader, content) == "", (name, reader)


@examples(max_examples=100)
@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_is_shown_on_one_line(text):
    assert visible(text).isprintable() and markdown(text).isprintable()
    assert "<" not in markdown(text).replace("\\<", "") and "|" not in markdown(text).replace("\\|", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@examples(max_examples=100)
@given(JSON)
def test_good_json_is_read_as_it_is(value):
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text)) or any(len(word) > 36 for word in text.split())


@examples(max_examples=100)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789e+-.ntfalsr\\u ', max_size=200).map(str.encode))
def test_any_bytes_are_json_or_a_value_error(content):
    try:
        parse_json(content.decode("utf-8"))
    except ValueError as error:
        assert not isinstance(error, UserError)
