"""Rules of style that no linter checks, over everything but the tests."""

import ast
import functools
from collections import Counter

import pytest

from helpers import ROOT

FOLDERS = ("data", "tools", "tools/h100", "tools/hf", "bench", "bench/faults")
FILES = [
    ROOT / "train_gpt.py",
    ROOT / "golf.py",
    *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")),
]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def parallel_assignments(tree):
    """Lines with a parallel assignment of more than two values."""
    return [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign)
        and isinstance(n.targets[0], ast.Tuple)
        and isinstance(n.value, ast.Tuple)
        and len(n.value.elts) > 2
    ]


def nested_conditionals(tree):
    """Lines with a conditional expression inside another one."""
    return [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.IfExp)
        and any(isinstance(m, ast.IfExp) for child in ast.iter_child_nodes(n) for m in ast.walk(child))
    ]


def long_functions(tree):
    """Names of functions of more than 80 lines."""
    functions = (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [n.name for n in functions if (n.end_lineno or n.lineno) - n.lineno >= 80]


@pytest.mark.parametrize("rule", [parallel_assignments, nested_conditionals, long_functions])
def test_a_rule_holds_everywhere(rule):
    broken = {path.name: rule(tree_of(path)) for path in FILES}
    assert {name: places for name, places in broken.items() if places} == {} and len(broken) > 20


@pytest.mark.parametrize(
    "rule, source",
    [
        (parallel_assignments, "a, b, c = 1, 2, 3"),
        (nested_conditionals, "x = 1 if a else 2 if b else 3"),
        (long_functions, "def f():\n" + "    x = 1\n" * 80),
    ],
)
def test_a_rule_sees_what_it_forbids(rule, source):
    assert rule(ast.parse(source)) and not rule(ast.parse("a, b = 1, 2\nx = 1 if a else 2\ndef f(): return x"))


def test_no_two_modules_have_one_name():
    """Scripts put several folders on sys.path: of two modules with one name, a spawned process may find the other."""
    names = Counter(path.stem for path in (*FILES, *(ROOT / "tests").glob("*.py")) if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []
