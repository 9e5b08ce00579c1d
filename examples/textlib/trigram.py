"""The baseline: a trigram model, which knows the two tokens before and counts.

Its orders are interpolated as Witten and Bell do (1991, method C): after a context h that was seen
n(h) times, followed by k(h) different tokens,

    p(token | h) = (n(h token) + k(h) * p(token | h without its first)) / (n(h) + k(h)),

down to the uniform distribution over the vocabulary. Nothing is left to tune.
"""

import numpy as np
from numpy.typing import NDArray

from textlib.text_data import Tokens

Array = NDArray[np.float64]

ORDER = 3


class Trigram:
    """Counted on `training`."""

    def __init__(self, training: Tokens, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._counts = [
            _Counts(_grams(training, n, vocabulary), vocabulary) for n in range(1, ORDER + 1)
        ]

    def probabilities(self, tokens: Tokens) -> Array:
        """Of each token from the third on, after the two before it."""
        probability = np.full(len(tokens) - ORDER + 1, 1 / self._vocabulary)
        for order, counts in enumerate(self._counts, 1):
            grams = _grams(tokens[ORDER - order :], order, self._vocabulary)
            probability = counts.interpolated(grams, probability)
        return probability

    def loss(self, tokens: Tokens) -> float:
        """The mean of -log p, in nats: the logarithm of the perplexity."""
        return float(-np.log(self.probabilities(tokens)).mean())


class _Counts:
    """How often each n-gram and each context was seen, and what different tokens followed."""

    def __init__(self, grams: Tokens, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._grams, self._seen = np.unique(grams, return_counts=True)
        self._contexts, first, self._followers = np.unique(
            self._grams // vocabulary, return_index=True, return_counts=True
        )
        self._context_seen = np.add.reduceat(self._seen, first)

    def interpolated(self, grams: Tokens, lower: Array) -> Array:
        """With `lower`, what the order below says."""
        contexts = grams // self._vocabulary
        seen = _look_up(grams, self._grams, self._seen)
        context_seen = _look_up(contexts, self._contexts, self._context_seen)
        followers = _look_up(contexts, self._contexts, self._followers)
        known = np.maximum(context_seen + followers, 1)
        return np.where(context_seen > 0, (seen + followers * lower) / known, lower)


def _grams(tokens: Tokens, order: int, vocabulary: int) -> Tokens:
    """Each run of `order` tokens as one number."""
    number = len(tokens) - order + 1
    grams = np.zeros(number, dtype=np.int64)
    for position in range(order):
        grams = grams * vocabulary + tokens[position : position + number]
    return grams


def _look_up(keys: Tokens, known: Tokens, values: Tokens) -> Tokens:
    """The value of each key, 0 where it is not known."""
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)
