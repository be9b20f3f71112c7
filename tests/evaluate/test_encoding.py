from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from minifoundation.evaluate.encoding import KEPT, encoded_pairs

if TYPE_CHECKING:
    from minifoundation.evaluate.model import Model

PAIRS = [("The sky is", " blue"), ("The sky is ", "blue"), ("The sky is", " green\n"), ("a", "b"), ("  x\n", "y z"), ("é ☃", " 日本")]


def test_ids_are_those_of_lm_eval(tiny: Model, tmp_path: Path) -> None:
    for folder in (None, tmp_path, tmp_path):  # not kept, kept, read
        found = encoded_pairs(PAIRS, tiny._encode, identity="", folder=folder)
        for pair, encoded in zip(PAIRS, found, strict=True):
            context, continuation = tiny._encode_pair(*pair)
            assert (encoded.context.tolist(), encoded.continuation.tolist()) == (context, continuation), pair


def test_texts_that_stand_alone_have_ids_too(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks such as BLiMP compare whole sentences: no request has a context."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = ("The cat sleeps.", "The cat sleep.")
    found = tiny.loglikelihood([Instance("loglikelihood", {}, ("", text), place) for place, text in enumerate(texts)], disable_tqdm=True)
    after_bos = [(("", ""), [tiny.prefix_token_id], tiny.tok_encode(text, add_special_tokens=False)) for text in texts]
    assert found == tiny._loglikelihood_tokens(after_bos, disable_tqdm=True)


def test_the_second_time_nothing_is_encoded(tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        calls.append(len(texts))
        return [[ord(letter) for letter in text] for text in texts]

    pairs = [("ab", "c"), ("ab", "d"), ("x" * 70_000, "\U0001f600")]
    first = encoded_pairs(pairs, encode, identity="one", folder=tmp_path)
    assert calls == [2, 3]
    again = encoded_pairs(pairs, encode, identity="one", folder=tmp_path)
    assert calls == [2, 3]
    assert all(
        np.array_equal(a.context, b.context) and np.array_equal(a.continuation, b.continuation) for a, b in zip(first, again, strict=True)
    )
    encoded_pairs(pairs, encode, identity="another tokenizer", folder=tmp_path)
    encoded_pairs([*pairs[:2], ("x" * 69_999, "\U0001f600")], encode, identity="one", folder=tmp_path)
    assert calls == [2, 3, 2, 3, 2, 3], "another tokenizer and other texts are encoded anew"


def test_a_damaged_file_is_encoded_again_and_old_ones_go(tmp_path: Path) -> None:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    encoded_pairs([("ab", "c")], encode, identity="", folder=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    damaged = [
        whole[:100],
        *(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for place in range(len(whole)) for bit in (0, 5)),
    ]
    for content in damaged:
        file.write_bytes(content)
        (found,) = encoded_pairs([("ab", "c")], encode, identity="", folder=tmp_path)
        assert (found.context.tolist(), found.continuation.tolist()) == ([ord("a"), ord("b")], [ord("c")])
    for number in range(KEPT + 5):
        encoded_pairs([("ab", str(number))], encode, identity="", folder=tmp_path)
    assert len(list(tmp_path.glob("*"))) == KEPT


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = encoded_pairs(
        [("a", "b")], lambda texts: [[1, 2][: len(text)] for text in texts], identity="", folder=tmp_path / "file" / "x"
    )
    assert (found.context.tolist(), found.continuation.tolist()) == ([1], [2])
