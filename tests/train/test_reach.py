"""Loss by position against the plain loss, and needles against a model that is known to find them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.data.shards import Shard
from minifoundation.data.tokenizer import BOS, EOS
from minifoundation.model.transformer import Transformer
from minifoundation.train import reach
from minifoundation.train.reach import Needles, beginnings, edges, longest, loss_by_position, mean_loss, needle_lengths, token_nats

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"vocab_size": 256, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 16}


@pytest.fixture(scope="module")
def model() -> Transformer:
    transformer = Transformer(ModelConfig.model_validate({**SHAPE, "init_std": 0.2}))
    transformer.initialise(0)
    return transformer


def plain(model: Transformer, ids: np.ndarray) -> np.ndarray:
    row = torch.from_numpy(ids)[None]
    found: np.ndarray = F.cross_entropy(model.logits(row[:, :-1])[0], row[0, 1:], reduction="none").detach().numpy()
    return found


def test_nats_and_best_guesses_are_those_of_the_logits(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "LOGITS_AT_ONCE", 7)
    rows = np.random.default_rng(0).integers(0, 256, (3, 21))
    rows[0, -1] = int(model.logits(torch.from_numpy(rows[:1, :-1]))[0, -1].argmax())
    nats, best = token_nats(model, rows, CPU, last=5)
    assert nats.shape == best.shape == (3, 5) and bool(best[0, -1])
    for row, cost, hit in zip(rows, nats, best, strict=True):
        np.testing.assert_allclose(cost, plain(model, row)[-5:], rtol=1e-4)
        assert torch.equal(hit, model.logits(torch.from_numpy(row[None, :-1]))[0, -5:].argmax(-1) == torch.from_numpy(row[-5:]))
    assert mean_loss(model, rows, CPU) == pytest.approx(np.mean([plain(model, row) for row in rows]), rel=1e-5)


def test_loss_by_position_is_the_mean_of_what_reaches_there(model: Transformer) -> None:
    random = np.random.default_rng(1)
    documents = [random.integers(0, 256, length) for length in (65, 65, 40, 20)]
    bounds = edges(16, 64)
    assert bounds == [0, 4, 8, 16, 24, 32, 48, 64]
    losses = [plain(model, ids) for ids in documents]
    found = loss_by_position(model, documents, bounds, CPU)
    assert [place.documents for place in found] == [4, 4, 4, 4, 3, 3, 2]
    for place, (first, end) in zip(found, itertools.pairwise(bounds), strict=True):
        here = np.concatenate([loss[first:end] for loss in losses])
        assert (place.first, place.last, place.tokens) == (first, end - 1, len(here))
        assert place.nats == pytest.approx(here.mean(), rel=1e-5)


@pytest.mark.parametrize("length", [2, 9, 16, 17, 24, 25, 64, 71])
def test_in_sliding_windows_each_token_is_read_once_with_at_least_half_a_window_before_it(
    model: Transformer, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "TOKENS_AT_ONCE", 48)  # three windows
    ids, window = np.random.default_rng(2).integers(0, 256, length + 1), 16
    expected = []
    for target in range(1, length + 1):  # each window ends a half after the one before it, the last where the document does
        ends = [*range(window, length, window // 2), length]
        end = next(end for end in ends if end >= target)
        first = max(0, end - window)
        expected.append(plain(model, ids[first : end + 1])[target - 1 - first])
        assert target - first > min(target - 1, window // 2)
    np.testing.assert_allclose(reach.sliding_nats(model, ids, window, CPU), expected, rtol=1e-4)
    bounds = [0, 8, length] if length > 8 else [0, length]
    places = loss_by_position(model, [ids], bounds, CPU, window=window)
    assert [place.nats for place in places] == pytest.approx([np.mean(expected[a:b]) for a, b in itertools.pairwise(bounds)], rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_smallest_windows_read_each_token_once_too(model: Transformer, window: int, length: int) -> None:
    ids = np.random.default_rng(3).integers(0, 256, length + 1)
    expected = [plain(model, ids[max(0, target - window) : target + 1])[-1] for target in range(1, length + 1)]
    np.testing.assert_allclose(reach.sliding_nats(model, ids, window, CPU), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("original", "length"), [(16, 16), (16, 20), (4096, 65_536), (256, 1024), (8, 100), (1, 1), (1, 9), (2, 3), (3, 4)]
)
def test_buckets_and_lengths_end_where_the_rows_do(original: int, length: int) -> None:
    bounds, lengths = edges(original, length), needle_lengths(original, length)
    assert bounds[0] == 0 and bounds[-1] == lengths[-1] == length and original in bounds
    assert bounds == sorted(set(bounds)) and lengths == sorted(set(lengths))


def test_long_documents_come_longest_first(tmp_path: Path) -> None:
    lengths = [10, 30, 60, 5, 22, 90]
    ids = np.concatenate([[BOS, *[number + 3] * (length - 2), EOS] for number, length in enumerate(lengths)])
    path = tmp_path / "held.bin"
    ids.astype("<u2").tofile(path)
    shard = Shard(path, np.dtype("<u2"), len(ids), len(lengths), 1)
    found = longest(beginnings([shard], EOS, 48), longer_than=16, count=3)
    assert [(len(one), int(one[1]) - 3) for one in found] == [(49, 2), (49, 5), (30, 1)]


def encode(text: str) -> list[int]:
    return [3 + ord(letter) % 250 for letter in text]


class Induction:
    """A model that looks for the last eight tokens further up in the row and says what came after them there."""

    def __call__(self, tokens: Tensor) -> Tensor:
        guesses = torch.zeros(*tokens.shape, 256)
        for guess, row in zip(guesses, tokens.tolist(), strict=True):
            seen: dict[tuple[int, ...], int] = {}
            for place in range(8, len(row) + 1):
                context = tuple(row[place - 8 : place])
                guess[place - 1, seen.get(context, 0)] = 20.0
                if place < len(row):
                    seen[context] = row[place]
        return guesses

    def output(self, hidden: Tensor) -> Tensor:
        return hidden


def test_needles_are_found_by_a_model_that_can() -> None:
    text = np.random.default_rng(0).integers(130, 250, 500)
    needles = Needles(encode, [BOS], text, seed=0)
    found = list(needles.grid(Induction(), [300, 640], 2, CPU))  # type: ignore[arg-type]
    assert {(needle.task, needle.length) for needle in found} == {(task, length) for task in reach.TASKS for length in (300, 640)}
    assert all(needle.found == needle.tries == 2 and needle.nats < 0.01 for needle in found), found


def test_needles_are_not_found_by_a_model_that_cannot(model: Transformer) -> None:
    found = list(Needles(encode, [BOS], np.arange(130, 250), seed=0).grid(model, [300], 3, CPU))
    assert sum(needle.found for needle in found) == 0 and min(needle.nats for needle in found) > 1


@pytest.mark.parametrize("task", reach.TASKS)
def test_a_prompt_is_as_long_as_asked_and_holds_its_needle_once_at_its_depth(task: reach.Task) -> None:
    needles = Needles(encode, [BOS], np.arange(200, 250), seed=0)
    places = []
    for depth in reach.DEPTHS:
        made = needles.prompt(task, 600, depth, 1)
        assert made is not None
        ids, count = made
        answer = ids[-count:].tolist()
        assert len(ids) == 600 and ids[0] == BOS and count == 6
        there = [at for at in range(len(ids) - count + 1) if ids[at : at + count].tolist() == answer]
        assert len(there) == (3 if task == "passkey" else 2)
        places.append(there[0])
    assert places == sorted(places) and places[0] < 150 and places[-1] > 350
    assert needles.prompt(task, 40, 0.5, 1) is None
