"""What a machine cannot do of the settings, against what takes its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.train.fallbacks import supported
from tests.train.test_kernels import CPU, GPU

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "make_deterministic", lambda: None)
    monkeypatch.setattr(runtime, "compute_dtype", lambda *_: torch.bfloat16)


@pytest.mark.parametrize(
    ("asked", "taken"), [("auto", "flash"), ("cudnn", "flash"), ("flash4", "flash"), ("flex", "flex"), ("math", "math")]
)
def test_only_kernels_that_follow_the_switch_are_deterministic(settings: Make, asked: str, taken: str) -> None:
    said: list[str] = []
    config = settings(model={"attention": asked}, train={"deterministic": True})
    assert supported(config, GPU, said.append).model.attention == taken
    told = f"warning: model.attention: {asked} does not follow train.deterministic; using flash"
    assert (told in said) == (asked not in ("auto", taken))
    free = settings(model={"attention": asked})
    assert supported(free, GPU, said.append).model.attention == asked


def test_what_needs_a_gpu_is_replaced_on_a_cpu(settings: Make) -> None:
    said: list[str] = []
    config = settings(model={"checkpointing": "offload"})
    assert supported(config, CPU, said.append).model.checkpointing == "attention"
    assert said == ["warning: model.checkpointing: offload needs a CUDA GPU and this is cpu; using attention"]
