"""Which blocks `target_layer_name` stands for."""

from __future__ import annotations

from fnmatch import fnmatchcase

from composer.algorithms.stochastic_depth import stochastic_depth as composers
from torch import nn

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.errors import SelectionError, nearest


class Target:
    """A predicate on residual blocks, which remembers what there was to choose from.

    Args:
        name: A key of Composer's registry ("ResNetBottleneck"), the name of a class or of one of
            its bases ("BasicBlock"), the name of a block, or a glob ("layer3.*").
        network: The network that is watched.
        prefix: What precedes the network's names in the model around it; globs may begin with it.
    """

    def __init__(self, name: str, network: nn.Module, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self._network = type(network).__name__
        self._modules = dict(network.named_modules())
        self._registered = composers._STOCHASTIC_LAYER_MAPPING.get(name, (None,))[0]
        self._seen: list[ResidualBlock] = []
        self.matched = 0

    def __call__(self, block: ResidualBlock) -> bool:
        """Whether the block is meant."""
        self._seen.append(block)
        module = self._module(block)
        if self._registered is not None:
            meant = isinstance(module, self._registered)
        else:
            classes = {kind.__name__ for kind in type(module).__mro__}
            names = (block.name, self._prefix + block.name)
            meant = self._name in classes or any(fnmatchcase(name, self._name) for name in names)
        self.matched += meant
        return meant

    def _module(self, block: ResidualBlock) -> nn.Module:
        return self._modules.get(block.name) or self._modules[block.block_module]

    def nothing(self) -> SelectionError:
        """The error where no block is meant."""
        kinds = dict.fromkeys(block.kind for block in self._seen)
        names = dict.fromkeys(block.name for block in self._seen)
        registered = [
            key
            for key, (kind, _) in composers._STOCHASTIC_LAYER_MAPPING.items()
            if any(isinstance(self._module(block), kind) for block in self._seen)
        ]
        return SelectionError(
            f'target_layer_name is "{self._name}", which matches none of the {len(names)} residual '
            f"blocks of {self._network}",
            expected="a layer of Composer's registry, the name of the blocks' class, a name or "
            "glob of blocks, or None for all of them",
            instead=nearest(self._name, [*registered, *kinds, *names]),
        )
