"""Tokens whose bytes make words in every way, and documents as bytes."""

from __future__ import annotations

import numpy as np

from minifoundation.evaluate.ngrams import BREAK

PIECES = [
    b"",
    b"\x01",
    b"\x02",
    b" the",
    b"the",
    b" ",
    b"cat",
    b" Cat",
    b",",
    b"s. ",
    b"don't",
    b"a,b",
    b"\n\n",
    b"42",
    b"\xc3",
    b"\xa9t\xc3\xa9",
    b" \xe2\x98\x83 ",
    b"\xff",
    b"a-b-c.d",
]
ENDS = (1, 2)
"""Of ``PIECES``: they end a document."""


def raw(*documents: str) -> np.ndarray:
    """Return ``documents`` one after the other, each with its end."""
    return np.frombuffer(b"".join(text.encode() + bytes([BREAK]) for text in documents), np.uint8)
