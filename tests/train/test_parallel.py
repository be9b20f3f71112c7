"""How a run is shared: what is chosen, what is refused, and the micro-batches that tokens_per_step asks for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minifoundation import config
from minifoundation.config import REPOSITORY, RunConfig
from minifoundation.distributed import Context, Split, World
from minifoundation.errors import UserError
from minifoundation.model.size import n_matmul_parameters, n_parameters
from minifoundation.runtime import Machine
from minifoundation.train.parallel import accumulated, as_asked, chosen_split
from minifoundation.train.plan import plan, predicted_memory

GIB = 2**30
H100 = Machine(torch.device("cuda", 0), "H100", 80 * GIB, 989.4e12)
MESH: Any = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 0)
"""Of four processes that read a row together."""
NODE, TWO_NODES = World(0, 8, 0, 8), World(0, 16, 0, 8)


def run_config(**train: Any) -> RunConfig:
    values = config.read_yaml(REPOSITORY / "configs" / "model_1b.yaml")
    given = {"tokens": 10**10, "precision": "bf16", "batch_size": 1, **train}
    return config.build(RunConfig, config.merged(values, {"data": {"source": "x"}, "train": given}), "test")


@pytest.mark.parametrize(
    ("memory_gib", "world", "train", "expected"),
    [
        (80, World(), {"parallel": "fsdp"}, Split()),  # the same settings serve one process
        (80, NODE, {}, Split("ddp", owners=8)),
        (80, TWO_NODES, {}, Split("ddp", owners=8)),
        (80, World(0, 6, 0, 6), {}, Split("ddp")),  # which do not divide the rows of every weight
        (80, World(0, 3, 0, 2), {}, Split("ddp")),
        (80, NODE, {"batch_size": "auto"}, Split("ddp", owners=8)),
        (16, NODE, {}, Split("ddp", owners=8)),
        (9, NODE, {}, Split("fsdp", 8, regathers=False)),
        (9, TWO_NODES, {}, Split("hsdp", 8, regathers=False)),
        (4, TWO_NODES, {}, Split("fsdp", 16)),
        (9, NODE, {"precision": "fp8"}, Split("ddp", owners=8)),  # it does not fit, and the plan says so
        (16, NODE, {"optimizer_states": "int8"}, Split("ddp")),
        (80, TWO_NODES, {"parallel": "hsdp"}, Split("hsdp", 8, regathers=False)),
        (80, TWO_NODES, {"parallel": "fsdp"}, Split("fsdp", 16, regathers=False)),
        (9, NODE, {"parallel": "ddp"}, Split("ddp", owners=8)),
    ],
)
def test_what_is_chosen(memory_gib: int, world: World, train: dict[str, Any], expected: Split) -> None:
    assert chosen_split(run_config(**train), replace(H100, memory_bytes=memory_gib * GIB), world) == expected


@pytest.mark.parametrize(
    ("sizes", "memory_gib", "expected"),
    [
        ((4, 2), 80, Split("ddp", owners=2)),
        ((4, 2), 14, Split("hsdp", 2, regathers=False)),
        ((3, 2), 80, Split("ddp")),
        ((3, 2), 14, Split("fsdp", 5, regathers=False)),
    ],
)
def test_machines_with_different_numbers_of_processes_are_shared_in_equal_groups(
    sizes: tuple[int, int], memory_gib: int, expected: Split
) -> None:
    here, there = (World(0, sum(sizes), 0, size, local_sizes=sizes) for size in sizes)
    assert here.nodes == there.nodes == 2
    for world in (here, there):
        assert chosen_split(run_config(), replace(H100, memory_bytes=memory_gib * GIB), world) == expected


def test_between_cpus_each_updates_everything() -> None:
    cpu = replace(H100, device=torch.device("cpu"))
    assert chosen_split(run_config(), cpu, NODE) == Split("ddp")


@pytest.mark.parametrize(
    ("world", "train", "message"),
    [
        (NODE, {"parallel": "none"}, "train.parallel: none, and there are 8 processes; start one, or take auto, ddp or fsdp"),
        (NODE, {"parallel": "fsdp", "precision": "fp8"}, "train.parallel: fsdp gathers weights in half precision, not in 8 bits; take ddp"),
        (NODE, {"parallel": "fsdp", "optimizer_states": "int8"}, "train.parallel: fsdp cannot split moments in int8; take ddp"),
        (
            NODE,
            {"parallel": "hsdp"},
            "train.parallel: hsdp with 1 nodes of 8 processes; it needs two nodes, and equal groups of two or more",
        ),
        (World(0, 5, 0, 3, local_sizes=(3, 2)), {"parallel": "hsdp"}, "train.parallel: hsdp with 2 nodes of 2 and 3 processes; it needs"),
    ],
)
def test_what_cannot_be_had(world: World, train: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen_split(run_config(**train), H100, world)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("size", "micro"), [(1, 16), (2, 8), (4, 4), (16, 1)])
def test_tokens_per_step_are_the_same_for_any_number_of_processes(size: int, micro: int) -> None:
    asked = run_config(tokens_per_step=2**19, batch_size=8)
    done = accumulated(asked, World(0, size, 0, size))
    assert done.train.grad_accum == micro
    assert plan(done, size).tokens_per_step == 2**19
    assert as_asked(done) == asked, "what is kept can be started again on another number"


def test_tokens_per_step_of_processes_that_read_rows_together() -> None:
    done = accumulated(run_config(tokens_per_step=2**19, batch_size=8, context_parallel=4), World(0, 16, context=Context(MESH)))
    assert done.train.grad_accum == 4 and plan(done, 16).tokens_per_step == 2**19
    with pytest.raises(UserError, match=r"is not a multiple of 98,304 \(batch_size 8 x seq_len 4096 x 3 groups of 4 processes\)"):
        accumulated(run_config(tokens_per_step=2**19, batch_size=8, context_parallel=4), World(0, 12, context=Context(MESH)))


def test_a_part_of_a_row_takes_less_memory() -> None:
    """All that is kept of its tokens, and less of what is at work; keys and values of the whole row come to that."""
    for precision, checkpointing in (("bf16", "none"), ("bf16", "attention"), ("bf16", "full"), ("fp32", "none")):
        runs = [
            config.build(
                RunConfig,
                config.merged(
                    run_config(precision=precision, context_parallel=size, grad_accum=2).model_dump(),
                    {"model": {"checkpointing": checkpointing, "original_seq_len": 2**16}, "train": {"seq_len": 2**16}},
                ),
                "test",
            )
            for size in (1, 2, 4, 8)
        ]
        needed = [predicted_memory(run) for run in runs]
        assert len({parts["weights"] + parts["optimizer"] for parts in needed}) == 1
        totals = [sum(parts.values()) for parts in needed]
        assert totals == sorted(totals, reverse=True)
        item = 4 if precision == "fp32" else 2
        blocks = 1 if checkpointing == "full" else 20  # that are kept
        more = item * 2**16 // 4 * 32 * 64  # of a block: what its chunks mixed, beside the whole
        if precision == "fp32":
            more += item * 2**16 * 2 * 8 * 64  # keys and values of the whole row
        assert needed[2]["activations"] == pytest.approx(needed[0]["activations"] / 4 + blocks * more, rel=0.01)


def test_tokens_that_cannot_be_shared_evenly() -> None:
    with pytest.raises(UserError) as caught:
        accumulated(run_config(tokens_per_step=2**19, batch_size=8), World(0, 6, 0, 6))
    assert str(caught.value) == (
        "train.tokens_per_step: 524,288 is not a multiple of 196,608 (batch_size 8 x seq_len 4096 x 6 processes); "
        "set it to 589,824, or choose another --batch_size or number of processes"
    )
    with pytest.raises(UserError, match=r"tokens_per_step is 524,288, and grad_accum 4 too; leave grad_accum out: it follows"):
        run_config(tokens_per_step=2**19, grad_accum=4)


def test_copies_in_which_gradients_travel_take_memory_where_that_is_the_peak() -> None:
    """Two bytes a parameter beside four, once all gradients are there: with few rows activations took less."""
    for rows, more in ((1, True), (8, False)):
        plain, copies = (
            sum(predicted_memory(run_config(batch_size=rows, reduce_precision=sent), Split("ddp", owners=8)).values())
            for sent in ("fp32", "bf16")
        )
        parameters = n_parameters(run_config().model)
        always = 4 * parameters + 2 * n_matmul_parameters(run_config().model) + parameters  # an eighth of the moments
        assert (copies == always + 6 * parameters) is more and (copies > plain) is more


def test_parts_take_less_memory_each() -> None:
    one = run_config(ema=0.999)
    whole, eighth = predicted_memory(one), predicted_memory(one, Split("fsdp", 8))
    for name in ("weights", "optimizer", "ema"):
        assert eighth[name] == pytest.approx(whole[name] / 8)
    assert sum(eighth.values()) < sum(predicted_memory(one, Split("fsdp", 2)).values()) < sum(whole.values())
    # Micro-batches that are not sent yet are kept whole.
    assert (
        predicted_memory(run_config(grad_accum=2), Split("fsdp", 8))["gradients"] == predicted_memory(run_config(grad_accum=2))["gradients"]
    )
