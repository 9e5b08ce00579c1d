"""Promise: what once went wrong ends well, or in an error of ours.

The small programs lie beside the project; where they do not, there is nothing to run. The right
value of each is asserted in the file of its promise.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import stochastic_depth as sd

CASES = sorted((Path(__file__).parents[2] / "shared" / "cases").glob("*.py"))


@pytest.mark.skipif(not CASES, reason="needs shared/cases beside the project")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_no_case_ends_in_an_error_of_somebody_else(case: Path) -> None:
    if case.stem == "attentions_in_mode_sample":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        contextlib.suppress(sd.StochasticDepthError),
    ):
        warnings.simplefilter("ignore")
        runpy.run_path(str(case), run_name="__main__")
