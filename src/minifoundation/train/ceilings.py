"""What the device can do at best: matrix products at the shapes of a model, and copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.runtime import Machine, Moment

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
WARM_UP, ROUNDS = 2, 5


class Product(NamedTuple):
    """One of a block's products, N tokens of ``d_in`` numbers to ``d_out``: FLOP/s of the product and of its two gradients."""

    name: str
    d_in: int
    d_out: int
    forward: float
    input_gradient: float
    weight_gradient: float


def matrix_products(config: RunConfig, machine: Machine) -> list[Product]:
    """Return what the products of ``config`` reach by themselves at the tokens of a micro-batch, the head at a chunk of the loss."""
    model, train = config.model, config.train
    assert isinstance(train.batch_size, int)
    D, F, N = model.d_model, model.d_ff, train.batch_size * train.seq_len
    queries, keys = model.n_head * model.head_width, model.n_kv_head * model.head_width
    shapes = [("qkv", D, queries + 2 * keys, N), ("out", queries, D, N), ("gate, up", D, 2 * F, N), ("down", F, D, N)]
    shapes.append(("head", D, model.vocab_size, min(train.loss_chunk, N)))
    return [_product(name, d_in, d_out, tokens, config, machine) for name, d_in, d_out, tokens in shapes]


def _product(name: str, d_in: int, d_out: int, tokens: int, config: RunConfig, machine: Machine) -> Product:
    dtype = runtime.compute_dtype(config.train.precision, machine)
    # Random numbers: on zeros a GPU draws less power and clocks higher.
    x, weight, d_y = (torch.randn(*shape, device=machine.device, dtype=dtype) for shape in ((tokens, d_in), (d_out, d_in), (tokens, d_out)))
    works: tuple[Callable[[], object], ...] = (lambda: x @ weight.T, lambda: d_y @ weight, lambda: d_y.T @ x)
    rates = [2.0 * tokens * d_in * d_out / median_seconds(work, machine) for work in works]
    return Product(name, d_in, d_out, *rates)


def copy_bandwidth(machine: Machine) -> float:
    """Return the bytes a second, read and written, of a copy within the device's memory."""
    size = COPIED_BYTES.get(machine.device.type, 2**26)
    one, other = (torch.zeros(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    return 2.0 * size / median_seconds(lambda: other.copy_(one), machine)


def median_seconds(work: Callable[[], object], machine: Machine) -> float:
    """Return the median time of ``work`` on the device's clock."""
    moments = [Moment(machine)]
    for _ in range(WARM_UP + ROUNDS):
        work()
        moments.append(Moment(machine))
    times = [after.seconds_since(before) for before, after in pairwise(moments)]
    return statistics.median(times[WARM_UP:])
