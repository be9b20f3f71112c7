"""``batch_size: auto``: the most rows that fit, by prediction and by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest
import torch

from minifoundation import config
from minifoundation.config import REPOSITORY, RunConfig
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train import finder
from minifoundation.train.finder import steps_fit, with_batch_size
from minifoundation.train.plan import plan
from tests.pretended import Pretended

T = TypeVar("T")
H100 = Pretended(torch.device("cpu"), "NVIDIA H100 80GB HBM3", 80 * 2**30, 989.4e12)
CPU = Machine(torch.device("cpu"), "CPU", 80 * 2**30, None)


def run_config(**train: Any) -> RunConfig:
    values = config.read_yaml(REPOSITORY / "configs" / "model_0p5b.yaml")
    return config.build(RunConfig, config.merged(values, {"data": {"source": "x"}, "train": {"precision": "bf16", **train}}), "test")


def split(chosen: RunConfig) -> tuple[Any, int]:
    return chosen.train.batch_size, chosen.train.grad_accum


def fits(rows: int, parts: int) -> bool:
    return plan(run_config(batch_size=rows, grad_accum=parts), 1).memory_total <= 0.92 * H100.memory_bytes


def test_auto_is_the_largest_power_of_two_that_fits() -> None:
    rows, parts = split(with_batch_size(run_config(batch_size="auto"), H100))
    assert (rows, parts) in [(16, 1), (32, 1)] and fits(rows, 1) and not fits(2 * rows, 1)
    assert split(with_batch_size(run_config(batch_size=3), H100)) == (3, 1)


@pytest.mark.parametrize("rows", [32, 24, 7, 62, 1])
def test_a_step_stays_at_the_rows_that_were_given(rows: int) -> None:
    chosen = with_batch_size(run_config(batch_size="auto", grad_accum=rows), H100)
    expected = max(most for most in range(1, rows + 1) if rows % most == 0 and fits(most, rows // most))
    assert split(chosen) == (expected, rows // expected)
    assert plan(chosen, 1).samples_per_step == rows, "whatever the machine, the same step"


def test_a_cpu_has_room_to_spare() -> None:
    """Nothing is tried there, and a process that is too large is killed without a word."""
    on_gpu, _ = split(with_batch_size(run_config(batch_size="auto"), H100))
    on_cpu, _ = split(with_batch_size(run_config(batch_size="auto"), CPU))
    assert on_cpu * 4 <= on_gpu
    tight = replace(CPU, memory_bytes=round(1.2 * plan(run_config(batch_size=1), 1).memory_total))
    assert split(with_batch_size(run_config(batch_size="auto"), tight)) == (1, 1), "one row is not refused for it"


def test_not_even_one_row_is_refused() -> None:
    small = replace(H100, name="small card", memory_bytes=4 * 2**30)
    with pytest.raises(
        UserError, match=r"train\.batch_size: not even one row of 4096 tokens fits small card \(4\.0 GiB\); use --model\.checkpointing full"
    ):
        with_batch_size(run_config(batch_size="auto"), small)


GPU = Pretended(torch.device("cpu"), "GPU", 80 * 2**30, None)


def out_of_memory_above(rows: int) -> Callable[..., None]:
    """Return what ``trial`` does on a GPU that ``rows`` rows fill."""

    def tried(run: RunConfig, *_: Any, **__: Any) -> None:
        assert isinstance(run.train.batch_size, int) and run.train.grad_accum <= 2, "two micro-batches show it"
        if run.train.batch_size > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return tried


def test_fewer_rows_are_tried_when_a_real_step_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder, "trial", out_of_memory_above(6))
    said: list[str] = []
    chosen = with_batch_size(run_config(batch_size="auto", grad_accum=32), GPU, lambda one: steps_fit(one, GPU, World(), said.append))
    assert split(chosen) == (4, 8)
    expected = [
        f"train.batch_size: {rows} rows predicted to fit GPU did not; trying fewer" for rows in (32, 16, 8) if fits(rows, 32 // rows)
    ]
    assert said == expected
    monkeypatch.setattr(finder, "trial", out_of_memory_above(0))
    with pytest.raises(UserError, match="not even one row"):
        with_batch_size(run_config(batch_size="auto"), GPU, lambda one: steps_fit(one, GPU, World(), said.append))


def test_all_processes_go_down_when_one_must(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded(World):
        """Another process, whose GPU has room for four rows."""

        def of_all(self, value: T) -> list[T]:
            return [value, cast(T, self.room)]

        room = True

    tried: list[int] = []

    def watched(run: RunConfig, *_: Any, **__: Any) -> None:
        assert isinstance(run.train.batch_size, int)
        tried.append(run.train.batch_size)
        Crowded.room = run.train.batch_size <= 4

    monkeypatch.setattr(finder, "trial", watched)
    chosen = with_batch_size(run_config(batch_size="auto"), GPU, lambda one: steps_fit(one, GPU, Crowded(size=2), lambda _: None))
    assert split(chosen) == (4, 1) and tried == [rows for rows in (64, 32, 16, 8, 4) if fits(rows, 1)]
