"""Which of the found blocks to gate (`blocks=`), on which rows, and which to keep (`keep=`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from stochastic_depth import errors
from stochastic_depth.discovery import none_found
from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.plan import Plan, Scale, Unit
from stochastic_depth.rows import Counts

Selector = str | type | ResidualBlock | Callable[[ResidualBlock], bool]

Keep = int | float | str | Iterable[str]
"""How many blocks, which fraction of them, or their names."""

# The least part of a batch to drop, where any: what is dropped has to pay for moving the others.
# That costs the more the less a branch computes for each value, and convolutions compute little.
_IMAGE_DIMS, _FEWEST_IMAGES, _FEWEST_ROWS = 4, 0.5, 0.25


def select(model: nn.Module, found: Discovery, blocks: Any) -> tuple[ResidualBlock, ...]:
    """The blocks that `blocks=` keeps to, in forward order.

    Args:
        model: The model that was watched.
        found: All that was found.
        blocks: None for all; or names, globs ("!layer1.*" leaves out), classes, found blocks or
            predicates, one or several. Affine branches are gated where a name says so, or where the
            model has no others.

    Raises:
        SelectionError: One of them matches nothing, or nothing is left.
        OptionError: Something that selects no blocks.
    """
    usual = [block for block in found.blocks if not block.affine]
    if not found.blocks or (blocks is None and not usual):
        raise none_found(model, found)
    if blocks is None:
        return tuple(usual)
    usual = usual or list(found.blocks)
    is_one = isinstance(blocks, str) or not isinstance(blocks, Iterable)
    chosen: set[str] = set()
    left_out: set[str] = set()
    for selector in [blocks] if is_one else blocks:
        if isinstance(selector, str) and selector.startswith("!"):
            left_out.update(errors.matching(selector[1:], _names(found.blocks), argument="blocks"))
        else:
            chosen.update(_chosen(model, found, usual, selector))
    kept = (chosen or {*(_names(usual) if left_out else ())}) - left_out
    if not kept:
        raise errors.SelectionError(
            f"blocks={blocks!r} leaves nothing of {len(usual)} residual blocks",
            expected="at least one block to gate",
            instead="print the names of sd.find_residual_blocks(model, ...) and choose",
        )
    return tuple(block for block in found.blocks if block.name in kept)


def _names(blocks: Iterable[ResidualBlock]) -> list[str]:
    return [block.name for block in blocks]


def _chosen(
    model: nn.Module, found: Discovery, usual: Sequence[ResidualBlock], selector: Any
) -> Sequence[str]:
    """The names of the blocks that one selector stands for."""
    if isinstance(selector, ResidualBlock):
        selector = selector.name
    if isinstance(selector, str):
        is_name = selector in _names(found.blocks)
        names = [selector] if is_name else _names(usual)
        return errors.matching(selector, names, argument="blocks")
    if not callable(selector):
        raise errors.OptionError(
            f"blocks= holds {selector!r}, a {type(selector).__name__}",
            expected="names, globs, classes, found blocks or a predicate",
            instead='pass, say, blocks=["layer3.*", "!layer3.0"]',
        )
    if isinstance(selector, type):
        modules = dict(model.named_modules())
        chosen = [n for n in _names(usual) if isinstance(modules.get(n), selector)]
        kinds = ", ".join(sorted({block.kind for block in usual}))
        what, choices = f"class {selector.__name__}", f"the blocks are of class {kinds}"
    else:
        chosen = [block.name for block in usual if selector(block)]
        what, choices = f"predicate {selector!r}", "it is called with each found block"
    if not chosen:
        raise errors.SelectionError(
            f"blocks= holds the {what}, which matches none of {len(usual)} residual blocks",
            expected="a selector that matches at least one block",
            instead=f"print sd.find_residual_blocks(model, ...) and choose: {choices}",
        )
    return chosen


def allowed_counts(model: nn.Module, found: Discovery, block: ResidualBlock) -> Counts:
    """How many rows a block may run on, by its modules and the shape of what it adds to."""
    names = {module for branch in block.branches for module in branch.modules}
    if block.explicit:  # which modules make up the branch is not known: any beside it
        names = {block.scope}
    parts = [part for name in names for part in model.get_submodule(name).modules()]
    batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
    if block.explicit:
        images = any(isinstance(part, nn.modules.conv._ConvNd) for part in parts)
    else:
        stream = found.recording.nodes[found.sites[block.name][0].additions[0].node]
        images = len(stream.shape) >= _IMAGE_DIMS
    fewest = _FEWEST_IMAGES if images else _FEWEST_ROWS
    return Counts(lone=not batch_norm, fewest_dropped=fewest)


def refuse_inexact(found: Discovery, plan: Plan) -> None:
    """Raises where the watch shows that a block cannot be skipped exactly with these options."""
    each = ((block.name, _refusal(block, plan.unit, plan.scale)) for block in plan.blocks)
    reasons = {name: why for name, why in each if why}
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)


def without_refused_parts(
    chosen: tuple[ResidualBlock, ...], unit: Unit, scale: Scale
) -> tuple[ResidualBlock, ...]:
    """Without those that lie in another one's branch and would be refused, as a warning says."""
    reasons = {block.name: _refusal(block, unit, scale) for block in chosen}
    sound = [block for block in chosen if not reasons[block.name]]
    parts = [b.name for b in chosen if reasons[b.name] and b.branches_around([*sound, b])]
    if parts:
        others = f" (and {len(parts) - 1} others)" if len(parts) > 1 else ""
        errors.warn(
            f'block "{parts[0]}"{others} is left out, a part of the branch of another block, which '
            f"is gated: {reasons[parts[0]]}"
        )
    return tuple(block for block in chosen if block.name not in parts)


