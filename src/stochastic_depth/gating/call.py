"""The `__call__` of a gated module: the fast way. What is rare goes on in `block` and `branch`.

Nearly all calls are those of a block in training, all of whose branches run or none, and of the
modules of its branches. They come here, in one piece, for here a microsecond counts.

While torch.compile or torch.export traces it, in inference a call becomes a part of the graph. In
training a gate is where one graph ends and the next begins: the call then comes back without a
trace, while torch waits for more to compile.
"""

from __future__ import annotations

from sys import modules
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.distributed import is_running
from stochastic_depth.errors import warn
from stochastic_depth.gating import block, branch
from stochastic_depth.gating.gate import KEY, Gate, ModuleCall, Original, running
from stochastic_depth.gating.recomputation import next_noted, note
from stochastic_depth.gating.stand_in import stand_in_again
from stochastic_depth.plan import Row
from stochastic_depth.rows import change_leaves
from stochastic_depth.torch_private.backward import backward_task, of_hooks, top_hooks
from stochastic_depth.torch_private.tracing import ends_a_graph, set_compiler, traced_as

_plain_call = nn.Module.__call__  # torch.fx puts another one in its place while it traces
_impl: Original = nn.Module._call_impl
_grad_is_enabled = torch.is_grad_enabled
_NO_CHECKPOINTS = of_hooks(None)
_CHECKED = 16  # steps: how often a call in which nothing is due looks for replaced modules


