"""`Residual`: a residual connection for authors of new models, which asks its gate itself."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import OptionError, SetupError
from stochastic_depth.gating.block import decide
from stochastic_depth.gating.gate import running
from stochastic_depth.gating.recomputation import remembered


class Residual(nn.Module):
    """`x + branch(x)`: a residual connection that `apply_stochastic_depth` finds without a watch.

    Without stochastic depth it is that sum and nothing else; it has no parameters of its own. With
    it, a dropped call returns a copy of `x` and the branch does not run. A branch that ends in a
    function, not in a module, is multiplied all the same.

    Residuals of one layer (a class that the model uses more than once) are the branches of one
    block, named after the layer; any other is a block of its own.

    Args:
        branch: The branch, a module, where it is to be a part of this one (then `residual(x)` is
            enough). None: it is passed at every call, a module or a method of one.

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
            branch: A module or a method of one: it is called with x and `args`.
            args: What else the branch takes. In mode "sample", tensors whose first dimension is
                as long as that of x follow its rows.
            skip: What the branch's value is added to, of the same shape; None: x. A block that
                changes its shape passes a projection of x.

        Returns:
            The sum; a copy of the skip where the call is dropped for the whole batch.

        Raises:
            OptionError: There is no branch, or two, or it is no module's.
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
        if not torch.compiler.is_compiling():
            return _call(self, branch, skip, (x, *args))
        if self.training or gate.plan.forcing:
            call: Callable[..., Tensor] = torch.compiler.disable(_call)
            return call(self, branch, skip, (x, *args))
        factors = gate.plan.inference_factors(gate.units)
        return _sum(gate.name, skip, branch(x, *args), 1.0 if factors is None else factors[0])

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in its place."""
        gate = self._stochastic_depth
        if self.branch is None or gate is not None:
            raise SetupError(
                "torch.jit.script met an sd.Residual "
                + ("with its gate" if gate is not None else "whose branch is passed at every call"),
                expected="a plain model, whose branches are parts of their sd.Residual",
                instead="call depth.fold() first, write sd.Residual(branch) and call residual(x); "
                "or use torch.export",
            )
        return _Scripted(self.branch)


class _Scripted(nn.Module):
    """`skip + branch(x)`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The sum."""
        return (x if skip is None else skip) + self.branch(x)


def _call(
    residual: Residual, branch: Callable[..., Tensor], skip: Tensor, args: tuple[Any, ...]
) -> Tensor:
    """`skip + branch(*args)`, as it is decided about this call."""
    gate = residual._stochastic_depth
    if running.open_all:
        return skip + branch(*args)
    holder = branch.__self__ if isinstance(branch, MethodType) else branch
    if not isinstance(holder, nn.Module):
        raise OptionError(
            f'the branch of "{gate.name}" is {branch!r}',
            expected="a module, or a method of one, whose parameters can be told",
            instead="make it a method of the layer: residual(x, self.feed_forward)",
        )
    decision = remembered(gate, lambda: decide(gate, residual, lambda: len(skip), holder))
    factor = 1.0 if decision.factors is None else decision.factors[0]
    rows = None if decision.rows is None else decision.rows[0]
    if not decision.kept[0]:  # a copy: what follows may change it in place
        decision.setup.skip(holder)
        return skip.clone()
    if rows is None:
        return _sum(gate.name, skip, branch(*args), factor)
    # The sum on these rows of the batch; the others come to the skip.
    some, rest = rows.cut(skip, 0)
    others = [
        rows.cut(value, 0)[0]
        if isinstance(value, Tensor) and value.shape[:1] == skip.shape[:1]
        else value
        for value in args
    ]
    return rows.join(_sum(gate.name, some, branch(*others), factor), 0, rest)


def _sum(name: str, skip: Tensor, value: Any, factor: float) -> Tensor:
    """The sum; raises where a branch's value cannot be added to the skip as it is."""
    is_tensor = isinstance(value, Tensor)
    is_traced: bool = torch._C._get_tracing_state() is not None  # there sizes are tensors
    if not is_traced and not (is_tensor and value.shape == skip.shape):
        what = f"of shape {tuple(value.shape)}" if is_tensor else "that is no tensor"
        raise OptionError(
            f'the branch of "{name}" returned a value {what}',
            expected=f"a tensor of shape {tuple(skip.shape)}, as what it is added to",
            instead="pass skip= with a projection where the branch changes the shape; and in mode "
            '"sample" what else holds the batch as arguments, residual(x, branch, mask)',
        )
    return skip + value if factor == 1.0 else torch.add(skip, value, alpha=factor)
