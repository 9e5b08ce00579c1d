"""Promise: under DistributedDataParallel gradients are those of the ranks' average, or None.

Plain DistributedDataParallel, without `find_unused_parameters`; real processes over gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ddp_cases import cases
from processes import launch

pytestmark = [pytest.mark.oldest]


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return launch("ddp_cases.py", request.param, folder)


@pytest.mark.parametrize("case", cases())
def test_on_real_processes(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
