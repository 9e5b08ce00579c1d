"""Block -> drop rate, from the rates at which a model drops branches of its own accord."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock, ResidualBranch
from stochastic_depth.discovery.existing import OwnDrop
from stochastic_depth.errors import ActiveDropPathError, warn


def rates_taken_over(
    model: nn.Module,
    found: Discovery,
    gated: Sequence[ResidualBlock],
    drops: Sequence[OwnDrop],
    *,
    chosen: bool,
) -> dict[str, float]:
    """The model's own rate of each gated block that has one.

    Args:
        model: The model that was watched.
        found: What was found.
        gated: The blocks to gate.
        drops: What the model drops by itself.
        chosen: Whether the user chose the blocks; then what is dropped elsewhere is given up.

    Raises:
        ActiveDropPathError: A block has two rates, or something is dropped that is no gated block.
    """
    of_branch = _by_branch(model, found, gated, drops, strict=not chosen)
    rates: dict[str, float] = {}
    partly: list[str] = []
    for block in gated:
        own = [of_branch.get(branch.name, []) for branch in block.branches]
        acting = [drop for of_one in own for drop in of_one]
        if other := next((drop for drop in acting if drop.rate != acting[0].rate), None):
            raise _two_rates(block, acting[0], other)
        if acting:
            rates[block.name] = acting[0].rate
            partly += [] if all(own) else [block.name]
    if not rates:
        raise _nowhere(drops[0], "it drops none of the gated blocks")
    if partly:
        warn(
            f'the model itself drops only some of the branches of {len(partly)} blocks ("'
            f'{partly[0]}"): now all of their branches have that rate'
        )
    return rates


def _by_branch(
    model: nn.Module,
    found: Discovery,
    gated: Sequence[ResidualBlock],
    drops: Sequence[OwnDrop],
    *,
    strict: bool,
) -> dict[str, list[OwnDrop]]:
    """What each branch of the gated blocks is dropped by.

    Raises:
        ActiveDropPathError: With `strict`, where something else is dropped.
    """
    of_branch: dict[str, list[OwnDrop]] = {}
    names = {block.name for block in gated}
    for drop in drops:
        targets = list(_targets(model, found, drop))
        for block, branch in targets:
            if block.name in names:
                of_branch.setdefault(branch.name, []).append(drop)
            elif strict:
                raise _nowhere(drop, f'block "{block.name}" is affine')
        if strict and not targets and _runs(found, drop):
            raise _nowhere(drop, "what it drops was not found as a residual block")
    return of_branch


def _targets(
    model: nn.Module, found: Discovery, drop: OwnDrop
) -> Iterator[tuple[ResidualBlock, ResidualBranch]]:
    """The branches that are dropped by it."""
    if drop.acts_on == "layers":
        names = {layer for owner in drop.modules for layer in _layers(model, owner)}
        blocks = [block for block in found.blocks if block.name in names]
    elif drop.acts_on == "branch" and _runs(found, drop):
        yield from _around_call(found, drop.modules[0])
        return
    else:
        # In eval mode it is not called (DINOv2): its name says where it belongs.
        module = drop.modules[0]
        around = [block for block in found.blocks if _lies_in(module, block.name)]
        blocks = sorted(around, key=lambda block: len(block.name))[-1:]
    for block in blocks:
        for branch in block.branches:
            yield block, branch


def _around_call(found: Discovery, module: str) -> Iterator[tuple[ResidualBlock, ResidualBranch]]:
    """The branches of the innermost block that hold the module's calls."""
    around = [
        (block, branch)
        for block in found.blocks
        for branch in block.branches
        if any(_lies_in(module, member) for member in branch.modules)
    ]
    innermost = max((block.nesting for block, _ in around), default=0)
    yield from (pair for pair in around if pair[0].nesting == innermost)


def _layers(model: nn.Module, owner: str) -> Iterator[str]:
    """The names of what stands in the owner's lists of modules."""
    prefix = f"{owner}." if owner else ""
    for name, child in model.get_submodule(owner).named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{prefix}{name}.{number}" for number in range(len(child)))


def _lies_in(module: str, around: str) -> bool:
    return module == around or module.startswith(f"{around}." if around else "")


def _runs(found: Discovery, drop: OwnDrop) -> bool:
    """Whether one of its modules was called: some are built and never used (EfficientNet)."""
    return any(module in found.recording.calls_of for module in drop.modules)


def _nowhere(drop: OwnDrop, why: str) -> ActiveDropPathError:
    return ActiveDropPathError(
        f'{drop.path} is {drop.rate}, which "model" cannot take over: {why}',
        expected="rates of residual blocks that are gated",
        instead='pass blocks="*" to do without it, or name the blocks that you want: what is '
        "dropped elsewhere is then set to 0",
    )


def _two_rates(block: ResidualBlock, first: OwnDrop, second: OwnDrop) -> ActiveDropPathError:
    return ActiveDropPathError(
        f'block "{block.name}" has two rates of its own: {first.path} is {first.rate}, '
        f"{second.path} is {second.rate}",
        expected="one rate for a block",
        instead="set them to the same rate; or leave the block out, "
        f'blocks=["!{block.name}"], which sets both to 0',
    )
