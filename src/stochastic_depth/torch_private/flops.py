"""FLOPs as torch counts them, and what its counter leaves out on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ON_THE_CPU = "_scaled_dot_product_flash_attention_for_cpu"


def count_flops(run: Callable[[], None]) -> float:
    """What a call comes to: convolutions, matrix products and attention.

    Torch's fused attention on the CPU counts as the one on a GPU: every pair of tokens, also those
    that a causal mask leaves out.
    """
    from torch.utils import flop_counter  # which loads triton, where there is one

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_flop_count(query, key, value))

    def backward(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(out, query, key, value))

    formulas: dict[Any, Any] = {
        getattr(torch.ops.aten, _ON_THE_CPU): forward,
        getattr(torch.ops.aten, f"{_ON_THE_CPU}_backward"): backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()
