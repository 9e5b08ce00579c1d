"""The table of models that the promises are tested on: small networks of torch, and libraries'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import layers
import networks
import spellings
import strangers
import streams
from libraries import LIBRARIES
from networks import WIDTH, vectors
from specimen import Ends, Specimen


def _small(
    name: str, build: Callable[[], nn.Module], shape: Any, ends: Any, **more: Any
) -> Specimen:
    """`shape` is that of the input, or a function that makes the example; `ends` names one module.

    Or it is what `Specimen` has. Where nothing else is said there are six blocks, skipped whole.
    """
    example = shape if callable(shape) else lambda: vectors(*shape)
    if isinstance(ends, str):
        ends = ((ends,),)
    blocks = len(ends) if isinstance(ends, dict) else 6
    more = {"blocks": blocks, "whole": ("*",), "size": "small", **more}
    return Specimen(name, lambda dropout: build(), example, ends=ends, **more)


def _odd(name: str, kind: Callable[[], nn.Module], ends: Any, **more: Any) -> Specimen:
    """Three such blocks behind a stem; a branch draws on its own where that is said."""
    blocks = len(ends) if isinstance(ends, dict) else 3
    more = {"blocks": blocks, "units": ("block",), "size": "odd", **more}
    shape = (6, 6, 3) if name.startswith("form") else (4, 3)
    return _small(name, lambda: layers.Stack(kind, 3), shape, ends, **more)


_BLOCK, _BOTH = ("block",), ("block", "branch")
_NESTED = {f"{outer}.inner.{inner}": (("linear",),) for outer in (1, 2, 3) for inner in (0, 1)}
_IN_LOOP: dict[str, Ends] = {f"layers.{n}": (("mixer",),) for n in range(6)}
_PAIR, _VECTOR = (("f",), ("g",)), (4, 3)
_LAYER, _JOINT = (("attention",), ("mlp",)), (("joint.a",), ("joint.b",))

NETWORKS = [
    _small("resnet", networks.ResNet, (4, 3, 6, 6), "bn2", whole=("stages.0.*", "stages.1.[12]")),
    _small("pre-norm", networks.NETWORKS["pre-norm"][0], (4, 5, 3), _LAYER),
    _small("post-norm", networks.NETWORKS["post-norm"][0], (4, 5, 3), _LAYER, whole=()),
    _small("explicit", networks.NETWORKS["explicit"][0], (4, 5, 3), _LAYER, rounding=1e-6),
    _small("shared", networks.Shared, (4, 5, 3), "linear", blocks=1, masks=False),
    _small(
        "nested",
        networks.nested,
        (4, 5, 3),
        {**_NESTED, **{f"{outer}": (("last",),) for outer in (1, 2, 3)}},
        masks=False,
        rounding=1e-6,
    ),
    _small("preact", strangers.PreActNet, (2, 3, 16, 16), "conv_b", whole=("body.[0135]",)),
    _small("U-shaped", strangers.UNet, (2, 3, 16, 16), "f", whole=()),
    _small(
        "pairs in a loop",
        strangers.InlineLoop,
        (2, 5, 4),
        (("0",), ("1",)),
        whole=(),
        unfoldable="tanh in layers.0.0.2",
    ),
    _small("lists in a loop", strangers.InlineLists, (2, 5, 4), "", whole=()),
    _small(
        "groups",
        strangers.NestedGroups,
        (2, 3, 8, 8),
        {
            **{f"groups.{i}.blocks.{n}": (("f",),) for i in range(3) for n in range(2)},
            **{f"groups.{i}": (("tail",),) for i in range(3)},
        },
        whole=("groups.?",),
        masks=False,
        rounding=1e-6,
    ),
    _small(
        "matryoshka",
        strangers.Matryoshka,
        (2, 5, 4),
        {
            **{f"layers.{i}.part": (("b",),) for i in range(4)},
            **{f"layers.{i}": (("part",),) for i in range(4)},
        },
        whole=("layers.?",),
        unfoldable="its last operations feed more than the sum",
        masks=False,
    ),
    _small(
        "blocks beside",
        strangers.BesideNet,
        (2, 3, 8, 8),
        {
            **{f"layers.{i}.local.{n}": (("f",),) for i in range(2) for n in range(2)},
            **{f"layers.{i}": (("g",),) for i in range(2)},
        },
        whole=("*.local.?",),
    ),
    _small("masked", strangers.MaskedNet, (2, 5, 4), "out", unfoldable="itself computed"),
    _small(
        "graph",
        lambda: layers.Layers(streams.GraphLayer),
        lambda: (vectors(7, WIDTH), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])),
        "update",
        rowless="out of bounds",
    ),
    _small(
        "diffusion",
        streams.Diffusion,
        lambda: (vectors(2, 3, 8, 8), vectors(2, WIDTH)),
        {f"{part}.{n}": (("conv2",),) for part in ("down", "middle", "up") for n in (0, 1)},
        whole=("down.0", "middle.?"),
        rowless="on some rows",
    ),
    _small(
        "torch's decoder",
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), 6
        ),
        lambda: (vectors(3, 5, 8), vectors(3, 4, 8, seed=2)),
        (("dropout1",), ("dropout2",), ("dropout3",)),
        whole=(),
    ),
    _small("coupling", lambda: streams.Streams(streams.Coupling), _VECTOR, _PAIR),
    _small("crossed coupling", lambda: streams.Streams(streams.Crossed), _VECTOR, _PAIR[::-1]),
    _small("halves coupled", lambda: streams.Streams(streams.Halved), _VECTOR, _PAIR, whole=()),
    _small("joint", lambda: streams.Streams(streams.JointBlock), _VECTOR, _JOINT, units=_BLOCK),
    _small(
        "joint, swapped",
        lambda: streams.Streams(streams.Swapped),
        _VECTOR,
        _JOINT[::-1],
        units=_BLOCK,
    ),
    _small(
        "positions",
        streams.WithPositions,
        _VECTOR,
        "g",
        whole=("blocks.[1-5]",),
        rowless="on some rows",
    ),
    *(
        _small(name, build, _VECTOR, _IN_LOOP, leave_out=("*.mixer",), whole=(), rowless=rowless)
        for name, build, rowless in (
            ("handed on in a loop", streams.Loop, "on some rows"),
            ("mixers in a loop", streams.LoopInLine, ""),
            ("mixers in a dict", streams.LoopInDict, ""),
        )
    ),
]

ODD_BLOCKS = [
    *(
        _odd(f"form: {name}", partial(spellings.Formed, form), "linear", masks="there" not in name)
        for name, form in spellings.RETURNS_ITS_INPUT.items()
    ),
    *(
        _odd(
            f"form: {name}",
            partial(spellings.Formed, form),
            "linear",
            whole=(),
            masks=name != "turned",
            rowless="its rows depend on each other" if name == "rolled" else "",
        )
        for name, form in spellings.DOES_MORE.items()
    ),
    *(
        _odd(
            f"sum: {name}",
            partial(spellings.Summed, add),
            (("attn",), ("ffn",)),
            whole=whole,
            units=("branch",),
            unfoldable=spellings.UNFOLDABLE_SUMS.get(name, ""),
        )
        for sums, whole in ((spellings.SUMS, ("*",)), (spellings.SUMS_WITH_A_FACTOR, ()))
        for name, add in sums.items()
    ),
    *(
        _odd(name, partial(layers.WithObjects, form), "attn.b")
        for name, form in layers.OBJECTS.items()
    ),
    _odd("two branches", networks.TwoBranches, (("first",), ("second",)), units=_BOTH),
    _odd("one layer twice", layers.TwiceTheSame, (("linear",), ("linear",)), units=_BOTH),
    _odd("layer scale", layers.LayerScale, "linear", units=_BOTH),
    _odd("parallel", layers.Parallel, (("first", "second"),), units=_BOTH),
    _odd("interlaced", layers.Interlaced, "g", units=_BOTH),
    replace(
        _odd("moves behind", networks.Residual, "conv", units=_BOTH),
        make=lambda dropout: layers.Stack(partial(layers.BehindMoves, dropout), 3),
    ),
    *(
        _odd(
            f"ends in blocks: {kind.__name__}",
            partial(layers.EndsInBlocks, kind),
            {
                **{f"blocks.{i}": (("inner",),) for i in range(3)},
                **{f"blocks.{i}.inner.{n}": (("linear",),) for i in range(3) for n in (0, 1)},
            },
            masks=False,
            unfoldable="its last operations feed more than the sum",
        )
        for kind in (networks.Residual, layers.Cubic)
    ),
    _odd("product", networks.ProductBypass, "second", unfoldable="mul in blocks.0", units=_BOTH),
    # 0 times what stands in for the other factor is 0 for finite numbers only.
    _odd(
        "product, post-norm",
        networks.ProductPostNorm,
        "second",
        whole=(),
        units=_BOTH,
        unfoldable="mul in blocks.0",
        rowless="on some rows",
    ),
    _odd("excited", partial(layers.Ended, layers.Excite), "last", unfoldable="mul in blocks.0"),
    _odd("saturated", partial(layers.Ended, nn.Tanh), "last", unfoldable="tanh in blocks.0.last"),
    _odd(
        "norm without weights",
        partial(layers.Ended, layers.norm_without_weights),
        "last",
        unfoldable="the norm blocks.0.last has no weight",
    ),
    _odd(
        "weight norm",
        partial(layers.Ended, layers.weight_norm),
        "last",
        unfoldable="weight of blocks.0.last is itself computed",
    ),
]
SPECIMENS = [*NETWORKS, *ODD_BLOCKS, *LIBRARIES]
SMALL = {specimen.name: specimen for specimen in NETWORKS}
