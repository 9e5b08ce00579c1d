"""Promise: copies of shards (HSDP) and tensor parallel train as one process does.

Real processes over gloo, four of them.
"""

from __future__ import annotations

import pytest

from mesh_cases import cases
from processes import results_of

pytestmark = pytest.mark.oldest


results = results_of("mesh_cases.py", 4)


@pytest.mark.parametrize("case", cases())
def test_on_four_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