def part_call(original: Original) -> Original:  # noqa: C901  (in one piece)
    """The `__call__` of a branch's module; `original` is that of the module's own class."""
    run = _impl if original is nn.Module.__call__ else original

    def call_part(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__  # each look-up at a module itself takes as long as ten in here
        try:
            gate: Gate = attributes[KEY]
        except KeyError:  # torch.compile has kept this call; the gate is gone since
            return original(self, *args, **kwargs)
        blocks = running.blocks
        if blocks and "_compiled_call_impl" not in attributes:
            owner, factors, passage, has_grad, seen = blocks[-1]
            if owner is gate.owner:
                has_one = len(args) == 1 and not kwargs  # no tuple need be made to call it
                if passage is None and (factors is None or not gate.role.ends):
                    return run(self, args[0]) if has_one else run(self, *args, **kwargs)
                # A checkpoint inside of the block recomputes its modules without it.
                if top_hooks(False) is None and _grad_is_enabled() is has_grad:  # noqa: FBT003
                    if passage is None:
                        role = gate.role
                        weights = role.weights if attributes.get("training") else ()
                        if has_one and not (weights and args[0].numel() >= branch.MANY_VALUES):
                            return branch.times(run(self, args[0]), role, factors)
                        call = ModuleCall(gate, self, run, args, kwargs)
                        return branch.run_multiplied(call, role, factors)
                    if passage is owner.closed:
                        return stand_in_again(gate, self, args, kwargs, seen)
        if "torch._dynamo" in modules and (compiler := set_compiler(None)) is not None:
            set_compiler(compiler)
            return call_between_graphs(self, original, args, kwargs)
        return branch.call_branch_module(ModuleCall(gate, self, original, args, kwargs))

    return traced_as(call_part, _trace_of(original))


def block_call(original: Original) -> Original:  # noqa: C901  (in one piece)
    """The `__call__` of a block's module, likewise."""
    run = _impl if original is nn.Module.__call__ else original

    def call_gated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: C901
        if "torch._dynamo" in modules and (compiler := set_compiler(None)) is not None:
            set_compiler(compiler)
            return call_between_graphs(self, original, args, kwargs)
        attributes = self.__dict__
        try:
            gate: Gate = attributes[KEY]
        except KeyError:
            return original(self, *args, **kwargs)
        plan = gate.plan
        hooks = top_hooks(False)  # noqa: FBT003
        if not gate.is_fast or plan.forcing or plan.graphs or (hooks is not None and is_running()):
            call = ModuleCall(gate, self, original, args, kwargs)
            return branch.call_branch_module(call) if gate.roles else block.call_block(call)
        passage: Any = None
        logs, recomputed = _NO_CHECKPOINTS if hooks is None else of_hooks(hooks)
        has_grad, has_one = _grad_is_enabled(), len(args) == 1 and not kwargs
        if attributes["training"] and has_grad and (recomputed or backward_task() == -1):
            if recomputed:
                row = next_noted(gate, recomputed)
                if not isinstance(row, Row):  # of a forward that went the slow way
                    note(logs, gate, row)
                    return block.carry_out(ModuleCall(gate, self, original, args, kwargs), row)
            else:
                step = plan.clock.step
                if gate.step == step:
                    number = gate.calls
                    gate.calls = number + 1
                else:
                    gate.step, gate.calls, number = step, 1, 0
                row = plan.row
                if row.number != number or row.step != step:
                    row = block.begin(gate, self, number)
            if logs:
                note(logs, gate, row)
            runs = row.states[gate.index]
            is_usual = (has_one and gate.takes_one) or gate.known.include(args, kwargs)
            if runs is False and is_usual:
                if gate.whole is not None and not attributes["_forward_hooks"]:
                    # The first argument may be a tuple that holds the tensor.
                    if gate.returns_first and args and isinstance(args[0], Tensor):
                        return args[0]
                    if not gate.returns_copy:
                        return gate.whole.build(args, kwargs, positional=gate.known.positional)
                passage = gate.closed
            if (not runs and passage is None) or "_compiled_call_impl" in attributes:
                return block.run_drawn(ModuleCall(gate, self, original, args, kwargs), row)
            factors = row.factors[gate.index]
            # A module that was replaced has no gate, and where nothing is due it needs none.
            if gate.asleep and factors is None and row.step % _CHECKED:
                return run(self, args[0]) if has_one else run(self, *args, **kwargs)
            is_checked = passage is not None or factors is not None or not row.step % _CHECKED
        elif (
            attributes["training"]
            or nn.Module.__call__ is not _plain_call
            or "_compiled_call_impl" in attributes
            or is_running()
            or hooks is not None
            or backward_task() != -1  # a checkpoint, whose forward may have been forced
        ):
            return block.call_block(ModuleCall(gate, self, original, args, kwargs))
        else:
            factors, is_checked = plan.for_inference()[gate.index], True
        try:
            for path in gate.parts if is_checked else ():
                part = attributes
                for name in path:
                    part = part["_modules"][name].__dict__
                part[KEY]
        except (KeyError, AttributeError):  # replaced; or wrapped (for a checkpoint, say)
            block.check_parts(gate, self)
        if gate.asleep is (factors is not None):  # asleep, but needed; or awake for nothing
            block.set_ends(gate, self, awake=factors is not None)
        blocks = running.blocks
        seen = None if passage is None else [None, None]
        blocks.append((gate, factors, passage, has_grad, seen))
        try:
            return run(self, args[0]) if has_one else run(self, *args, **kwargs)
        finally:
            blocks.pop()

    return traced_as(call_gated, _trace_of(original))


def _trace_of(original: Original) -> Original:
    def trace(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return traced_call(self, original, args, kwargs)

    return trace


def traced_call(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A gated module's call in a trace."""
    gate: Any = getattr(module, KEY, None)
    if gate is None:
        return original(module, *args, **kwargs)
    if gate.units:
        is_open = gate.simple_ends and not (module.training or gate.plan.forcing)
        factors = gate.plan.inference_factors(gate.units) if is_open else None
        if not is_open or (gate.asleep and set(factors or (1.0,)) != {1.0}):
            return call_between_graphs(module, original, args, kwargs)
        gate.scales = factors
    scales = gate.owners[0].scales if gate.owners else None
    if scales is False:  # the graph begins inside of the block
        return call_between_graphs(module, original, args, kwargs)
    output = original(module, *args, **kwargs)
    if gate.units:
        gate.scales = False
    role = gate.role
    if role is not None and role.ends and scales is not None:
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
    gate: Gate | None = module.__dict__.get(KEY)
    if gate is None:
        return original(module, *args, **kwargs)
    if gate.units and module.training and not gate.plan.told_of_graphs:
        gate.plan.told_of_graphs = True
        warn(
            "torch.compile(model) meets the gates of a model that trains: each ends a graph, and "
            "the blocks are compiled one by one. depth.compile() does so without looking for "
            "larger graphs first"
        )
    call = branch.call_branch_module if gate.roles else block.call_block
    before, running.compiler = running.compiler, set_compiler(None)
    try:
        return call(ModuleCall(gate, module, original, args, kwargs))
    finally:
        set_compiler(running.compiler)
        running.compiler = before
