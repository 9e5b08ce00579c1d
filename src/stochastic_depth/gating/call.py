"""The `__call__` of a gated module: the fast way. What is rare goes on in `block` and `branch`.

Nearly all calls are those of a block that runs or is skipped whole, in training, and of the modules
that end its branches. They come here, in one piece, for here a microsecond counts.
"""

from __future__ import annotations

from sys import modules
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.distributed.groups import is_running
from stochastic_depth.gating.block import begin, call_block, check_parts, run_drawn
from stochastic_depth.gating.branch import call_branch_module, run_multiplied
from stochastic_depth.gating.gate import KEY, Gate, Original
from stochastic_depth.gating.traced import call_between_graphs, traced_call
from stochastic_depth.torch_private.backward import backward_task, top_hooks
from stochastic_depth.torch_private.tracing import begins_no_graph, set_compiler

_impl: Original = nn.Module._call_impl
_plain_call = nn.Module.__call__  # torch.fx puts another one in its place while it traces
_grad_is_enabled = torch.is_grad_enabled


def gated_call(original: Original) -> Original:  # noqa: C901  (in one piece)
    """The `__call__` of a gated class; `original` is that of the module's own class."""
    run = _impl if original is nn.Module.__call__ else original

    @begins_no_graph
    def call_gated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: C901
        if is_dynamo_compiling():
            return traced_call(self, original, args, kwargs)
        if "torch._dynamo" in modules and (compiler := set_compiler(None)) is not None:
            set_compiler(compiler)
            return call_between_graphs(self, original, args, kwargs)
        own = self.__dict__
        gate: Gate = own[KEY]
        plan = gate.plan
        is_usual = not plan.forcing and not plan.graphs
        may_be_fast = is_usual and top_hooks(False) is None  # noqa: FBT003
        if may_be_fast and "_compiled_call_impl" not in own:
            role = gate.fast_role
            if role is not None:
                owner = gate.owners[0]
                if owner.depth and (_grad_is_enabled() or not self.training):
                    if owner.factors is None or not role.ends:
                        return run(self, *args, **kwargs)
                    return run_multiplied(self, run, role, owner.factors, args, kwargs)
            elif gate.is_fast and len(args) == 1 and not kwargs and backward_task() == -1:
                if self.training and _grad_is_enabled():
                    step = plan.clock.step
                    if gate.step == step:
                        number = gate.calls
                        gate.calls = number + 1
                    else:
                        gate.step, gate.calls, number = step, 1, 0
                    row = plan.row
                    if row.number != number or row.step != step:
                        row = begin(gate, self, number)
                    runs = row.states[gate.index]
                    if runs is False and gate.is_one_tensor and not own["_forward_hooks"]:
                        return args[0]
                    if not runs:
                        return run_drawn(gate, self, original, args, kwargs, row)
                    gate.factors = row.factors[gate.index]
                elif not self.training and nn.Module.__call__ is _plain_call and not is_running():
                    gate.factors = plan.factors_at(plan.clock.step, training=False)[gate.index]
                else:
                    return call_block(gate, self, original, args, kwargs)
                try:
                    for path in gate.parts:
                        part: Any = self
                        for name in path:
                            part = part._modules[name]
                        part.__dict__[KEY]
                except (KeyError, AttributeError):  # replaced, or wrapped
                    check_parts(gate, self)
                gate.depth += 1
                try:
                    return run(self, args[0])
                finally:
                    gate.depth -= 1
        if gate.roles:
            return call_branch_module(gate, self, original, args, kwargs)
        return call_block(gate, self, original, args, kwargs)

    return call_gated
