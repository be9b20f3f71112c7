"""How far a model reads: its loss by position in long documents, and whether it repeats what it was told far back.

Letters: B rows, T tokens a row.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.data.lengths import Documents
from minifoundation.data.shards import Shard
from minifoundation.model.transformer import Transformer

LOGITS_AT_ONCE = 2048
"""Tokens whose float32 logits are held at once."""

TOKENS_AT_ONCE = 65_536
"""Tokens of short rows that go through the model at once."""

Ids = npt.NDArray[np.int64]


@torch.no_grad()
def token_nats(transformer: Transformer, rows: Ids, device: torch.device, *, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross entropy in nats of the ``last`` targets (all by default) of rows (B, T + 1), and whether each was the best guess.

    Both (B, last), on the CPU. A target is the best guess when a greedy continuation would have chosen it.
    """
    tokens, targets = torch.from_numpy(rows[:, :-1]).to(device), torch.from_numpy(rows[:, 1:]).to(device)
    last = targets.shape[1] if last is None else last
    hidden = transformer(tokens)[:, -last:].flatten(0, 1)
    wanted = targets[:, -last:].flatten()
    nats, best = [], []
    for part, target in zip(hidden.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True):
        logits = transformer.output(part).float()
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        best.append(logits.argmax(-1) == target)
    return torch.cat(nats).view(-1, last).cpu(), torch.cat(best).view(-1, last).cpu()


@dataclass(frozen=True)
class Place:
    """The loss of the tokens at some positions."""

    first: int
    last: int
    documents: int
    """Behind the mean, as far as they reach these positions."""
    tokens: int
    nats: float


