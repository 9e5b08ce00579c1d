"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import stochastic_depth

pytestmark = pytest.mark.oldest

MODULES = [
    module.name
    for module in pkgutil.walk_packages(stochastic_depth.__path__, "stochastic_depth.")
    # The adapters' libraries are optional: their examples run in the tests of the adapters.
    if not module.name.startswith("stochastic_depth.integrations")
]


@pytest.mark.parametrize("name", ["stochastic_depth", *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output"
