"""Promise: a branch may talk to other ranks where all draw the same; else it is refused, no hang.

A synchronised BatchNorm, experts on other ranks. Real processes over gloo.
"""

from __future__ import annotations

import pytest

from collective_cases import cases
from processes import results_of

pytestmark = pytest.mark.oldest


results = results_of("collective_cases.py", 2, seconds=200)


@pytest.mark.parametrize("case", cases())
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