def edges(original: int, length: int) -> list[int]:
    """Return where buckets of positions begin, and the end: a quarter, a half and all of the original length, then two to a doubling."""
    inside = [0, original // 4, original // 2, original]
    beyond = itertools.chain.from_iterable((original * 3 * 2**power // 2, original * 2 ** (power + 1)) for power in range(32))
    found = [*inside, *itertools.takewhile(lambda edge: edge < length, beyond), length]
    return sorted({edge for edge in found if edge <= length})


def beginnings(shards: Sequence[Shard], eos: int, length: int) -> Iterator[Ids]:
    """Yield the first ``length`` + 1 tokens at most of each document of ``shards``, which end with ``eos``."""
    documents = Documents.of(shards, eos)
    for number in range(len(documents)):
        yield documents.tokens(number, count=length + 1).astype(np.int64)


def longest(documents: Iterable[Ids], *, longer_than: int, count: int) -> list[Ids]:
    """Return the ``count`` longest of the documents with more than ``longer_than`` tokens; equally long ones in their order."""
    return heapq.nlargest(count, (ids for ids in documents if len(ids) > longer_than), key=len)  # and holds no others


def sliding_nats(transformer: Transformer, ids: Ids, window: int, device: torch.device) -> Tensor:
    """Return the cross entropy of all targets of a document (T + 1), read in windows of ``window`` tokens: (T,) nats, on the CPU.

    Windows overlap by half, and a token counts where it has the most before it: at least half a window, as far as there is so much. That
    is what a model of that length can do with a longer text (sliding-window evaluation, arXiv:2108.12409, section 2).
    """
    count = len(ids) - 1
    last = max(0, count - window)
    firsts = [*range(0, last, max(1, window // 2)), last]
    rows = np.stack([ids[first : first + window + 1] for first in firsts])
    at_once = max(1, TOKENS_AT_ONCE // window)
    nats = torch.cat([token_nats(transformer, rows[row : row + at_once], device)[0] for row in range(0, len(rows), at_once)])
    told = [0, *(first + window for first in firsts[:-1])]  # targets that the windows before have
    return torch.cat([row[done - first :] for row, first, done in zip(nats, firsts, told, strict=True)])


def loss_by_position(
    transformer: Transformer, documents: Iterable[Ids], bounds: Sequence[int], device: torch.device, *, window: int | None = None
) -> list[Place]:
    """Return the mean loss of the tokens between neighbouring ``bounds``; buckets that no document reaches are left out.

    Args:
        window: tokens that are read at once, as ``sliding_nats`` does; None: the document.
    """
    sums, tokens, reached = (np.zeros(len(bounds) - 1) for _ in range(3))
    for ids in documents:
        read = token_nats(transformer, ids[None], device)[0][0] if window is None else sliding_nats(transformer, ids, window, device)
        nats = read.double().numpy()
        for bucket, (first, end) in enumerate(itertools.pairwise(bounds)):
            here = nats[first:end]
            sums[bucket] += here.sum()
            tokens[bucket] += len(here)
            reached[bucket] += len(here) > 0
    found = zip(itertools.pairwise(bounds), sums, tokens, reached, strict=True)
    return [Place(first, end - 1, int(documents), int(n), float(total / n)) for (first, end), total, n, documents in found if n]


def mean_loss(transformer: Transformer, rows: Ids, device: torch.device) -> float:
    """Return the mean cross entropy of rows (B, T + 1), nats a token."""
    at_once = max(1, TOKENS_AT_ONCE // rows.shape[1])
    parts = [token_nats(transformer, rows[first : first + at_once], device)[0] for first in range(0, len(rows), at_once)]
    return float(torch.cat(parts).double().mean())


Task = Literal["single", "multi-key", "passkey"]
TASKS: tuple[Task, ...] = get_args(Task)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle is, as a share of the text before the question."""

PLACES = ("Amber", "Birch", "Cedar", "Delta", "Ember", "Fjord", "Grove", "Haven", "Iris", "Jade", "Karst", "Lotus", "Maple", "Opal", "Pine")
KEYS = 4
"""Needles of ``multi-key``, of which one is asked for."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Needle:
    """How a model did on the needles of one task, length and depth."""

    task: Task
    length: int
    depth: float
    tries: int
    found: int
    """All tokens of the answer were the best guess, as a greedy continuation has to give it."""
    nats: float
    """Mean cross entropy of the answer's tokens."""


def needle_lengths(original: int, length: int) -> list[int]:
    """Return the lengths that are tried: half the original one, doubled up to ``length``."""
    powers = itertools.takewhile(lambda tried: tried < length, (max(1, original // 2) * 2**power for power in itertools.count()))
    return [*powers, length]


class Needles:
    """Prompts that hide numbers in text and ask for one of them.

    ``single`` and ``multi-key`` are needle tests of RULER (arXiv:2404.06654) over text, ``passkey`` is that of arXiv:2305.16300 over one
    line again and again.

    Args:
        encode: text to ids, without bos or eos.
        prefix: what a document begins with.
        text: ids to hide needles in, without bos or eos.
        seed: of names, numbers and places.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], prefix: Sequence[int], text: Ids, *, seed: int) -> None:
        self._encode = encode
        self._prefix = np.array(prefix, np.int64)
        self.text = text
        self._noise = np.array(encode(NOISE), np.int64)
        self._seed = seed

    def prompt(self, task: Task, length: int, depth: float, number: int) -> tuple[Ids, int] | None:
        """Return ``length`` ids that end with the answer, and how many of them it has; None where they are too few for the task."""
        random = np.random.default_rng((self._seed, TASKS.index(task), length, round(100 * depth), number))
        names = random.choice(len(PLACES), KEYS if task == "multi-key" else 1, replace=False)
        secrets = random.choice(np.arange(10_000, 100_000), len(names), replace=False)
        if task == "passkey":
            answer = f" {secrets[0]}"
            needles = [(depth, self._ids("\nThe pass key is", answer, f". Remember it.{answer} is the pass key.\n"))]
            question = self._ids("\nWhat is the pass key? The pass key is", answer)
        else:
            pairs = zip(names, secrets, strict=True)
            told = [self._ids(f"\nThe secret number of {PLACES[name]} is", f" {secret}", ".\n") for name, secret in pairs]
            needles = list(zip([depth, *random.random(len(told) - 1)], told, strict=True))
            answer = f" {secrets[0]}"
            question = self._ids(f"\nThe secret number of {PLACES[names[0]]} is", answer)
        room = length - len(self._prefix) - len(question) - sum(len(ids) for _, ids in needles)
        if room < 0:
            return None
        filler = self._filler(task, room, random)
        parts: list[Ids] = [self._prefix]
        at = 0
        for place, ids in sorted(needles, key=lambda needle: needle[0]):
            end = round(place * room)
            parts += [filler[at:end], ids]
            at = end
        return np.concatenate([*parts, filler[at:], question]), len(self._encode(answer))

    def _ids(self, *texts: str) -> Ids:
        """Return the ids of ``texts``, each encoded by itself: an answer has the same ids where it is told and where it is asked for."""
        return np.array([token for text in texts for token in self._encode(text)], np.int64)

    def _filler(self, task: Task, count: int, random: np.random.Generator) -> Ids:
        ids = self._noise if task == "passkey" else self.text
        first = 0 if task == "passkey" else int(random.integers(len(ids)))
        return np.resize(np.roll(ids, -first), count) if count > len(ids) - first else ids[first : first + count]

    def grid(self, transformer: Transformer, lengths: Sequence[int], tries: int, device: torch.device) -> Iterator[Needle]:
        """Yield how ``transformer`` does on ``tries`` prompts of each task, length and depth."""
        for task, length, depth in itertools.product(TASKS, lengths, DEPTHS):
            made = [self.prompt(task, length, depth, number) for number in range(tries)]
            prompts = [prompt for prompt in made if prompt is not None]
            if not prompts:
                continue
            longest = max(count for _, count in prompts)
            at_once = max(1, TOKENS_AT_ONCE // length)
            nats, found = [], 0
            for first in range(0, len(prompts), at_once):
                some = prompts[first : first + at_once]
                cost, best = token_nats(transformer, np.stack([ids for ids, _ in some]), device, last=longest)
                for row, (_, count) in enumerate(some):
                    nats.append(float(cost[row, -count:].mean()))
                    found += bool(best[row, -count:].all())
            yield Needle(task, length, depth, len(prompts), found, statistics.fmean(nats))
