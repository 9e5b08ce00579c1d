"""Promise: FSDP as transformers and Accelerate set it up trains gated models and resumes."""

from __future__ import annotations

import pytest

from accelerate_cases import CASES
from processes import results_of

results = results_of("accelerate_cases.py", 2)


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
