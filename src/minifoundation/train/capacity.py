"""What is predicted to fit a GPU of some memory: rows at once, the longest row, the largest model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from minifoundation.config import ModelConfig, RunConfig
from minifoundation.model.size import n_parameters
from minifoundation.train.plan import USABLE_MEMORY, predicted_memory

LENGTH_STEP = 1024


def most_rows(config: RunConfig, memory_bytes: float) -> int:
    """Return how many rows of ``train.seq_len`` fit at once; 0 when not even one does."""
    return _most(lambda rows: config.replaced(train={"batch_size": rows}), range(1, 1025), memory_bytes)


def longest_row(config: RunConfig, memory_bytes: float) -> int:
    """Return the longest row that fits by itself, in steps of 1,024 tokens up to a million; 0 when none does."""
    lengths = range(LENGTH_STEP, 2**20 + 1, LENGTH_STEP)
    return _most(lambda length: config.replaced(train={"batch_size": 1, "seq_len": length}), lengths, memory_bytes)


def largest_model(config: RunConfig, memory_bytes: float) -> ModelConfig | None:
    """Return the largest model that fits with one row of ``train.seq_len``: that of ``config`` scaled in width and depth alike.

    Widths are whole groups of heads of the same width, in the same proportion of query to key/value heads. None when none fits.
    """
    model = config.model
    one_row = config.replaced(train={"batch_size": 1})
    groups = _most(lambda groups: one_row.model_copy(update={"model": scaled(model, groups)}), range(1, 257), memory_bytes)
    return scaled(model, groups) if groups else None


def scaled(model: ModelConfig, groups: int) -> ModelConfig:
    """Return ``model`` with ``groups`` key/value heads and all else in proportion to that: width, feed-forward width and depth."""
    factor = groups / model.n_kv_head
    n_head = groups * (model.n_head // model.n_kv_head)
    sizes = {
        "n_kv_head": groups,
        "n_head": n_head,
        "d_model": n_head * model.head_width if model.head_dim is None else _rounded(model.d_model * factor),
        "d_ff": _rounded(model.d_ff * factor),
        "n_layer": max(1, round(model.n_layer * factor)),
    }
    return model.model_copy(update=sizes)


def _rounded(width: float) -> int:
    return max(128, round(width / 128) * 128)


def billions(model: ModelConfig) -> float:
    """Return the parameters of ``model`` in billions."""
    return n_parameters(model) / 1e9


def _most(made: Callable[[int], RunConfig], sizes: Iterable[int], memory_bytes: float) -> int:
    """Return the largest of the rising ``sizes`` that fits; 0 when none does."""
    largest = 0
    for size in sizes:
        if sum(predicted_memory(made(size)).values()) > USABLE_MEMORY * memory_bytes:
            break
        largest = size
    return largest
