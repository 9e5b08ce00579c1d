"""Which tokens make up a step, and which are held out.

The windows of a step are a pure function of (seed, step), so all variants see the same ones.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from textlib.text_data import Text, Tokens

AT_A_LOOK = 64  # held-out sequences that are predicted at a time


class Batch(NamedTuple):
    tokens: Tensor  # (sequences, context)
    following: Tensor  # the same, one token on: what is to be predicted


class Windows:
    """Sequences of `context` tokens out of a text."""

    def __init__(
        self,
        text: Text,
        context: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        *,
        most: int | None = None,
    ) -> None:
        """`most`: how many held-out windows are looked at. None: all of them."""
        self.text, self.context, self.batch_size = text, context, batch_size
        self._seed = seed
        self._device = torch.device(device)
        self._number = (len(text.held_out) - 1) // context if most is None else most
        self._number = min(self._number, (len(text.held_out) - 1) // context)

    def for_training(self, step: int) -> Batch:
        """Windows that begin anywhere and end before the held-out part."""
        last = len(self.text.training) - self.context - 1
        drawn = np.random.default_rng((self._seed, step))
        return self._batch(self.text.training, drawn.integers(last + 1, size=self.batch_size))

    def held_out(self) -> Iterator[Batch]:
        """The held-out part, window after window; a last one that is not full is left out."""
        starts = self.context * np.arange(self._number)
        for first in range(0, self._number, AT_A_LOOK):
            yield self._batch(self.text.held_out, starts[first : first + AT_A_LOOK])

    def held_out_with_past(self) -> Tokens:
        """The tokens that `held_out` asks for, with the two before the first."""
        start = self.text.held_out_from - 1
        return self.text.tokens[start : start + self._number * self.context + 2]

    def example(self, sequences: int) -> Tensor:
        """The beginning of the text, as a model sees it."""
        return self._batch(self.text.training, np.zeros(sequences, dtype=np.int64)).tokens

    def _batch(self, tokens: Tokens, starts: Tokens) -> Batch:
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.context + 1)])
        windows = windows.to(self._device)
        return Batch(windows[:, :-1], windows[:, 1:])
