"""Promise: a compiled depth trains under DistributedDataParallel and `fully_shard` as eager does.

Real processes over gloo. Also in torchtitan's order: on the meta device, checkpoint wrappers, a
graph of each block, shards; the graphs made by torch.compile or by depth.compile.
"""

from __future__ import annotations

import pytest

from compile_cases import cases
from processes import results_of

results = results_of("compile_cases.py", 2)


@pytest.mark.parametrize("case", cases())
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
