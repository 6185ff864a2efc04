"""`python -O` takes assertions away: those in the package and beside it may tell mypy a type, and check nothing."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def narrows(test):
    """Whether this is `x is not None`, isinstance(x, T), or several of them."""
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.And) and all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        return [type(op) for op in test.ops] == [ast.IsNot] and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_assertions_only_narrow_types():
    found = []
    for folder in ("ssvdo_kernels", "examples", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            found += [(file, ast.unparse(n)) for n in nodes if isinstance(n, ast.Assert) and not narrows(n.test)]
            found += [(file, n.id) for n in nodes if isinstance(n, ast.Name) and n.id == "AssertionError"]
    assert not found
