"""A gated module's call while torch.compile or torch.export traces it, and what comes of it.

In inference it becomes a part of the graph. In training a gate is where one graph ends and the next
begins: the call then comes back without a trace, while torch waits for more to compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.gating.block import call_block
from stochastic_depth.gating.branch import call_branch_module
from stochastic_depth.gating.gate import KEY, Gate, ModuleCall, Original, running
from stochastic_depth.rows import change_leaves
from stochastic_depth.torch_private.tracing import ends_a_graph, set_compiler


def traced_call(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A gated module's call in a trace."""
    gate: Any = module._stochastic_depth
    if gate.units and (module.training or gate.plan.forcing or not gate.simple_ends):
        return call_between_graphs(module, original, args, kwargs)
    if gate.units:
        gate.scales = gate.plan.inference_factors(gate.units)
    output = original(module, *args, **kwargs)
    role = gate.role
    if role is not None and role.ends and gate.owners[0].scales is not None:
        scales = gate.owners[0].scales
        output = _scaled(output, {leaf: scales[branch] for leaf, branch in role.ends.items()})
    return output


def _scaled(output: Any, scales: dict[int, Any]) -> Any:
    """An output with these of its leaves multiplied."""
    if isinstance(output, Tensor):
        return _times(output, scales[0])
    if type(output) is tuple and all(part is None or isinstance(part, Tensor) for part in output):
        parts = enumerate(output)  # torch 2.6 cannot follow a `tree_map`
        return tuple([_times(part, scales[n]) if n in scales else part for n, part in parts])
    return change_leaves(output, scales, lambda leaf, number: _times(leaf, scales[number]))


def _times(value: Tensor, scale: Any) -> Tensor:
    """The product, with a factor that is not rounded to half a precision before."""
    if isinstance(scale, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.float() * scale).to(value.dtype)
    return value * scale


@ends_a_graph(
    "what stochastic depth drops is drawn anew at every call, outside of all graphs: leave "
    "fullgraph=True out, or call depth.compile(), which compiles block by block"
)
def call_between_graphs(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A call that no graph holds; the block's forward beneath it is compiled as before."""
    gate: Gate = module.__dict__[KEY]
    call = call_branch_module if gate.roles else call_block
    before, running.compiler = running.compiler, set_compiler(None)
    try:
        return call(ModuleCall(gate, module, original, args, kwargs))
    finally:
        set_compiler(running.compiler)
        running.compiler = before
