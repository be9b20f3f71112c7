"""Requests shared by several processes come to what one makes of them; the processes are threads here, and torchrun's in the slow test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from minifoundation.errors import UserError
from minifoundation.evaluate.likelihood import parted
from minifoundation.evaluate.model import Model, Share
from minifoundation.evaluate.requests import read_tasks
from tests.distributed.processes import started, torchrun
from tests.evaluate.tiny import BUNDLED, loaded, write_tiny_model

SIZE = 3


class Table:
    """Where the processes lay down what all get."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(SIZE, timeout=60)
        self.values: list[Any] = [None] * SIZE

    def of_all(self, rank: int) -> Callable[[Any], list[Any]]:
        def given(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()  # nobody lays down the next before all have read
            return found

        return given


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def models(folder: Path) -> list[Model]:
    table, made = Table(), []
    for rank in range(SIZE):
        model = loaded(folder)
        model.share = Share(rank, SIZE, table.of_all(rank))
        made.append(model)
    return made


def at_once(models: Sequence[Model], work: Callable[[Model], Any]) -> list[Any]:
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(work, models))


def pairs() -> list[Instance]:
    contexts = [f"Question {i // 4}: what is {i // 4} and {i // 8}?\nAnswer:" for i in range(40)]
    return [Instance("loglikelihood", {}, (context, f" {i % 4} is it"), i) for i, context in enumerate(contexts)]


def test_log_likelihoods_are_those_of_one_process(folder: Path, models: list[Model]) -> None:
    alone = loaded(folder).loglikelihood(pairs(), disable_tqdm=True)
    for found in at_once(models, lambda model: model.loglikelihood(pairs(), disable_tqdm=True)):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in alone], atol=1e-4)


@pytest.mark.parametrize("count", [1, 7])  # fewer than processes, and no multiple of them
def test_what_is_written_is_what_one_process_writes(folder: Path, models: list[Model], count: int) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, (f"How much is {i}?", options), i) for i in range(count)]
    alone = loaded(folder).generate_until(requests, disable_tqdm=True)
    assert at_once(models, lambda model: model.generate_until(requests, disable_tqdm=True)) == [alone] * SIZE


def test_the_first_process_alone_shows_progress(models: list[Model], capsys: pytest.CaptureFixture[str]) -> None:
    assert [model.silent for model in models] == [False, True, True]
    at_once(models, lambda model: model.loglikelihood(pairs()))
    assert capsys.readouterr().err.count("log-likelihoods:   0%") == 1


def test_a_fault_of_one_is_one_of_all(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(models[1].parts, "scores", fails)

    def told(model: Model) -> str:
        with pytest.raises(RuntimeError) as caught:
            model.loglikelihood(pairs(), disable_tqdm=True)
        return str(caught.value)

    assert at_once(models, told) == ["MemoryError: no more"] * SIZE


def test_a_benchmark_that_one_cannot_read_is_run_by_none(folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that passed it over would answer the requests of the next one to those that wait for this one's."""
    from minifoundation.evaluate import harness

    def loads(rank: int) -> str:
        if rank == 1:
            raise UserError("data set piqa", "is not reachable", "connect to the internet")
        return f"tasks of {rank}"

    def told(model: Model) -> str:
        with pytest.raises(UserError) as caught:
            model.together(lambda: loads(model.share.rank))
        return str(caught.value)

    assert at_once(models, told) == ["data set piqa: is not reachable; connect to the internet"] * SIZE
    assert at_once(models, lambda model: model.together(lambda: model.share.rank)) == [0, 1, 2]

    alone, requests = loaded(folder), read_tasks("piqa")
    monkeypatch.setattr(alone, "together", lambda _: loads(1))
    ((outcome,),) = harness.run(alone, harness.task_manager(requests), requests, limit=1, data_dir=BUNDLED, code=False)
    assert outcome.not_run == "data set piqa: is not reachable; connect to the internet"


def test_parts_have_about_as_many_tokens_and_keep_neighbours_together() -> None:
    random = np.random.default_rng(0)
    inputs = [np.concatenate([np.full(20, i // 5), random.integers(0, 9, random.integers(1, 30))]) for i in range(200)]
    parts = parted(inputs, 4)
    assert sorted(number for part in parts for number in part) == list(range(200))
    sizes = [sum(len(inputs[number]) for number in part) for part in parts]
    assert max(sizes) - min(sizes) < 100
    split = sum(len({place for place, part in enumerate(parts) for number in part if number // 5 == group}) > 1 for group in range(40))
    assert split <= 3, "a group of equal beginnings is cut at a boundary alone"
    assert parted([], 2) == [[], []] and parted([np.array([1])], 2) == [[0], []]


@pytest.mark.slow
def test_two_processes_write_the_results_of_one(folder: Path, tmp_path: Path) -> None:
    rows = []
    for size in (1, 2):
        out = tmp_path / str(size)
        line = ["--model_path", str(folder), "--tasks", "arc_easy,hellaswag:0,piqa", "--data_dir", str(BUNDLED), "--out_dir", str(out)]
        process = started(torchrun(size), line, command="eval", XDG_CACHE_HOME=str(tmp_path / f"cache{size}"))
        printed, _ = process.communicate(timeout=250)
        assert process.returncode == 0, printed[-3000:]
        for said in ("| arc_easy ", "arc_easy: prompts:   0%"):
            assert printed.count(said) == 1, "the first process alone prints"
        rows.append(json.loads((out / "results.json").read_text())["rows"])
    for one, two in zip(*rows, strict=True):
        assert {name: one[name] for name in ("label", "score", "n", "stderr")} == {
            name: two[name] for name in ("label", "score", "n", "stderr")
        }
