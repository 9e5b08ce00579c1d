"""Promise: under DistributedDataParallel gradients are those of the ranks' average, or None.

Plain DistributedDataParallel, without `find_unused_parameters`; real processes over gloo.
"""

from __future__ import annotations

import pytest

from ddp_cases import cases
from processes import results_of

on_two, on_four = results_of("ddp_cases.py", 2), results_of("ddp_cases.py", 4)


@pytest.mark.oldest
@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(on_two: dict[str, str], case: str) -> None:
    assert not on_two[case], on_two[case]


@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks(on_four: dict[str, str], case: str) -> None:
    assert not on_four[case], on_four[case]
