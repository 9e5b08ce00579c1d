"""Promise: under `fully_shard`, with the same draws everywhere, gradients are those of one process.

Real processes over gloo. What is not shown here is refused by name.
"""

from __future__ import annotations

import pytest

from fsdp_cases import cases
from processes import results_of

results = results_of("fsdp_cases.py", 2)


@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
