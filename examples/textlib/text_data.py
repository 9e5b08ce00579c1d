"""A file becomes tokens: its characters or its bytes. The last tenth is held out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imagelib import InputError

Tokens = NDArray[np.int64]

MOST_HELD_OUT = 50_000  # tokens, however long the text is


@dataclass(frozen=True)
class Text:
    """A text as numbers from 0 up to (but not including) `vocabulary`."""

    tokens: Tokens
    vocabulary: int
    fingerprint: str

    @property
    def held_out_from(self) -> int:
        """Where the held-out part begins; nothing from there on is trained on."""
        return len(self.tokens) - min(len(self.tokens) // 10, MOST_HELD_OUT)

    @property
    def training(self) -> Tokens:
        return self.tokens[: self.held_out_from]

    @property
    def held_out(self) -> Tokens:
        return self.tokens[self.held_out_from :]


def read_text(path: Path, level: Literal["char", "byte"], context: int) -> Text:
    """Refuses a text whose held-out part does not fill one sequence of `context` tokens."""
    if not path.is_file():
        raise InputError(f"--data: there is no file {str(path)!r}")
    content = path.read_bytes()
    if level == "byte":
        tokens, vocabulary = np.frombuffer(content, np.uint8).astype(np.int64), 256
    else:
        tokens, vocabulary = _characters(content, path)
    text = Text(tokens, vocabulary, hashlib.blake2b(content, digest_size=8).hexdigest())
    if len(text.held_out) < context + 1:
        unit = "bytes" if level == "byte" else "characters"
        raise InputError(
            f"--data: {path} is too short: it has {len(tokens):,} {unit}, and at least "
            f"{10 * (context + 1):,} are needed with --context {context}"
        )
    return text


def _characters(content: bytes, path: Path) -> tuple[Tokens, int]:
    """The vocabulary is every character that occurs, in the held-out part as well."""
    try:
        characters = np.frombuffer(content.decode("utf-8").encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data: {path} is not UTF-8 text (byte {error.start}); --level byte takes any file"
        ) from error
    known, tokens = np.unique(characters, return_inverse=True)
    return tokens.astype(np.int64), len(known)
