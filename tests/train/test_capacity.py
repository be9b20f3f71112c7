"""What fits a memory: the largest that does, and that one more does not."""

from __future__ import annotations

from typing import Any

import pytest

from minifoundation import config
from minifoundation.config import REPOSITORY, RunConfig
from minifoundation.train.capacity import billions, largest_model, longest_row, most_rows, scaled
from minifoundation.train.plan import predicted_memory

GIB = 2**30


def half_billion(**model: Any) -> RunConfig:
    values = config.read_yaml(REPOSITORY / "configs" / "model_0p5b.yaml")
    changes = {"data": {"source": "x"}, "train": {"precision": "bf16"}, "model": model}
    return config.build(RunConfig, config.merged(values, changes), "test")


def takes(run: RunConfig, **train: int) -> int:
    return sum(predicted_memory(run.replaced(train=train)).values())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("memory", [24 * GIB, 80 * GIB])
def test_the_most_that_fits_and_one_more_that_does_not(checkpointing: str, memory: int) -> None:
    run = half_billion(checkpointing=checkpointing)
    rows, length, model = most_rows(run, memory), longest_row(run, memory), largest_model(run, memory)
    assert takes(run, batch_size=rows) <= 0.92 * memory < takes(run, batch_size=rows + 1)
    assert takes(run, batch_size=1, seq_len=length) <= 0.92 * memory < takes(run, batch_size=1, seq_len=length + 1024)
    assert model is not None and billions(model) > billions(run.model)
    wider = scaled(run.model, model.n_kv_head + 1)
    assert takes(run.model_copy(update={"model": model}), batch_size=1) <= 0.92 * memory
    assert takes(run.model_copy(update={"model": wider}), batch_size=1) > 0.92 * memory


def test_nothing_fits_nothing() -> None:
    assert (most_rows(half_billion(), GIB), longest_row(half_billion(), GIB)) == (0, 0)
    assert largest_model(half_billion(), 0) is None


def test_a_scaled_model_keeps_its_proportions() -> None:
    model = half_billion().model
    assert scaled(model, model.n_kv_head) == model
    twice = scaled(model, 2 * model.n_kv_head)
    assert (twice.d_model, twice.n_layer, twice.d_ff, twice.head_width) == (3072, 32, 8192, 64)
    own = scaled(model.model_copy(update={"head_dim": 128}), 2 * model.n_kv_head)
    assert (own.d_model, own.n_head, own.head_width) == (3072, 48, 128)
    for larger in (twice, own):
        config.build(config.ModelConfig, larger.model_dump(), "a scaled model is one that can be trained")


def test_the_table_in_the_docs_is_what_is_predicted() -> None:
    table = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8").split("## What fits")[1].split("\n\n| GiB |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 9
    size = 0.0
    for gib, way, *shown, largest in rows:
        size = float(gib or size)
        runs = [half_billion(checkpointing=way), half_billion(**billion(), checkpointing=way)]
        found = [f"{most(run, size * GIB):,}" for run in runs for most in (most_rows, longest_row)]
        assert shown == found, (size, way)
        if largest:
            model = largest_model(runs[0], size * GIB)
            assert model is not None and largest == f"{billions(model):.2f}B"


def billion() -> dict[str, Any]:
    sizes: dict[str, Any] = config.read_yaml(REPOSITORY / "configs" / "model_1b.yaml")["model"]
    return sizes
