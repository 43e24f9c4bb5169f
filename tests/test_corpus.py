"""The built-in corpus: what is read, in which order, what is left out, and which documents belong together."""

import random
import re
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import run_command

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import corpus  # noqa: E402

MAIN_FILE = '''
    """What the package is for."""
    raise RuntimeError("a corpus reader must never run this")

    class Box(list):
        """A box.

        It holds:
            things.
        """

        def __init__(self, size: int = 3, *rest, deep=True, **more):
            """Make a box."""

        @property
        def volume(self):
            """Its volume."""

        @classmethod
        def empty(cls, kind, /, *, strict):
            """Make an empty one."""

        def silent(self):
            return 1

        class Lid:
            """What closes it."""

            def shut(self):
                """Close the lid."""
                def inner(x):
                    """How it is closed."""

    try:
        import fast
    except ImportError:
        def slow(a, b=2):
            """The slow way."""
    else:
        async def quick():
            r"""A regular expression: \\d+."""
    x = "not \\d documentation"
'''

CALLS_FILE = '''
    import doc
    add_docstr(doc.absolute, r"""
    absolute(x) -> y

    Text about the absolute value, with {{braces}}.

    Args:
        {input}
    """.format(**common))
    sign = _add_docstr(doc.sign, "Text about the sign of a number, " + "in two constants put together.")
    add_newdoc("pkg.core", "ring", ("turn", """
        Text about turning the ring, which is long enough.
        """))
    unrelated(doc.absolute, "Text that no documentation function was given, and is not read.")
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be found but not imported; returns its folder."""
    folder = tmp_path / "pkgofdocs"
    (folder / "zeta").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "__pycache__").mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(MAIN_FILE))
    (folder / "calls.py").write_text(textwrap.dedent(CALLS_FILE))
    (folder / "broken.py").write_text('"""Documentation of a broken file."""\ndef f(:\n')
    (folder / "nul.py").write_bytes(b'"""Nul."""\0')
    (folder / "zeta" / "__init__.py").write_text('"""The module zeta."""\n')
    (folder / "tests" / "test_it.py").write_text('"""A test is not read."""\n')
    (folder / "__pycache__" / "cached.py").write_text('"""A cache is not read."""\n')
    (folder / "notes.txt").write_text("not Python")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def texts(gathered):
    return {document.name: document.text for document in gathered.documents}


@pytest.fixture(scope="module")
def networkx():
    return corpus.gather(["networkx"])


def test_documents_are_top_level_objects_with_all_inside(package):
    found = texts(corpus.gather(["pkgofdocs"], min_bytes=1))
    assert list(found)[:5] == [
        "pkgofdocs",
        "pkgofdocs:Box",
        "pkgofdocs:slow",
        "pkgofdocs:quick",
        "pkgofdocs.calls:doc.absolute",
    ]
    assert found["pkgofdocs"] == "pkgofdocs\n\nWhat the package is for.\n"
    assert found["pkgofdocs:Box"] == textwrap.dedent("""\
        Box(size=3, *rest, deep=True, **more)

        A box.

        It holds:
            things.


        Box.__init__(size=3, *rest, deep=True, **more)

        Make a box.


        Box.volume

        Its volume.


        Box.empty(kind, *, strict)

        Make an empty one.


        Box.Lid

        What closes it.


        Box.Lid.shut()

        Close the lid.


        inner(x)

        How it is closed.
        """)
    assert found["pkgofdocs:slow"] == "slow(a, b=2)\n\nThe slow way.\n"
    assert found["pkgofdocs.zeta"] == "pkgofdocs.zeta\n\nThe module zeta.\n"


def test_documentation_given_to_calls(package):
    found = texts(corpus.gather(["pkgofdocs"], min_bytes=1))
    # The text opens with its own signature, so it needs no header of ours; template fields stand for themselves.
    assert found["pkgofdocs.calls:doc.absolute"] == (
        "absolute(x) -> y\n\nText about the absolute value, with {braces}.\n\nArgs:\n    input\n"
    )
    assert found["pkgofdocs.calls:doc.sign"] == (
        "doc.sign\n\nText about the sign of a number, in two constants put together.\n"
    )
    assert found["pkgofdocs.calls:pkg.core.ring.turn"] == (
        "pkg.core.ring.turn\n\nText about turning the ring, which is long enough.\n"
    )
    assert not any("no documentation function" in text for text in found.values())


def test_broken_files_are_counted_and_others_read_without_warnings(package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gathered = corpus.gather(["pkgofdocs"], min_bytes=1)
    assert gathered.unparsed == ("pkgofdocs/broken.py", "pkgofdocs/nul.py")
    assert gathered.files == 5
    assert "pkgofdocs" not in sys.modules
    assert not any("not read" in text for text in texts(gathered).values())


def test_repeated_and_trivial_documentation_is_left_out(package):
    passage = "This passage is long enough to be a document of its own, and stands twice. " * 6
    for name in ("a", "b"):
        (package / f"{name}.py").write_text(f'def {name}():\n    """{passage}"""\n\n\ndef c():\n    """Short."""\n')
    found = texts(corpus.gather(["pkgofdocs"]))
    assert [name for name in found if passage[:70] in found[name]] == ["pkgofdocs.a:a"]
    assert all(len(text.encode()) >= corpus.MIN_DOCUMENT_BYTES for text in found.values())
    assert not any("Short." in text for text in found.values())


def test_unencodable_text_becomes_encodable(package):
    (package / "odd.py").write_text('def f():\n    "Half a pair: \\ud800, a tab:\\t, a space at the end: "\n')
    assert "Half a pair: ?, a tab:" in texts(corpus.gather(["pkgofdocs"], min_bytes=1))["pkgofdocs.odd:f"]


def test_unknown_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here is not installed: pip install"):
        corpus.gather(["no_such_package_here"])


def test_long_signatures_stay_short():
    parameters = ", ".join(f"parameter_number_{index}=None" for index in range(20))
    tree = corpus.ast.parse(f"def function(self, {parameters}, last={'9' * 40}, **rest): pass")
    line = corpus.signature("function", tree.body[0])
    assert len(line) <= corpus.MAX_HEADER + 10
    assert line.startswith("function(parameter_number_0=None, ") and line.endswith(", ...)")
    tree = corpus.ast.parse(f"def {'n' * 120}(a, b): pass")
    assert corpus.signature("n" * 120, tree.body[0]) == "n" * 120 + "(...)"


def test_topics():
    path = corpus.package_root("python") / "pydoc_data" / "topics.py"
    documents = corpus.read_documents(path.read_bytes(), "pydoc_data.topics")
    names = [name for name, _ in documents]
    assert "pydoc_data.topics:assert" in names and len(names) > 60
    body = dict(documents)["pydoc_data.topics:assert"][0]
    assert body.header == "" and body.body.startswith('The "assert" statement\n')


def test_order_depends_on_files_alone(networkx):
    again = corpus.gather(["networkx", "networkx"], workers=2)
    assert again == networkx
    modules = [document.name.split(":")[0].replace(".", "/") for document in networkx.documents]
    paths = [path.relative_to(corpus.package_root("networkx")).as_posix() for path in corpus.source_files("networkx")]
    ranks = {path.removesuffix(".py").removesuffix("/__init__"): rank for rank, path in enumerate(paths)}
    order = [ranks[module.removeprefix("networkx").removeprefix("/") or "__init__"] for module in modules]
    assert order == sorted(order)


def test_no_document_twice(networkx):
    all_texts = [document.text for document in networkx.documents]
    assert len(set(all_texts)) == len(all_texts) > 500
    assert all(text == text.strip("\n") + "\n" and not re.search(r"[ \t]$", text, re.M) for text in all_texts)


def test_nothing_is_imported_to_be_read():
    code = (
        f"import sys; sys.path.insert(0, {str(DATA)!r}); import corpus\n"
        "corpus.gather(['networkx']); corpus.source_files('torch'); corpus.source_files('sympy')\n"
        "print({'networkx', 'torch', 'sympy'} & set(sys.modules), 'pydoc_data.topics' in sys.modules)"
    )
    done = run_command([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "set() False\n", "")


def naive_groups(documents, words):
    """The definition, slowly: link any two texts that share a window or are equal, and follow the links."""

    def windows(text):
        found = re.findall(r"\w+", text.lower())
        return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}

    labels = list(range(len(documents)))
    for i, left in enumerate(documents):
        for j, right in enumerate(documents[:i]):
            if left == right or windows(left) & windows(right):
                old, new = labels[i], labels[j]
                labels = [new if label == old else label for label in labels]
    return labels


def same_partition(left, right):
    return len(set(left)) == len(set(right)) == len(set(zip(left, right, strict=True)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="abB .", max_size=14), max_size=8), st.integers(1, 4))
def test_groups_are_what_their_definition_says(documents, words):
    groups = corpus.group_by_passages(documents, words)
    assert same_partition(groups, naive_groups(documents, words))


def test_a_shared_passage_joins_and_one_word_less_does_not():
    generator = random.Random(5)
    words = [f"word{number}" for number in range(400)]

    def text(*parts):
        return " ".join([*generator.sample(words, 100), *parts, *generator.sample(words, 100)])

    passage = [f"shared{number}" for number in range(30)]
    first, second, other = text(*passage), text(*passage), text(*passage[:29])
    groups = corpus.group_by_passages([first, other, second])
    assert groups[0] == groups[2] != groups[1]
    # Copies that differ in case, line breaks and punctuation are copies; order does not change a group's label.
    disguised = text(" **" + ",\n    ".join(passage).upper() + "**")
    assert corpus.group_by_passages([disguised, other, first])[0] == corpus.group_by_passages([first, disguised])[0]
    assert corpus.group_by_passages([]) == []


def test_no_passage_crosses_groups(networkx):
    owner = {}
    for document in networkx.documents:
        words = re.findall(r"\w+", document.text.lower())
        for start in range(len(words) - corpus.SHARED_WORDS + 1):
            window = tuple(words[start : start + corpus.SHARED_WORDS])
            assert owner.setdefault(window, document.group) == document.group
    groups = {document.group for document in networkx.documents}
    assert 0.3 * len(networkx.documents) < len(groups) < len(networkx.documents)


@pytest.mark.parametrize("workers", [1, 2])
def test_map_keeps_order_and_reads_little_ahead(workers):
    taken = []

    def items():
        for number in range(60):
            taken.append(number)
            yield number

    done = 0
    for result in corpus.map_in_order(abs, items(), workers):
        assert result == done
        done += 1
        assert len(taken) - done <= 4 * workers
    assert done == 60


def test_map_passes_errors_on():
    with pytest.raises(TypeError):
        list(corpus.map_in_order(abs, [1, 2, "three"], 2))


def test_whole_corpus():
    gathered = corpus.gather(workers=2)
    size = sum(len(document.text.encode()) for document in gathered.documents)
    assert 13e6 < size < 17e6
    packages = {re.split(r"[.:]", document.name)[0] for document in gathered.documents}
    assert {"networkx", "numpy", "sympy", "torch", "json", "pydoc_data"} <= packages
    assert not {"idlelib", "tkinter", "test", "pip", "hypothesis"} & packages
    sizes = {}
    for document in gathered.documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text)
    assert max(sizes.values()) < 0.05 * size
    assert len(gathered.unparsed) < 0.01 * gathered.files
