"""What `make test` leaves to `make test-thorough`: the list names tests that exist, and keeps some of their values."""

import re
from types import SimpleNamespace

from conftest import THOROUGH_LIST, thorough_rules, thorough_tests
from helpers import ROOT

RULES = thorough_rules(THOROUGH_LIST.read_text())


def test_every_so_many_th_value_stays_and_what_has_no_number_goes():
    names = [
        *(f"tests/test_a.py::test_one[{n}]" for n in range(7)),
        "tests/test_a.py::test_two",
        "tests/test_b.py::test_one",
    ]
    items = [SimpleNamespace(nodeid=name) for name in names]
    listed = "# a remark\n\ntest_a.py::test_one 3\ntest_a.py::test_two\n"
    left = [name for name in names if name not in thorough_tests(items, listed)]
    assert left == [*(f"tests/test_a.py::test_one[{n}]" for n in (0, 3, 6)), "tests/test_b.py::test_one"]


def test_the_list_names_tests_that_exist_once_each():
    names = [name for name, *_ in RULES]
    assert len(set(names)) == len(names) > 60
    for name in names:
        file, _, function = name.partition("::")
        assert re.search(rf"^ *def {function}\(", (ROOT / "tests" / file).read_text(), re.M), name


def test_a_number_leaves_some_values_and_takes_some():
    for rule in RULES:
        assert re.fullmatch(r"\S+( [2-9])?", " ".join(rule)), rule


def test_both_commands_together_run_everything():
    makefile = (ROOT / "Makefile").read_text()
    (left,) = re.findall(r'^test:.*\n\t\$\(SUITE\) -m "(.*)" tests$', makefile, re.M)
    (rest,) = re.findall(r"^test-thorough:.*\n\t\$\(SUITE\) -m (\S+) tests$", makefile, re.M)
    assert (left, rest) == ("not thorough", "thorough")
    assert {"make test", "make test-thorough"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
