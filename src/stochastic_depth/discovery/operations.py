"""What the watch knows about torch's operations: one table, from an operation to its kind.

An operation that is not in the table is of kind OTHER: no skip connection is followed through it,
and no factor. Whether it returns zeros for zeros is tried (`scaling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kind(Enum):
    """What an operation does with the values that it is given."""

    __hash__ = object.__hash__  # an Enum's own is slow

    SOURCE = "comes from outside: an input, a weight, a constant"
    MOVE = "every element of the input arrives, unchanged, somewhere in the output"
    PART = "some elements of the input arrive: a skip connection is not followed through it"
    LINEAR = "f(s x) = s f(x) for the first operand and every s"
    SHIFT = "affine, and not linear: a constant is added"
    SUM = "the sum of two tensors"
    JOIN = "several tensors side by side in one"
    PRODUCT = "linear in each operand"
    BIASED = "a product that may have a bias"
    NORM = "a normalisation"
    BATCH_NORM = "a normalisation that is affine in inference"
    POSITIVE = "f(s x) = s f(x) for s > 0 only"
    RELU = "max(x, 0)"
    MAX_POOL = "the largest of several elements"
    OTHER = "anything"


_TABLE = {
    Kind.MOVE: """
        alias view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand
        swapaxes movedim view_as clone contiguous _to_copy lift_fresh roll flip""",
    Kind.PART: "split split_with_sizes chunk unbind select unsafe_chunk unsafe_split",
    Kind.LINEAR: """
        neg sum mean div cumsum avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
        _adaptive_avg_pool3d adaptive_avg_pool1d constant_pad_nd slice narrow index index_select
        gather unfold im2col col2im upsample_nearest2d upsample_bilinear2d pixel_shuffle
        pixel_unshuffle native_dropout dropout as_strided masked_fill tril triu repeat
        upsample_nearest1d upsample_nearest3d upsample_linear1d upsample_trilinear3d
        upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        grid_sampler_2d grid_sampler_3d autograd_function _fft_r2c _fft_c2r _fft_c2c real imag
        view_as_real view_as_complex""",
    Kind.SUM: "add",
    Kind.JOIN: "cat stack",
    Kind.PRODUCT: "mul mm mv bmm matmul einsum",
    Kind.BIASED: """
        addmm addmv addr addbmm baddbmm linear convolution _convolution mkldnn_convolution
        convolution_overrideable mkldnn_linear _mkldnn_linear""",
    Kind.NORM: "native_layer_norm layer_norm native_group_norm group_norm _fused_rms_norm rms_norm",
    Kind.BATCH_NORM: """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _native_batch_norm_legit_functional cudnn_batch_norm miopen_batch_norm batch_norm
        _batch_norm_no_update _batch_norm_with_update""",
    Kind.POSITIVE: "leaky_relu abs",
    Kind.RELU: "relu",
    Kind.MAX_POOL: """
        max_pool2d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
        adaptive_max_pool3d amax""",
}
_KINDS = {name: kind for kind, names in _TABLE.items() for name in names.split()}

NORMS = frozenset({Kind.NORM, Kind.BATCH_NORM})
PRODUCTS = frozenset({Kind.PRODUCT, Kind.BIASED})
SUMS = frozenset({Kind.SUM, Kind.JOIN})
HOMOGENEOUS = frozenset({Kind.MOVE, Kind.PART, Kind.LINEAR})
POSITIVE = frozenset({Kind.POSITIVE, Kind.RELU, Kind.MAX_POOL})
AFFINE = HOMOGENEOUS | PRODUCTS | SUMS | {Kind.SHIFT, Kind.BATCH_NORM}
"""Affine in their data where only one operand depends on it (for sums: any number)."""

# The degree of a value. Where the ends of a branch are multiplied by s, a value of degree n >= 0 is
# multiplied by s ** n. Any other value may be zero where the ends are (VANISHES), or else FINITE.
VANISHES, FINITE, UNKNOWN = -1, -2, -3


def degree(kind: Kind, name: str, degrees: Sequence[int]) -> int:
    """The degree of what an operation makes, from those of its inputs."""
    if not any(degrees):
        return 0
    found: int | None = None
    zeros = [is_zero(each) for each in degrees]
    if kind in SUMS:
        found, vanishes = degrees[0] if len(set(degrees)) == 1 else None, all(zeros)
    elif kind in PRODUCTS and len(degrees) > 2:
        bias = degrees[0] if name in _WITH_A_PRODUCT else degrees[2]
        found, vanishes = bias if 2 * bias == sum(degrees) else None, all(zeros)
    elif kind in PRODUCTS:
        found, vanishes = sum(degrees), any(zeros)
    else:
        is_homogeneous = kind in HOMOGENEOUS | POSITIVE and not (name == "div" and any(degrees[1:]))
        if not is_homogeneous and name != "_to_copy":  # which may round
            return UNKNOWN
        found = degrees[0] if is_homogeneous and not any(degrees[1:]) else None
        vanishes = zeros[0]
    if found is not None and min(degrees) >= 0:
        return found
    return UNKNOWN if UNKNOWN in degrees else VANISHES if vanishes else FINITE


def is_zero(degree: int) -> bool:
    """Whether a value is zero where those are that it was made of."""
    return degree > 0 or degree == VANISHES


FILLED = frozenset(
    "new_empty new_empty_strided new_full new_ones new_zeros empty_like full_like ones_like "
    "rand_like randint_like randn_like zeros_like".split()
)
"""Operations that ask their input for its shape alone: the result does not depend on its values."""
_WITH_A_PRODUCT = {
    "addcmul": "mul",
    "addcdiv": "div",
    **dict.fromkeys(("addmm", "addmv", "addr"), "mm"),
    **dict.fromkeys(("addbmm", "baddbmm"), "bmm"),
}
SPELLINGS = frozenset(("add", "sub", "rsub", "lerp", *_WITH_A_PRODUCT))
"""Operations that may be a sum of two terms."""
ZEROS = frozenset("zeros zeros_like new_zeros".split())
LOOK_UPS = frozenset("embedding _embedding_bag index index_select gather take scatter".split())
"""Operations that an index tells which values to take, or where to put them."""
MERGES = frozenset(
    "where maximum minimum logaddexp index_add scatter_add index_put put scatter scatter_reduce "
    "complex masked_scatter slice_scatter select_scatter copy stack _foreach_add "
    "unseen_kernel".split()
)
"""Operations that may join a branch to its skip connection, as a sum does: nobody can tell."""
_STAYS = frozenset("alias clone contiguous _to_copy lift_fresh add sum".split())
_DEPENDING = (
    SPELLINGS | FILLED | {"div", "constant_pad_nd", "masked_fill", "cat", "stack", "sum", "mean"}
)


def is_real_or_complex(dtype: torch.dtype) -> bool:
    """Whether it is no integer."""
    return dtype.is_floating_point or dtype.is_complex


class Operation:
    """What an operation's name and schema say about all of its calls.

    Attributes:
        name: Its name; the one in place has the name of the other one.
        kind: Its kind, where the arguments do not tell otherwise.
        depends: Whether they may.
        written: The position and the name of what it changes in place.
        stays: Whether every element stays where it is, if it is a move.
        is_view: Whether it shares memory with its first input.
        is_local: Whether no other process takes part in it.
    """

    def __init__(self, func: Any) -> None:
        schema, name = func._schema, func.overloadpacket.__name__
        self.name: str = name.removesuffix("_") if schema.is_mutable else name
        self.kind = _KINDS.get(self.name, Kind.OTHER)
        self.depends, self.stays = self.name in _DEPENDING, self.name in _STAYS
        self.written = tuple(
            (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        aliases = [made.alias_info for made in schema.returns if made.alias_info is not None]
        self.is_view = not all(alias.is_write for alias in aliases)
        self.is_local = func.namespace == "aten"

    def written_in(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What a call changes in place."""
        return [args[n] if n < len(args) else kwargs.get(key) for n, key in self.written]


