"""Every example in a docstring of the adapter runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import stochastic_depth.integrations.composer as adapter

MODULES = [module.name for module in pkgutil.iter_modules(adapter.__path__, f"{adapter.__name__}.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output"


def test_there_are_examples() -> None:
    algorithm = importlib.import_module(f"{adapter.__name__}.algorithm")
    assert doctest.testmod(algorithm, optionflags=doctest.NORMALIZE_WHITESPACE).attempted
