"""Where a branch can be multiplied, and the parameters that can take the factor over.

Two questions about the way from the branch's modules to the sum. *Scalable*: is the branch, as a
function of what its last modules hand out, homogeneous of degree one, so that multiplying there
multiplies the branch? *Foldable*: does every way back from the sum meet an operation that is
affine in its own parameters, so that the plain model can carry the factor in its weights?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochastic_depth.discovery import operations
from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.grouping import Site
from stochastic_depth.discovery.memory import Layout, memory_of
from stochastic_depth.discovery.operations import Kind, is_real_or_complex
from stochastic_depth.discovery.recording import Call, Node, Recording, reached


def ends_of(site: Site, addition: Addition) -> tuple[tuple[tuple[int, int], ...], str | None, bool]:
    """Where to multiply a branch: the outputs that its sum is made of without a module between.

    Returns:
        Positions of its modules, and leaves of their outputs; why multiplying there would not
        multiply the branch exactly once, or None; whether the branch is known to be zero where all
        of these outputs are.
    """
    nodes, calls = site.recording.nodes, list(enumerate(addition.branch_calls))
    # A module without weights that is called several times, a dropout say, counts as an operation
    # behind the last module that has some: so each end is called once.
    once = [
        (position, call)
        for position, call in calls
        if site.times[call.module] == 1
        or any(n.meets_parameter for n in nodes[call.start : call.end])
    ]
    found = _ends_among(site, addition, once)
    is_found = bool(found[0]) and found[1] is None
    return found if is_found or len(once) == len(calls) else _ends_among(site, addition, calls)


def _ends_among(
    site: Site, addition: Addition, calls: Sequence[tuple[int, Call]]
) -> tuple[tuple[tuple[int, int], ...], str | None, bool]:
    """The ends among these calls, by their positions in the branch."""
    nodes, path = site.recording.nodes, set(addition.path)
    place_of = {
        index: (position, number)
        for position, call in calls
        for number, index in enumerate(call.outputs)
        if index in path
    }

    def onwards(value: int) -> list[int]:
        return [i for i in nodes[value].inputs if i in path] if value not in place_of else []

    values = set(reached([addition.branch], onwards))
    ends, in_line = values & place_of.keys(), sorted(values - place_of.keys())
    final = max((place_of[index][0] for index in ends), default=0)
    last = {index for index in ends if place_of[index][0] == final}
    power, why = _multiplied(site, addition.branch, ends, in_line)
    # A product of two modules' outputs is scaled by scaling one of them.
    if why is not None and _multiplied(site, addition.branch, last, in_line)[1] is None:
        ends, why = last, None
    scaled = tuple(sorted(place_of[index] for index in ends))
    return scaled, why, operations.is_zero(power)


def _multiplied(
    site: Site, branch: int, ends: Iterable[int], in_line: Sequence[int]
) -> tuple[int, str | None]:
    """The degree of a branch, and why a factor on the ends does not come out exactly once."""
    recording, nodes, allowed = site.recording, site.recording.nodes, {*in_line, *site.sums}
    degrees, tried = dict.fromkeys(ends, 1), dict[int, Tensor]()
    for index in in_line:
        degrees[index] = _degree_of(recording, nodes[index], degrees, tried)
    if degrees.get(branch) != 1:
        why = f"it ends in {nodes[branch].op}, computed in line behind its last module"
        return degrees.get(branch, 0), why
    for index in [index for index, power in degrees.items() if power]:
        for user in recording.consumers[index]:
            # Another form of a value, with which nobody computes, does not count.
            is_form = nodes[user].kind in (Kind.MOVE, Kind.JOIN) and not recording.consumers[user]
            if user not in allowed and not is_form:
                return 1, f"{recording.module_at(user)} computes with what it ends in, too"
    return 1, None


def _degree_of(
    recording: Recording, node: Node, degrees: Mapping[int, int], tried: dict[int, Tensor]
) -> int:
    """The degree of a value; where its operation is not in the table it is tried on zeros.

    Args:
        recording: The watched forward.
        node: The value.
        degrees: Those of its inputs; 0 for all others.
        tried: What such operations have come to so far.
    """
    of_inputs = [degrees.get(source, 0) for source in node.inputs]
    found = operations.degree(node.kind, node.op, of_inputs)
    if found != operations.UNKNOWN or operations.UNKNOWN in of_inputs or node.replay is None:
        return found
    # The minimum of zero and of a number above zero is zero.
    made = [_tried(recording, node, of_inputs, tried, sign) for sign in (-1, 1)]
    found_zero = [value for value in made if value is not None]
    if not found_zero:
        return operations.UNKNOWN
    return operations.VANISHES if all(found_zero) else operations.FINITE


def _tried(
    recording: Recording, node: Node, degrees: Sequence[int], tried: dict[int, Tensor], sign: int
) -> bool | None:
    """Whether an operation comes to zero where these inputs do; None: it fails, or is not finite.

    Args:
        recording: The watched forward.
        node: What it makes.
        degrees: Those of its inputs.
        tried: As in `_degree_of`.
        sign: Of the first value of each other input.
    """
    cuda = [node.device] if node.device.type == "cuda" else []
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        inputs = []
        for index, power in zip(node.inputs, degrees, strict=True):
            like = recording.nodes[index]
            is_bool = like.dtype is torch.bool
            # Nobody knows what the others are; an index may be 0.
            is_other = not operations.is_zero(power) and (is_real_or_complex(like.dtype) or is_bool)
            is_other = is_other and like.op not in operations.ZEROS
            some = torch.arange(1, like.shape.numel() + 1).sin().mul(sign * is_other)
            some = tried.get(index, (some > 0 if is_bool else some).view(like.shape))
            inputs.append(some.to(like.device, like.dtype, copy=True))
        assert node.replay is not None
        made = node.replay(*inputs)
        made = made if isinstance(made, Tensor) else made[node.index - node.operation]
        tried[node.index] = made
        if made.isfinite().all():
            return not made.any()
    return None


@dataclass(frozen=True, slots=True)
class Fold:
    """The parameters that take a branch's factor over, or why there are none."""

    parameters: tuple[str, ...] = ()
    obstacle: str | None = None


