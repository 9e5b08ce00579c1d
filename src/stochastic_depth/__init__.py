"""Stochastic depth: train residual networks with whole blocks skipped at random, for real.

`apply_stochastic_depth` puts it on a model, the handle that it returns takes it off again.
"""

from stochastic_depth.counting import CallCount
from stochastic_depth.depth import apply_stochastic_depth, prune
from stochastic_depth.discovery import find_residual_blocks
from stochastic_depth.discovery.blocks import ResidualBlock, ResidualBranch
from stochastic_depth.draw import Draw
from stochastic_depth.errors import (
    ActiveDropPathError,
    ChangedModelError,
    ExampleInputsError,
    NoResidualBlocksError,
    OptionError,
    RecomputationError,
    RefusedBlockError,
    SelectionError,
    SetupError,
    StateMismatchError,
    StochasticDepthError,
    StochasticDepthWarning,
)
from stochastic_depth.estimating import BlockSaving, Saving, drop_rate_for, estimate_saving
from stochastic_depth.folding import fold_state_dict
from stochastic_depth.handle import StochasticDepth, get_stochastic_depth
from stochastic_depth.presets import (
    apply_drop_path,
    apply_layer_drop,
    apply_progressive_layer_dropping,
)
from stochastic_depth.residual import Residual
from stochastic_depth.schedules import constant, linear_decay, linear_warmup, piecewise_linear
from stochastic_depth.state import GatedBlock, GatedBranch

__version__ = "0.1.0"

__all__ = [
    "ActiveDropPathError", "BlockSaving", "CallCount", "ChangedModelError", "Draw",
    "ExampleInputsError", "GatedBlock", "GatedBranch", "NoResidualBlocksError", "OptionError",
    "RecomputationError", "RefusedBlockError", "Residual", "ResidualBlock", "ResidualBranch",
    "Saving", "SelectionError", "SetupError", "StateMismatchError", "StochasticDepth",
    "StochasticDepthError", "StochasticDepthWarning", "apply_drop_path", "apply_layer_drop",
    "apply_progressive_layer_dropping", "apply_stochastic_depth", "constant", "drop_rate_for",
    "estimate_saving", "find_residual_blocks", "fold_state_dict", "get_stochastic_depth",
    "linear_decay", "linear_warmup", "piecewise_linear", "prune",
]  # fmt: skip


def __dir__() -> list[str]:
    """The public names, and not the modules that they lie in."""
    return [*__all__, "__version__"]
