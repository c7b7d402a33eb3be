"""Tests under names that nobody knows, each beside a twin that must fail (sandboxes.md 5.5, tier C).

A twin is a test whose expectation was changed: `assert f(2) == 5` becomes `assert f(2) == 12`. What makes
everything pass (a patched report, an object that equals all, an answer read from the caller's constants)
makes the twin pass too, and so names itself. Tests and twins get random names, so that neither the names nor
their order tell which is which.
"""

from __future__ import annotations

import ast
import copy
import secrets
from dataclasses import dataclass
from random import SystemRandom

_RANDOM = SystemRandom()
_FLIPPED = {
    "assertTrue": "assertFalse",
    "assertFalse": "assertTrue",
    "assertIn": "assertNotIn",
    "assertIs": "assertIsNot",
}
_FLIPPED |= {"assertNotIn": "assertIn", "assertIsNone": "assertIsNotNone", "assertIsNotNone": "assertIsNone"}
_EQUALS = (
    "assertEqual",
    "assertEquals",
    "assertListEqual",
    "assertDictEqual",
    "assertTupleEqual",
    "assertSetEqual",
)


@dataclass(frozen=True, slots=True)
class Disguised:
    """A test file as it enters a box.

    source  of tests and twins; order  their names there, "name" or "Class.name", as they are to be run
    tests   name there -> id in the file ("name" or "Class.name"); twins  the same for the twins
    """

    source: str
    order: tuple[str, ...]
    tests: dict[str, str]
    twins: dict[str, str]


def disguise(source: str) -> Disguised:
    """The file with every test renamed and a twin of each. SyntaxError if it is no Python."""
    tree = ast.parse(source)
    tests: dict[str, str] = {}
    twins: dict[str, str] = {}
    tree.body = _doubled(tree.body, "", tests, twins)
    order = [*tests, *twins]
    _RANDOM.shuffle(order)
    return Disguised(ast.unparse(ast.fix_missing_locations(tree)), tuple(order), tests, twins)


def test_ids(source: str) -> list[str]:
    """The ids of a file's tests, in order: functions `test…`, and such methods of classes."""
    return list(disguise(source).tests.values())


test_ids.__test__ = False  # its name is no test's


def _doubled(
    body: list[ast.stmt], owner: str, tests: dict[str, str], twins: dict[str, str]
) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not owner:
            node.body = _doubled(node.body, f"{node.name}.", tests, twins)
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
            found.append(node)
            continue
        twin = copy.deepcopy(node)
        if not _perturb(twin):
            twin.body.append(_never())
        original = node.name
        for which, names in ((node, tests), (twin, twins)):
            which.name = f"test_{secrets.token_hex(6)}"
            names[owner + which.name] = owner + original
        pair: list[ast.stmt] = [node, twin]
        _RANDOM.shuffle(pair)
        found += pair
    return found


def _perturb(test: ast.FunctionDef) -> bool:
    """Changes one expectation of the test; False if it has none that can be changed."""
    places = [node for node in ast.walk(test) if isinstance(node, ast.Assert) or _asserting_call(node)]
    _RANDOM.shuffle(places)
    for node in places:
        if isinstance(node, ast.Assert):
            _perturb_assert(node)
            return True
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in _EQUALS and len(node.args) >= 2:
            node.args[1] = _other(node.args[1])
            node.func.attr = "assertEqual"  # the typed forms would refuse the other type before comparing
            return True
        if node.func.attr in _FLIPPED:
            node.func.attr = _FLIPPED[node.func.attr]
            return True
    return False


def _asserting_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in _EQUALS or node.func.attr in _FLIPPED)
    )


def _perturb_assert(node: ast.Assert) -> None:
    test = node.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        side = 0 if isinstance(test.left, ast.Constant) else 1
        if side == 0:
            test.left = _other(test.left)
        else:
            test.comparators[0] = _other(test.comparators[0])
    else:
        node.test = ast.UnaryOp(ast.Not(), test)


def _other(expected: ast.expr) -> ast.expr:
    """An expression of another value: of the same type where it is a constant."""
    if isinstance(expected, ast.Constant):
        value = expected.value
        if isinstance(value, bool) or value is None:
            return ast.Constant(_RANDOM.randrange(100, 10_000))
        if isinstance(value, (int, float)):
            return ast.Constant(value + _RANDOM.choice((-1, 1)) * _RANDOM.randrange(3, 30))
        if isinstance(value, str):
            return ast.Constant(value + secrets.token_hex(2))
    return ast.Tuple([ast.Constant(secrets.token_hex(2)), expected], ast.Load())


def _never() -> ast.stmt:
    low = _RANDOM.randrange(1000)
    compared = ast.Compare(ast.Constant(low), [ast.Eq()], [ast.Constant(low + _RANDOM.randrange(1, 9))])
    return ast.Assert(compared, None)