class _ObstacleError(Exception):
    """Why a branch cannot be folded."""


class Folding:
    """Finds the parameters that the factors of branches can go into.

    Args:
        recording: The watched forward.
        model: The model that was watched.
    """

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self.recording = recording
        self._uses: dict[str, set[int]] = {}  # of each parameter, the operations with data
        for node in recording.nodes:
            for name in parameters_at(recording, [node.index]):
                self._uses.setdefault(name, set()).add(node.operation)
        self._parameters = dict(model.named_parameters())
        self._in_memory: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in (*self._parameters.items(), *model.named_buffers()):
            self._in_memory.setdefault(memory_of(tensor), []).append((name, tensor))
        self._holders: dict[nn.Parameter, list[str]] = {}
        for holder, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(parameter, []).append(holder)

    def folds(self, branches: Sequence[Sequence[Addition]]) -> list[Fold]:
        """What the factors of a block's branches can go into.

        Args:
            branches: For each branch, its addition in each call of the block.
        """
        sums = {addition.node for calls in branches for addition in calls}
        taken = [self._taken(calls, sums) for calls in branches]
        inside = {use for uses in taken if isinstance(uses, dict) for use in uses}
        return [
            Fold(obstacle=uses) if isinstance(uses, str) else self._exclusive(uses, inside)
            for uses in taken
        ]

    def _exclusive(self, taken: dict[int, list[str]], inside: set[int]) -> Fold:
        """The fold, or the obstacle that a parameter is used outside of the block's folds."""
        names = dict.fromkeys(name for of_use in taken.values() for name in of_use)
        for name in names:
            parameter = self._parameters[name]
            for other, tensor in self._in_memory[memory_of(parameter)]:
                if tensor is not parameter and Layout.of(parameter).shares(Layout.of(tensor))[0]:
                    return Fold(obstacle=f"{name} lies in the same memory as {other}")
            holders = self._holders[parameter]
            idle = [holder for holder in holders if holder not in self.recording.calls_of]
            if idle and len(holders) > 1:
                user = next((holder for holder in holders if holder not in idle), name)
                return Fold(
                    obstacle=f"{user} shares a weight with {idle[-1]}, which was not called"
                )
            for use in sorted(self._uses[name] - inside):
                return Fold(obstacle=f"{name} is shared with {self.recording.module_at(use)}")
        return Fold(tuple(names))

    def _taken(self, calls: Sequence[Addition], sums: set[int]) -> dict[int, list[str]] | str:
        """For each operation that scales a branch, the parameters that do; or an obstacle."""
        if not calls:
            return "its branch was not watched: pass example_inputs to apply"
        recording, nodes = self.recording, self.recording.nodes
        path = {value for addition in calls for value in addition.path}
        taken: dict[int, list[str]] = {}

        def onwards(value: int) -> list[int]:
            names, data = self._step(nodes[value], path)
            taken.update({nodes[value].operation: names} if names else {})
            return data

        try:
            seen = list(reached([addition.branch for addition in calls], onwards))
        except _ObstacleError as obstacle:
            return str(obstacle)
        walked = {nodes[index].operation for index in (*seen, *sums)}
        made = {made for index in seen for made in recording.made_with(index)}
        users = {user for index in made for user in recording.consumers[index]}
        if any(nodes[user].operation not in walked for user in users):
            return "its last operations feed more than the sum"
        return taken

    def _step(self, node: Node, path: set[int]) -> tuple[list[str], list[int]]:
        """One operation on the way back: the parameters that scale it, and where the way goes on.

        A bias of a product, where it has one, has to be a parameter, too.
        """
        recording, where = self.recording, self.recording.module_at(node.index)
        data = [index for index in node.inputs if index in path]
        weights = [index for index in node.inputs if recording.nodes[index].of_parameters]
        names = [name for index in weights if (name := self._name(index)) is not None]
        if len(names) < len(weights):
            raise _ObstacleError(f"a weight of {where} is itself computed (weight norm?)")
        if node.kind in operations.NORMS:
            if len(names) < (2 if node.kind is Kind.BATCH_NORM else 1):
                raise _ObstacleError(f"the norm {where} has no weight")
            return names, []
        if node.kind in operations.PRODUCTS and weights and len(weights) + 1 == len(node.inputs):
            return names, []
        # What is added to data is scaled with it.
        scaled = {*data, *weights} if node.kind in operations.SUMS else set(data)
        degrees = [int(index in scaled) for index in node.inputs]
        if operations.degree(node.kind, node.op, degrees) == 1:
            return names if node.kind in operations.SUMS else [], data
        raise _ObstacleError(
            f"its last operation, {node.op} in {where}, is not affine in parameters of its own"
        )

    def _name(self, index: int) -> str | None:
        """The parameter that a value is, but for moves of its elements."""
        node = self.recording.nodes[index]
        while node.parameter is None:
            if node.kind is not Kind.MOVE or len(node.inputs) != 1:
                return None
            node = self.recording.nodes[node.inputs[0]]
        return node.parameter


def parameters_at(recording: Recording, nodes: Iterable[int]) -> frozenset[str]:
    """The parameters that these operations meet, at first hand or made into something else."""
    made_of = [
        source
        for index in nodes
        if recording.nodes[index].kind is not Kind.MOVE
        for source in recording.nodes[index].inputs
        if recording.nodes[source].of_parameters
    ]
    found = (recording.nodes[index].parameter for index in recording.behind(made_of, 0))
    return frozenset(name for name in found if name is not None)
