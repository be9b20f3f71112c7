"""The counters of a run against arithmetic by hand, with a clock that is known."""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.model.transformer import Transformer
from minifoundation.train import loop, step
from minifoundation.train.run import run


class HalfASecond:
    """A clock on which every step takes half a second."""

    def __init__(self, _where: Any) -> None:
        pass

    def seconds_since(self, _earlier: HalfASecond) -> float:
        return 0.5


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Have ``act`` called when step ``number`` begins."""
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return step.train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", struck)


def test_tokens_a_second_and_mfu(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    where = replace(runtime.machine(), peak_flops=1e9)
    monkeypatch.setattr(loop, "Moment", HalfASecond)
    monkeypatch.setattr(runtime, "machine", lambda _rank: where)
    config = settings()
    run(config, resume=None, dry_run=False)
    with (config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # 2 rows x 2 micro-batches x 32 tokens in half a second
    assert {row["tokens_per_second"] for row in rows} == {"256"}
    # two blocks of q, k, v (32 x 64), out (32 x 32), gate and up (32 x 128), down (64 x 32), and the head; attention over 32 tokens
    matrices = 2 * (32 * 64 + 32 * 32 + 32 * 128 + 64 * 32) + 512 * 32
    flops = 6 * matrices + 6 * 2 * 32 * 32
    assert float(rows[-1]["mfu"]) == pytest.approx(256 * flops / 1e9, rel=1e-5)
    assert [int(row["tokens"]) for row in rows] == [128 * step for step in range(1, 13)]
    assert [int(row["step"]) for row in rows] == list(range(1, 13))


def traced_without_a_compiler(transformer: Transformer) -> None:
    """What ``compile_blocks`` does, with graphs that are run by torch's own operators: traced in a second instead of half a minute."""
    for module in (*transformer.blocks, transformer.norm):
        module.compile(dynamic=False, backend="aot_eager")


@pytest.mark.filterwarnings("default")  # torch's own, while it traces
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steady_steps_compile_nothing_and_one_that_does_is_named(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], masked: bool
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(Transformer, "compile_blocks", traced_without_a_compiler)
    monkeypatch.setattr(runtime, "can_compile", lambda _where: None)
    begun = runtime.compiled_graphs()
    run(settings("steady", train={"compile": True}, data={"mask_documents": masked}), resume=None, dry_run=False)
    assert runtime.compiled_graphs() > begun, "the blocks were traced"
    assert "compiled again" not in capsys.readouterr().err, "through evaluations and checkpoints"
    at_step(monkeypatch, 7, torch.compiler.reset)
    run(settings("forgetful", train={"compile": True}), resume=None, dry_run=False)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "compiled again" in line]
    assert warnings == ["warning: train.compile: step 7 was compiled again, which costs seconds; TORCH_LOGS=recompiles says why"]


def test_the_collector_is_held_while_steps_are_launched_and_set_free_after(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    at_step(monkeypatch, 3, lambda: held.append(not gc.isenabled() and gc.get_freeze_count() > 0))
    run(settings(), resume=None, dry_run=False)
    assert held == [True] and gc.isenabled() and gc.get_freeze_count() == 0
