"""Log-likelihoods of token sequences by a model of transformers, each shared beginning computed once.

The requests of a benchmark repeat themselves: the endings of one question share its context, the questions of one subject their
examples. Sequences with a common beginning become a ``Group``: its prefix goes through the model once, and its key-value cache
branches into the rest of each sequence. Only positions that are scored go through the output head, in float32.

Letters: G groups, R rows, P prefix tokens, L tokens after it, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Ids = npt.NDArray[np.int64]

WORTH_SHARING = 8
"""Tokens: a shorter common beginning saves less than a second pass costs."""
BRANCHING = 4
"""Rows read this many times the tokens of a batch from branched caches: a cached token costs its keys and values alone."""
HEAD_BYTES = 1 << 31
"""What logits and log-probabilities of one call of the head may take."""


@dataclass(frozen=True)
class Span:
    """A sequence of token ids and where its scored part begins: ``tokens[start:]``, with ``start`` at least 1."""

    tokens: Ids
    start: int


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a scored part in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Group:
    """Model inputs, by their number, whose first ``prefix`` tokens are equal."""

    prefix: int
    members: tuple[int, ...]


def grouped(inputs: Sequence[Ids]) -> list[Group]:
    """Return ``inputs``, all different, in groups that share a beginning.

    In lexicographic order sequences with a long common beginning are neighbours. A sequence joins the group before it when that saves more
    tokens than the shorter prefix costs the members, unless it has much more in common with the sequence after it.
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].astype(">u4").tobytes())
    common = [0, *(_common(inputs[a], inputs[b]) for a, b in pairwise(order)), 0]
    groups: list[Group] = []
    members: list[int] = []
    prefix = 0
    for place, number in enumerate(order):
        shared = min(prefix, common[place])
        saves = shared >= WORTH_SHARING and shared > (prefix - shared) * (len(members) - 1)
        if members and saves and common[place + 1] <= 2 * shared:
            members.append(number)
            prefix = shared
            continue
        if members:
            groups.append(Group(prefix, tuple(members)))
        members, prefix = [number], len(inputs[number])
    return [*groups, Group(prefix, tuple(members))] if members else groups


