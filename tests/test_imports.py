"""Importing the package loads torch, and none of the libraries that it can work with."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oldest

SOURCE = Path(__file__).parents[1] / "src" / "stochastic_depth"
CORE = [path for path in SOURCE.rglob("*.py") if "integrations" not in path.parts]
ALLOWED = {"stochastic_depth", "torch", *sys.stdlib_module_names}
# What torch 2.6 needs itself and loads a part of later than newer ones do.
TORCHS_OWN = {"sympy", "mpmath"}


def imported(tree: ast.AST) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_core_imports_torch_and_the_standard_library_alone(path: Path) -> None:
    assert imported(ast.parse(path.read_text())) <= ALLOWED


def test_importing_the_package_loads_no_optional_library() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import stochastic_depth\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(loaded) <= ALLOWED | TORCHS_OWN
