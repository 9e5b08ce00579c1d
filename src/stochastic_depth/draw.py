"""How it is drawn which blocks run: a pure function of (seed, step, call, block), no hidden state.

So processes agree without talking, a resumed run continues the same sequence, and the global
generators of torch, NumPy and Python are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

from stochastic_depth.errors import NotYetSupportedError, OptionError, nearest

Sampling = Literal["independent", "balanced"]
AcrossRanks = Literal["auto", "same", "different"]
Redraw = Literal["forward", "step"]
Rows = Literal["contiguous", "random"]


@dataclass(frozen=True)
class Draw:
    """How the gates are drawn.

    Args:
        seed: Another seed, another sequence of draws.
        sampling: "independent": each block on its own (Huang et al. 2016, section 3). "balanced"
            is not yet supported.
        across_ranks: "same": every rank drops the same blocks; "different" is not yet supported;
            "auto" is "same".
        redraw: "forward": each training forward has draws of its own (each microbatch under
            gradient accumulation); "step": one draw for all forwards of an optimizer step, which
            needs `depth.follow(optimizer)` or `depth.step()`.
        rows: For the sample mode, which is not yet supported.
        process_group: For draws that differ across ranks, which are not yet supported.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> Draw(seed=1, redraw="step")
        Draw(seed=1, sampling='independent', across_ranks='auto', redraw='step', rows='contiguous')
    """

    seed: int = 0
    sampling: Sampling = "independent"
    across_ranks: AcrossRanks = "auto"
    redraw: Redraw = "forward"
    rows: Rows = "contiguous"
    process_group: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(
                f"Draw(seed={self.seed!r})",
                expected="an integer",
                instead="pass any integer; the same one gives the same draws",
            )
        choices = {
            "sampling": get_args(Sampling),
            "across_ranks": get_args(AcrossRanks),
            "redraw": get_args(Redraw),
            "rows": get_args(Rows),
        }
        for option, known in choices.items():
            check_choice(f"Draw({option}=...)", getattr(self, option), known)

    def __repr__(self) -> str:
        group = "" if self.process_group is None else f", process_group={self.process_group!r}"
        return (
            f"Draw(seed={self.seed}, sampling={self.sampling!r}, "
            f"across_ranks={self.across_ranks!r}, redraw={self.redraw!r}, rows={self.rows!r}"
            f"{group})"
        )

    def check_supported(self) -> None:
        """Raises where a later version has to come first."""
        for option, value, ready in (
            ("sampling", self.sampling, "independent"),
            ("across_ranks", self.across_ranks, "same"),
            ("rows", self.rows, "contiguous"),
        ):
            if value not in (ready, "auto"):
                raise NotYetSupportedError(
                    f"Draw({option}={value!r}) is not yet supported",
                    expected=f"{option}={ready!r} in this version",
                    instead=f"leave {option} out",
                )


def check_choice(option: str, value: object, known: tuple[str, ...]) -> None:
    """Raises unless the value is one of the known ones."""
    if value not in known:
        raise OptionError(
            f"{option} got {value!r}",
            expected=" or ".join(f'"{choice}"' for choice in known),
            instead=nearest(str(value), known),
        )


def uniform(seed: int, step: int, call: tuple[int, ...], name: str) -> float:
    """A number in [0, 1), independent for every other seed, step, call or name.

    Args:
        seed: `Draw.seed`.
        step: The optimizer step.
        call: How often the gate was called before in this step; inside of another gate that
            gate's number comes first. Empty where all calls of a step share one draw.
        name: What is drawn for: a block ("layer3.2") or a branch ("blocks.3:0").

    Example:
        >>> uniform(0, 0, (0,), "layer3.2") == uniform(0, 0, (0,), "layer3.2")
        True
        >>> round(uniform(0, 0, (0,), "layer3.2"), 4), round(uniform(0, 0, (1,), "layer3.2"), 4)
        (0.3633, 0.5914)
    """
    key = repr((seed, step, call, name)).encode()
    bits = int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
    return (bits >> 11) * 2.0**-53  # the 53 bits that a float holds