def parted(inputs: Sequence[Ids], parts: int) -> list[list[int]]:
    """Return the numbers of ``inputs`` in as many parts of about as many tokens each; neighbours in lexicographic order stay together."""
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].astype(">u4").tobytes())
    before = np.cumsum([0, *(len(inputs[i]) for i in order)])
    found: list[list[int]] = [[] for _ in range(parts)]
    for place, number in enumerate(order):
        found[int(before[place]) * parts // max(1, int(before[-1]))].append(number)
    return found


def _common(a: Ids, b: Ids) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if differs.size else length


class Network:
    """A causal model of transformers, by its body and its head where the logits are the head alone.

    What a model can do is tried out, not concluded from its name: some scale or cap the logits after the head, some keep caches that
    cannot branch (sliding windows, recurrent states). Those compute every position's logits, or every sequence on its own.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.body: Any = None
        self.head: Any = None
        ids = torch.arange(2 * WORTH_SHARING, device=model.device).remainder(self.vocab_size)[None]
        with torch.inference_mode():
            logits = model(ids).logits
            with suppress(Exception):  # whatever a model without these parts raises, its own logits remain
                body, head = model.get_decoder(), model.get_output_embeddings()
                if torch.allclose(head(body(ids).last_hidden_state), logits, rtol=1e-3, atol=1e-3):
                    self.body, self.head = body, head
        self.branches = self._branches(ids)

    @torch.inference_mode()
    def _branches(self, ids: Tensor) -> bool:
        half = ids.shape[1] // 2
        with suppress(Exception):
            _, cache = self.states(ids[:, :half], cached=True)
            if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
                return False
            prefix, rows = torch.tensor([half], device=ids.device), torch.tensor([0], device=ids.device)
            branched, whole = self.branched(ids[:, half:], branch(cache, rows, half), prefix), self.states(ids, cached=False)[0][:, half:]
            return bool(((branched - whole).float().norm() / whole.float().norm()) < 0.02)
        return False

    def states(self, ids: Tensor, *, cached: bool) -> tuple[Tensor, Any]:
        """Return the states of rows (R, T) that may be padded at their end, (R, T, D), and their key-value cache when asked for."""
        out = (self.body or self.model)(input_ids=ids, use_cache=cached)
        return (out.logits if self.body is None else out.last_hidden_state), (out.past_key_values if cached else None)

    def branched(self, ids: Tensor, cache: Any, prefix: Tensor) -> Tensor:
        """Return the states of rows (R, L) that go on from the first ``prefix`` (R,) tokens of ``cache``; the others are padding."""
        length = ids.shape[1]
        kept = cache.get_seq_length()
        places = torch.arange(kept + length, device=ids.device)
        mask = (places < prefix[:, None]) | (places >= kept)
        positions = prefix[:, None] + torch.arange(length, device=ids.device)
        model = self.body or self.model
        out = model(input_ids=ids, past_key_values=cache, attention_mask=mask.long(), position_ids=positions, use_cache=True)
        return out.logits if self.body is None else out.last_hidden_state  # type: ignore[no-any-return]

    def scores(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 log-probabilities (N,) of targets (N,) after states (N, D), and whether each is the most likely token."""
        size = max(1, HEAD_BYTES // (12 * self.vocab_size))
        values, greedy = [], []
        for part, wanted in zip(states.split(size), targets.split(size), strict=True):
            logits = part if self.head is None else self.head(part)
            log_probabilities = logits.float().log_softmax(-1)
            values.append(log_probabilities.gather(1, wanted[:, None])[:, 0])
            greedy.append(log_probabilities.argmax(-1) == wanted)
        return torch.cat(values), torch.cat(greedy)


def branch(cache: Any, groups: Tensor, prefix: int) -> DynamicCache:
    """Return a cache of ``prefix`` tokens whose rows are those of ``cache`` numbered ``groups``; ``cache`` stays as it is."""
    copy = DynamicCache()
    for place, layer in enumerate(cache.layers):
        copy.update(layer.keys[groups, :, :prefix], layer.values[groups, :, :prefix], place)
    return copy


def log_likelihoods(
    network: Network, spans: Sequence[Span], *, batch_tokens: int, rows: int | None = None, done: Callable[[int], object] = lambda n: None
) -> list[Score]:
    """Return the score of each of ``spans``, in their order.

    Args:
        batch_tokens: how many tokens go through the model at once; halved when the GPU's memory does not suffice.
        rows: at most so many rows at once.
        done: called with how many more are done.
    """
    numbers: dict[bytes, int] = {}
    inputs: list[Ids] = []
    asked: list[list[int]] = []  # the spans of each input: the letters of one question differ in what is scored alone
    for i, span in enumerate(spans):
        key = span.tokens[:-1].tobytes()
        if key not in numbers:
            numbers[key] = len(inputs)
            inputs.append(span.tokens[:-1])
            asked.append([])
        asked[numbers[key]].append(i)
    groups = grouped(inputs) if network.branches else [Group(len(ids), (i,)) for i, ids in enumerate(inputs)]
    groups.sort(key=lambda group: -group.prefix)
    scores: list[Score | None] = [None] * len(spans)
    work = _Work(network, spans, inputs, asked, scores)
    while groups:
        size = _fitting([group.prefix for group in groups], batch_tokens, rows)
        try:
            with torch.inference_mode():
                work.run(groups[:size], batch_tokens, rows)
        except torch.OutOfMemoryError:
            if batch_tokens == 1:
                raise
            torch.cuda.empty_cache()
            batch_tokens //= 2
            continue
        done(sum(len(asked[number]) for group in groups[:size] for number in group.members))
        del groups[:size]
    return [score for score in scores if score is not None]


def _fitting(lengths: Sequence[int], tokens: int, rows: int | None) -> int:
    """Return how many rows, padded to the first and longest of ``lengths``, hold at most ``tokens``; at least one."""
    return min(max(1, tokens // max(1, lengths[0])), rows or len(lengths), len(lengths))


@dataclass
class _Work:
    network: Network
    spans: Sequence[Span]
    inputs: Sequence[Ids]
    asked: Sequence[Sequence[int]]
    scores: list[Score | None]

    def run(self, groups: Sequence[Group], batch_tokens: int, rows: int | None) -> None:
        """Score every span of ``groups``, whose prefixes fit one batch."""
        device = self.network.model.device
        values = {i: np.empty(len(self.spans[i].tokens) - self.spans[i].start) for i in self._spans(groups)}
        greedy = {i: np.empty(len(value), dtype=bool) for i, value in values.items()}
        branches = [(g, number) for g, group in enumerate(groups) for number in group.members if len(self.inputs[number]) > group.prefix]
        prefixes = [self.inputs[group.members[0]][: group.prefix] for group in groups]
        states, cache = self.network.states(_padded(prefixes, device), cached=bool(branches))
        starts = [(0, group.prefix, number) for group in groups for number in group.members]
        row_of = [g for g, group in enumerate(groups) for _ in group.members]
        self._read(states, row_of, starts, values, greedy)
        del states
        branches.sort(key=lambda pair: groups[pair[0]].prefix - len(self.inputs[pair[1]]))
        while branches:
            kept = max(groups[g].prefix for g, _ in branches)
            longest = len(self.inputs[branches[0][1]]) - groups[branches[0][0]].prefix
            size = min(_fitting([longest] * len(branches), batch_tokens, rows), max(1, BRANCHING * batch_tokens // (kept + longest)))
            part, branches = branches[:size], branches[size:]
            prefix = [groups[g].prefix for g, _ in part]
            rest = _padded([self.inputs[number][length:] for (_, number), length in zip(part, prefix, strict=True)], device)
            chosen = torch.tensor([g for g, _ in part], device=device)
            states = self.network.branched(rest, branch(cache, chosen, max(prefix)), torch.tensor(prefix, device=device))
            parts = [(length, len(self.inputs[number]), number) for (_, number), length in zip(part, prefix, strict=True)]
            self._read(states, list(range(len(part))), parts, values, greedy)
        for i, value in values.items():
            self.scores[i] = Score(float(value.sum()), bool(greedy[i].all()))

    def _spans(self, groups: Sequence[Group]) -> Iterator[int]:
        for group in groups:
            for number in group.members:
                yield from self.asked[number]

    def _read(
        self,
        states: Tensor,
        rows: Sequence[int],
        parts: Sequence[tuple[int, int, int]],
        values: dict[int, npt.NDArray[np.float64]],
        greedy: dict[int, npt.NDArray[np.bool_]],
    ) -> None:
        """Fill in the log-probabilities of the targets that follow ``states``.

        Args:
            rows: the row of ``states`` that holds each part.
            parts: (first, end, input): the row's states are those of the positions first to end of the input.
        """
        found: list[tuple[int, int, int]] = []  # span, first and end of its targets
        row, place, target = [], [], []
        for at, (first, end, number) in zip(rows, parts, strict=True):
            for i in self.asked[number]:
                span = self.spans[i]
                begin, stop = max(first, span.start - 1), min(end, len(span.tokens) - 1)  # positions; their targets come one later
                if begin < stop:
                    found.append((i, begin + 1 - span.start, stop + 1 - span.start))
                    row.append(np.full(stop - begin, at))
                    place.append(np.arange(begin - first, stop - first))
                    target.append(span.tokens[begin + 1 : stop + 1])
        if not found:
            return
        index = [torch.from_numpy(np.concatenate(part)).to(states.device) for part in (row, place, target)]
        likelihood, most_likely = (x.cpu().numpy() for x in self.network.scores(states[index[0], index[1]], index[2]))
        at = 0
        for i, begin, stop in found:
            values[i][begin:stop] = likelihood[at : at + stop - begin]
            greedy[i][begin:stop] = most_likely[at : at + stop - begin]
            at += stop - begin


def _padded(rows: Sequence[Ids], device: torch.device) -> Tensor:
    """Return rows as one tensor, shorter ones padded at their end, where a causal model does not see it."""
    batch = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for place, ids in enumerate(rows):
        batch[place, : len(ids)] = ids
    return torch.from_numpy(batch).to(device, non_blocking=True)
