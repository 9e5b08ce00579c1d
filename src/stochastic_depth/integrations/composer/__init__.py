"""Stochastic depth for MosaicML Composer, in the place of Composer's own: one import changes.

    from stochastic_depth.integrations.composer import StochasticDepth, apply_stochastic_depth

- `algorithm`: what the Trainer calls at which event
- `functional`: Composer's arguments in the words of `sd.apply_stochastic_depth`
- `networks`: which network inside of a ComposerModel is watched, and with which example
- `targets`: which blocks `target_layer_name` stands for
- `warmup`: how far the training has come, in Composer's time
- `checkpoints`: what a checkpoint needs so that it can be resumed from
- `waiting`: whether waiting for data eats what stochastic depth saves

Tested with Composer 0.32.1.
"""

from stochastic_depth.integrations.composer.algorithm import StochasticDepth
from stochastic_depth.integrations.composer.functional import apply_stochastic_depth

__all__ = ["StochasticDepth", "apply_stochastic_depth"]