def _refusal(block: ResidualBlock, unit: Unit, scale: Scale) -> str | None:
    if block.refusal is not None:
        return block.refusal
    if unit == "branch" and block.branches_leak:
        return 'one of its branches computes with a value of another (try unit="block")'
    for branch in block.branches:
        if branch.unscalable and scale != "none":
            return f'{branch.name} cannot be scaled: {branch.unscalable} (scale="none" works)'
    return None


def refuse(
    reasons: dict[str, str], gated: Iterable[ResidualBlock], *, found: Discovery
) -> errors.RefusedBlockError:
    """The error that names every refused block, why, and what to paste to leave them out."""
    told = "; ".join(f'block "{name}": {reason}' for name, reason in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    left = [name for name in _names(gated) if name not in reasons]
    out = [f"!{name}" for name in reasons]
    is_all = len(left) + len(reasons) == sum(not block.affine for block in found.blocks)
    instead = (
        "write the connections that can be skipped with sd.Residual, which are taken at their "
        "word, or train the model as it is: no block is left"
    )
    if left:
        them = "it" if len(reasons) == 1 else "them"
        instead = f"pass blocks={out if is_all else left!r} to leave {them} out"
    elif "(try " in told or '="none" works)' in told:
        instead = f"do what the reasons say, or {instead}"
    if 'mode="sample": ' in told:  # in which more can go wrong
        instead = f'pass mode="batch", or {instead}'
    error = errors.RefusedBlockError(
        f"{told}{more}", expected="blocks that can be skipped exactly", instead=instead
    )
    error.reasons = reasons
    return error


def taken_out(plan: Plan, keep: Keep, trained: Mapping[str, float] | None) -> list[str]:
    """The names of the blocks to take out.

    Args:
        plan: What the gates share.
        keep: What to keep.
        trained: How often each block ran in training: those that ran most are kept. None: evenly
            spaced ones, the first and the last among them.

    Raises:
        OptionError, SelectionError: `keep` stands for no blocks of this model.
        RefusedBlockError: A block that is not to be kept cannot be taken out.
    """
    number = errors.as_number(keep)
    if number is not None:
        return _all_but(plan, number, trained)
    every = [block.name for block in plan.blocks]
    names = [keep] if isinstance(keep, str) else list(keep) if isinstance(keep, Iterable) else []
    if not names:
        raise errors.OptionError(
            f"keep is {keep!r}",
            expected="a number of blocks, a fraction of them, or the names of some",
            instead="pass 6, 0.5 or a list of names",
        )
    kept = {name for each in names for name in errors.matching(each, every, argument="keep")}
    around = {
        block.name: {plan.blocks[n].name for n, _ in block.branches_around(plan.blocks)}
        for block in plan.blocks
    }
    kept = kept.union(*(around[name] for name in kept))
    # What lies inside of a block that is taken out goes with it.
    out = [block for block in plan.blocks if block.name not in kept and around[block.name] <= kept]
    for block in filter(_is_stuck, out):
        raise errors.RefusedBlockError(
            f'block "{block.name}" cannot be taken out: its skip path computes (a projection, say)',
            expected="blocks that come to their input when they are dropped",
            instead="name it in keep, too",
        )
    return [block.name for block in out]


def _all_but(plan: Plan, keep: float, trained: Mapping[str, float] | None) -> list[str]:
    """All but so many blocks: a number (int), or a fraction (float)."""
    blocks = [block for block in plan.blocks if not block.branches_around(plan.blocks)]
    stuck = [block.name for block in blocks if _is_stuck(block)]
    free = [block.name for block in blocks if block.name not in stuck]
    count = keep if isinstance(keep, int) else round(keep * len(blocks))
    least = max(1, len(stuck))
    if not least <= count <= len(blocks):
        why = f" ({len(stuck)} cannot be taken out: {', '.join(stuck[:3])} ...)" if stuck else ""
        raise errors.OptionError(
            f"keep is {keep!r}, {count} of {len(blocks)} blocks",
            expected=f"{least} to {len(blocks)} of them{why}",
            instead="pass such a number, a fraction that makes it, or the names of those to keep",
        )
    wanted = count - len(stuck)
    if trained is None:
        kept = {free[place] for place in _evenly(wanted, len(free))}
    else:
        kept = set(sorted(free, key=lambda name: -trained[name])[:wanted])
    return [name for name in free if name not in kept]


def _evenly(count: int, among: int) -> list[int]:
    """So many places, the first and the last among them.

    Example:
        >>> _evenly(4, 12), _evenly(1, 12), _evenly(0, 12)
        ([0, 4, 7, 11], [0], [])
    """
    return [round(place * (among - 1) / max(1, count - 1)) for place in range(count)]


def _is_stuck(block: ResidualBlock) -> bool:
    return block.whole is None and not block.explicit and block.projects
