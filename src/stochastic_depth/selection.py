"""Which of the found blocks to gate (`blocks=`), and whether these options allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from stochastic_depth.arguments import matching
from stochastic_depth.discovery import Discovery, ResidualBlock, none_found
from stochastic_depth.errors import OptionError, RefusedBlockError, SelectionError
from stochastic_depth.plan import Scale, Unit

Selector = str | type | ResidualBlock | Callable[[ResidualBlock], bool]


def select(model: nn.Module, found: Discovery, blocks: Any) -> tuple[ResidualBlock, ...]:
    """The blocks that `blocks=` keeps to, in forward order.

    Args:
        model: The model that was watched.
        found: All that was found.
        blocks: None for all; or names, globs ("!layer1.*" leaves out), classes, found blocks or
            predicates, one or several. Affine branches are gated only where a name says so.

    Raises:
        SelectionError: One of them matches nothing, or nothing is left.
        OptionError: Something that selects no blocks.
    """
    usual = [block for block in found.blocks if not block.affine]
    if blocks is None:
        if not usual:
            raise none_found(model, found)
        return tuple(usual)
    single = isinstance(blocks, str | type | ResidualBlock) or callable(blocks)
    selectors: list[Any] = list(blocks) if isinstance(blocks, Iterable) and not single else [blocks]
    out = [s[1:] for s in selectors if isinstance(s, str) and s.startswith("!")]
    into = [s for s in selectors if not (isinstance(s, str) and s.startswith("!"))]
    names = [block.name for block in found.blocks]
    kept = {block.name for block in usual} if out and not into else set()
    for selector in into:
        kept |= _chosen(model, found, usual, selector)
    for pattern in out:
        kept -= set(matching(pattern, names, argument="blocks"))
    if not kept:
        raise SelectionError(
            f"blocks={blocks!r} leaves nothing of {len(usual)} residual blocks",
            expected="at least one block to gate",
            instead="print the names of sd.find_residual_blocks(model, ...) and choose",
        )
    return tuple(block for block in found.blocks if block.name in kept)


def _chosen(
    model: nn.Module, found: Discovery, usual: Sequence[ResidualBlock], selector: Any
) -> set[str]:
    if isinstance(selector, ResidualBlock):
        selector = selector.name
    if isinstance(selector, str):
        if any(block.name == selector for block in found.blocks):
            return {selector}
        return set(matching(selector, [block.name for block in usual], argument="blocks"))
    if isinstance(selector, type):
        modules = dict(model.named_modules())
        chosen = {b.name for b in usual if isinstance(modules.get(b.name), selector)}
        kinds = sorted({block.kind for block in usual})
        what, choices = f"class {selector.__name__}", f"the blocks are of class {', '.join(kinds)}"
    elif callable(selector):
        chosen = {block.name for block in usual if selector(block)}
        what, choices = f"predicate {selector!r}", "it is called with each found block"
    else:
        raise OptionError(
            f"blocks= holds {selector!r}, a {type(selector).__name__}",
            expected="names, globs, classes, found blocks or a predicate",
            instead='pass, say, blocks=["layer3.*", "!layer3.0"]',
        )
    if not chosen:
        raise SelectionError(
            f"blocks= holds the {what}, which matches none of {len(usual)} residual blocks",
            expected="a selector that matches at least one block",
            instead=choices,
        )
    return chosen


def refusal(block: ResidualBlock, *, unit: Unit, scale: Scale) -> str | None:
    """Why a block cannot be gated exactly with these options, from the first watch alone."""
    if block.leaks_to is not None:
        return f'"{block.leaks_to}" computes with a value made inside of it'
    if block.irregular:
        return "its module is called several times with different structure"
    if block.lost_state is not None:
        return (
            f'it hands out a state of "{block.lost_state}", which would be lost: pass example '
            "inputs with the states, so that it is given one of the same form"
        )
    if unit == "branch" and block.branches_leak:
        return 'one of its branches computes with a value of another (unit="block" works)'
    for branch in block.branches:
        if branch.unscalable and scale != "none":
            return f'{branch.name} cannot be scaled: {branch.unscalable} (scale="none" works)'
    return None


def refuse(
    reasons: dict[str, str], gated: Iterable[ResidualBlock], *, found: Discovery
) -> RefusedBlockError:
    """The error that names every refused block, why, and what to paste to leave them out."""
    told = "; ".join(f'block "{name}": {reason}' for name, reason in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    left = [block.name for block in gated if block.name not in reasons]
    out = [f"!{name}" for name in reasons]
    paste = out if len(left) + len(reasons) == sum(not b.affine for b in found.blocks) else left
    nothing_left = (
        "do as the reasons say, write the connections that can be skipped with sd.Residual, which "
        "are taken at their word, or train the model as it is: no block is left"
    )
    return RefusedBlockError(
        f"{told}{more}",
        expected="blocks that can be skipped exactly",
        instead=f"pass blocks={paste!r} to leave {'it' if len(reasons) == 1 else 'them'} out"
        if left
        else nothing_left,
    )