operation_of = cache(Operation)


def name_of_made(name: str, inputs: Sequence[int], made: Any) -> str:
    """The name of an operation; of one that makes the number 0 of nothing, "zeros"."""
    is_number = not inputs and type(made) is Tensor and made.numel() == 1 and not made.is_meta
    return "zeros" if is_number and not made else name


def kind_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind:
    """The kind of an operation, as it was called."""
    kind = _KINDS.get(name, Kind.OTHER)
    if kind is Kind.SUM and not isinstance(args[1], Tensor):
        return Kind.SHIFT if args[1] else Kind.MOVE  # Python's sum([...]) begins with 0
    if name == "div" and kwargs.get("rounding_mode") is not None:
        return Kind.OTHER
    if name in ("constant_pad_nd", "masked_fill"):
        value = (*args, 0)[2]
        return Kind.SHIFT if isinstance(value, Tensor) or value else kind
    return kind


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += [part for part in value if isinstance(part, Tensor)]
    return found


def replay_of(func: Any, args: Any, kwargs: Mapping[str, Any], count: int) -> Any:
    """What does the same with as many other tensors; None where it is not given them one by one."""
    rest = [None if isinstance(value, Tensor) else value for value in args]
    places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]

    def replay(*tensors: Tensor) -> Any:
        by_place = dict(zip(places, tensors, strict=True))
        return func(*[by_place.get(place, value) for place, value in enumerate(rest)], **kwargs)

    return replay if len(places) == count else None


class Term(NamedTuple):
    """One term of a sum: a tensor as it is (no operation), or what an operation makes of some."""

    tensors: tuple[Tensor, ...]
    op: str = ""


def terms_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Term, ...] | None:
    """The two terms of an operation that is a sum in another spelling; None for all others.

    Example:
        >>> import torch
        >>> x, y = torch.ones(2), torch.ones(2)
        >>> [term.op for term in terms_of("sub", (x, y), {})]
        ['', 'neg']
        >>> [term.op for term in terms_of("add", (x, y), {"alpha": 2})]
        ['', 'mul']
    """
    if name not in SPELLINGS:
        return None
    first, second, *rest = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if name in _WITH_A_PRODUCT:
        product = Term((second, *rest), _WITH_A_PRODUCT[name])
        return Term((first,), "" if beta == 1 else "mul"), product
    if name == "lerp":
        weight = [value for value in rest if isinstance(value, Tensor)]
        return Term((first, *weight), "mul"), Term((second, *weight), "mul")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    if name == "rsub":
        first, second = second, first
    return Term((first,)), Term((second,), "mul" if alpha != 1 else "" if name == "add" else "neg")
