"""Ground truth from the source: the residual additions that a model's layers are written with.

An addition counts where a line of a layer's `forward`, when it runs, adds to a value what modules
made of it; or adds to an argument what modules made (the sum stands in a module behind the branch);
or what one module made of a value (a projection) to what others did. Masks, biases and positions
are known by their names. A layer is a module with a number in its name, or inside of one.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_SKIP = re.compile(r"skip|short|res|ident|down|proj", re.IGNORECASE)
_NO_BRANCH = re.compile(
    r"mask|bias|pos|embed|cache|loss|attn_weights|scores|eps|offset", re.IGNORECASE
)


def source_additions(model: nn.Module, call: Callable[[], object]) -> dict[str, int]:
    """How many residual additions ran, by the class whose source has them.

    Args:
        model: The model.
        call: Runs its forward once.
    """
    layers = {
        type(module)
        for name, module in model.named_modules()
        if any(letter.isdigit() for letter in name)
    }
    kinds = {code: kind.__name__ for kind in layers if (code := _code(kind)) is not None}
    found: dict[str, int] = {}

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        kind = kinds.get(frame.f_code)
        if kind is None:
            return None
        statements, flow = _statements_of(frame.f_code), _Flow(frame)
        last = None

        def ran(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                statement = statements.get(frame.f_lineno)
                if statement is not None and statement is not last:
                    found[kind] = found.get(kind, 0) + flow.run(statement)
                last = statement
            return ran

        return ran

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        with torch.no_grad():
            call()
    finally:
        sys.settrace(before)
    return {kind: count for kind, count in found.items() if count}


def _code(kind: Any) -> CodeType | None:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code if isinstance(code, CodeType) else None


@cache
def _statements_of(code: CodeType) -> dict[int, ast.stmt]:
    """Line -> the innermost statement that it belongs to."""
    try:
        lines, start = inspect.getsourcelines(code)
    except OSError:
        return {}
    (function,) = ast.parse(textwrap.dedent("".join(lines))).body
    found: dict[int, ast.stmt] = {}
    for node in ast.walk(function):  # outer ones come first
        if isinstance(node, ast.stmt) and node is not function:
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line + start - 1] = node
    return found


@dataclass(frozen=True)
class _Value:
    """What is known of a value: numbers for itself, and for what it stems from."""

    same: frozenset[int]  # itself, and the values of which it is another view
    ancestors: frozenset[int] = frozenset()
    modules: int = 0  # how many calls of modules lie between the arguments and it
    argument: bool = False
    direct: bool = False  # it is what a call of a module returned
    is_tuple: bool = False


class _Flow:
    """Follows the values of one call of a forward, from statement to statement."""

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame
        self._numbers = itertools.count()
        self._values = {
            name: _Value(frozenset([next(self._numbers)]), argument=True)
            for name in frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
            if not _NO_BRANCH.search(name)
        }

    def run(self, statement: ast.stmt) -> int:
        """The number of residual additions that the statement makes, which is about to run."""
        added = sum(self._skip(*pair) is not None for pair in self._sums(statement))
        value = getattr(statement, "value", None)
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found = self._value(value)
            if isinstance(statement, ast.AugAssign):
                found = self._joined([self._value(statement.target), found])
            for name in {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
                self._values.pop(name, None)
                if found is not None:
                    self._values[name] = found
        return added

    def _sums(self, statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            yield statement.target, statement.value
        waiting: list[ast.AST] = [statement]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                yield node.left, node.right
            elif isinstance(node, ast.Call) and "add" in _name(node.func).split("_"):
                # As in `dropout_add(x, residual)` and `x.add(y)`.
                pair = node.args[:2]
                if len(pair) == 1 and isinstance(node.func, ast.Attribute):
                    pair = [node.func.value, *pair]
                if len(pair) == 2:
                    yield pair[0], pair[1]
            waiting += self._operands(node)

    def _operands(self, node: ast.AST) -> list[ast.AST]:
        """The parts of an expression that are computed, not the statements in a statement."""
        if isinstance(node, ast.IfExp):
            test = compile(ast.Expression(node.test), "<condition>", "eval")
            holds = eval(test, self._frame.f_globals, self._frame.f_locals)
            return [node.body if holds else node.orelse]
        return [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt)]

    def _skip(self, left: ast.AST, right: ast.AST) -> _Value | None:
        """Which of two values that are added is the skip connection; None: it is no residual."""
        sides = [(_name(side), self._value(side)) for side in (left, right)]
        if any(_NO_BRANCH.search(name) or not v or v.is_tuple for name, v in sides):
            return None
        for (name, skip), (_, branch) in (sides, sides[::-1]):
            assert skip is not None
            assert branch is not None
            deeper = branch.modules > skip.modules
            if deeper and (skip.same & branch.ancestors or skip.argument):
                return skip
            if skip.direct and skip.ancestors & branch.ancestors and _SKIP.search(name):
                return skip  # a projection
        return None

    def _value(self, node: ast.AST) -> _Value | None:
        """What an expression comes to; None where nothing of the arguments is in it."""
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        found = self._joined(self._value(part) for part in self._operands(node))
        if found is None:
            return None
        own = frozenset([next(self._numbers)])
        if isinstance(node, ast.Call):
            functions = [node.func, *(a for a in node.args if isinstance(a, ast.Attribute))]
            if any(_root(function) == "self" for function in functions):
                return replace(found, same=own, modules=found.modules + 1, direct=True)
            if any(self._value(part) is not None for part in node.args):
                return replace(found, same=own)  # a function; x.view(...) is a method of x
        if isinstance(node, ast.BinOp):
            skip = self._skip(node.left, node.right) if isinstance(node.op, ast.Add) else None
            if skip is None:
                return replace(found, same=own)
            return replace(found, modules=skip.modules)
        is_tuple = isinstance(node, ast.Tuple) or (
            isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)
        )
        return replace(found, is_tuple=is_tuple)

    def _joined(self, parts: Iterable[_Value | None]) -> _Value | None:
        known = [part for part in parts if part is not None]
        if not known:
            return None
        same = frozenset(n for part in known for n in part.same)
        ancestors = same.union(*(part.ancestors for part in known))
        own = frozenset([next(self._numbers)])
        return _Value(same | own, ancestors, max(part.modules for part in known))


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
