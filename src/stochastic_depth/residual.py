"""`Residual`: a residual connection for authors of new models, which needs no watch to skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import OptionError, SetupError
from stochastic_depth.gating.explicit import call_explicit, survival


class Residual(nn.Module):
    """`x + branch(x)`: a residual connection that `apply_stochastic_depth` finds without a watch.

    Without stochastic depth it is that sum and nothing else; it has no parameters of its own. With
    it, a dropped call returns a copy of `x` and the branch does not run. The branch may be anything
    that can be called, so one that ends in a function, not in a module, is multiplied all the same.

    Residuals of one layer (a class that the model uses more than once) are the branches of one
    block, named after the layer; any other is a block of its own.

    Args:
        branch: The branch, where it is to be a part of this module (then `residual(x)` is enough,
            and `torch.jit.script` can follow). None: it is passed at every call.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import stochastic_depth as sd
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        ...         self.residual = sd.Residual()
        ...
        ...     def branch(self, x):
        ...         return torch.tanh(self.linear(self.norm(x)))
        ...
        ...     def forward(self, x):
        ...         return self.residual(x, self.branch)
        >>> model = nn.Sequential(*(Block() for _ in range(6)))
        >>> [block.name for block in sd.find_residual_blocks(model)]
        ['0', '1', '2', '3', '4', '5']
        >>> depth = sd.apply_stochastic_depth(model, 0.2, scale="train")
    """

    _is_stochastic_depth_residual = True  # for who looks for blocks

    def __init__(self, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self._stochastic_depth: Any = None  # its gate; an attribute, so that compiled code asks

    def forward(
        self,
        x: Tensor,
        branch: Callable[..., Tensor] | None = None,
        *args: Any,
        skip: Tensor | None = None,
    ) -> Tensor:
        """The sum.

        Args:
            x: The input, of any shape; in mode "sample" its first dimension is the batch.
            branch: A module, a method of one, or any function: it is called with x and `args`.
            args: What else the branch takes. In mode "sample", tensors whose first dimension is
                as long as that of x follow its rows.
            skip: What the branch's value is added to, of the same shape; None: x. A block that
                changes its shape passes a projection of x.

        Returns:
            The sum; a copy of the skip where the call is dropped for the whole batch.

        Raises:
            OptionError: There is no branch, or two.
        """
        if (self.branch is None) == (branch is None):
            raise OptionError(
                f"Residual was called with {'no' if branch is None else 'a second'} branch",
                expected="one branch, given to the constructor or to the call",
                instead="call residual(x, branch), or sd.Residual(branch) and residual(x), with "
                "more arguments of the branch residual(x, None, mask)",
            )
        branch = self.branch if branch is None else branch
        assert branch is not None
        skip = x if skip is None else skip
        gate = self._stochastic_depth
        if gate is None:
            return skip + branch(x, *args)
        if torch.compiler.is_compiling() and not self.training and gate.plan.forced is None:
            return torch.add(skip, branch(x, *args), alpha=survival(gate))
        call: Callable[..., Tensor] = call_explicit
        if torch.compiler.is_compiling():  # only then: it takes seconds to import
            call = torch.compiler.disable(call_explicit)
        return call(gate, self, branch, skip, (x, *args))

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in its place."""
        gate = self._stochastic_depth
        if self.branch is None:
            raise SetupError(
                "torch.jit.script met an sd.Residual whose branch is passed at every call",
                expected="a branch that is a part of it, since scripts pass no modules",
                instead="write sd.Residual(branch) and call residual(x); or use torch.export",
            )
        if gate is not None and (self.training or gate.plan.forced is not None):
            raise SetupError(
                f'torch.jit.script met "{gate.name}" in train mode, or within depth.fixed()',
                expected="a model for inference",
                instead="call model.eval() first, or depth.remove()",
            )
        return _Scripted(self.branch, 1.0 if gate is None else survival(gate))


class _Scripted(nn.Module):
    """`skip + factor * branch(x)`, for inference."""

    def __init__(self, branch: nn.Module, factor: float) -> None:
        super().__init__()
        self.branch, self.factor = branch, factor

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The sum."""
        return torch.add(x if skip is None else skip, self.branch(x), alpha=self.factor)
