"""The words of token ids against those of their bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minifoundation.evaluate.ngrams import BREAK, Words
from minifoundation.evaluate.vocabulary import Vocabulary
from tests.evaluate.pieces import ENDS, PIECES


@pytest.mark.parametrize("seed", range(20))
def test_words_of_tokens_are_those_of_their_bytes(seed: int) -> None:
    tokens = np.array(random.Random(seed).choices(range(len(PIECES)), k=400))
    text = b"".join(bytes([BREAK]) if token in ENDS else PIECES[token].replace(b"\xff", b"!") for token in tokens)
    vocabulary = Vocabulary.of(PIECES, breaks=ENDS)
    runs = vocabulary.runs(tokens)
    ours, theirs = vocabulary.words(runs, vocabulary.starts(runs)), Words.of(np.frombuffer(text, np.uint8))
    assert ours.hashes.tolist() == theirs.hashes.tolist() and len(ours.hashes) > 50
    every = np.arange(len(ours.hashes))
    assert ours.documents(every).tolist() == theirs.documents(every).tolist()
