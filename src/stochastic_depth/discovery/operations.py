"""What the watch has to know about torch's operations, by their ATen names.

An operation that is not listed is taken as "anything": a value does not pass through it in any
of the proofs. So a new operation can lead to a refusal, never to a wrong result.
"""

from __future__ import annotations

ADDITIONS = frozenset({"add", "add_"})

VIEWS = frozenset(
    "alias view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand "
    "swapaxes movedim view_as narrow slice select split split_with_sizes chunk unbind "
    "as_strided unfold detach lift_fresh".split()
)
"""Outputs that share memory with their input."""

MOVES = frozenset(
    "alias view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand "
    "swapaxes movedim view_as clone contiguous _to_copy lift_fresh roll flip".split()
)
"""Every element of the input arrives, unchanged, at some place of the output."""

NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm batch_norm native_layer_norm layer_norm "
    "native_group_norm group_norm _fused_rms_norm rms_norm _batch_norm_no_update "
    "_batch_norm_with_update".split()
)
BATCH_NORMS = frozenset(name for name in NORMS if "batch_norm" in name)

PRODUCTS = frozenset(
    "mul mul_ mm bmm addmm baddbmm linear matmul convolution _convolution mkldnn_convolution "
    "convolution_overrideable mkldnn_linear _mkldnn_linear einsum".split()
)
"""Linear in each operand; `addmm` and convolutions may add a bias."""

SUMS = frozenset("add add_ sub sub_ cat stack".split())

HOMOGENEOUS = MOVES | frozenset(
    "neg sum mean div div_ avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d constant_pad_nd slice select split "
    "split_with_sizes chunk unbind narrow index index_select gather unfold im2col col2im "
    "upsample_nearest2d upsample_bilinear2d pixel_shuffle pixel_unshuffle native_dropout dropout "
    "as_strided".split()
)
"""f(s x) = s f(x) for the first operand, every s; `div` only by what does not depend on x."""

POSITIVE = frozenset(
    "relu relu_ leaky_relu leaky_relu_ max_pool2d max_pool2d_with_indices max_pool3d_with_indices "
    "amax".split()
)
"""f(s x) = s f(x) for s > 0 only: a survival probability passes, an affine function does not."""

RELUS = frozenset({"relu", "relu_"})
MAX_POOLS = frozenset("max_pool2d max_pool2d_with_indices max_pool3d_with_indices amax".split())

AFFINE = HOMOGENEOUS | PRODUCTS | SUMS | BATCH_NORMS
"""Affine in their data where only one operand depends on it (for sums: any number)."""

FILLED = frozenset(
    "new_empty new_empty_strided new_full new_ones new_zeros empty_like full_like ones_like "
    "rand_like randint_like randn_like zeros_like".split()
)
"""Ask their input for its shape, and for none of its values: what they make does not depend on it.
"""

SPLITS = frozenset("split split_with_sizes chunk unbind".split())
"""Ends the walk along a skip connection: what follows is a part of a value, not the value."""
