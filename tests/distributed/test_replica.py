"""A replica by itself; what several do together is in equal.py."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from minifoundation.distributed import Replica, World, local_gradients, trained


def made() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def test_a_replica_that_is_not_used_any_more_gives_its_memory_back() -> None:
    """A run that goes back has no room for two; Python's collector does not see what a tensor's hooks hold."""
    replica = Replica(made(), World())
    with local_gradients(replica):
        replica(torch.ones(1, 4)).sum().backward()
    weights = [weakref.ref(weight) for weight in replica.parameters()]
    del replica
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4


def test_gradients_travel_once_all_of_a_unit_are_there_and_not_before_the_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made()
    sent: list[list[torch.Size]] = []

    def send(_: Replica, gradients: list[torch.Tensor]) -> None:
        sent.append([gradient.shape for gradient in gradients])

    monkeypatch.setattr(Replica, "_send", send)
    replica = Replica(module, World(), units=[module.get_submodule("0"), module.get_submodule("1")])
    for _ in range(2):
        with local_gradients(replica):
            replica(torch.ones(1, 4)).sum().backward()
        assert sent == []
        replica(torch.ones(1, 4)).sum().backward()
        assert sent == [[(2, 6), (2,)], [(6, 4), (6,)]]
        sent.clear()


def test_an_optimizer_updates_all_of_what_cannot_be_divided() -> None:
    module = made()
    weights = dict(module.named_parameters())
    for model in (module, Replica(module, World())):
        found: dict[str, Any] = trained(model, weights)
        assert all(found[name] is weight for name, weight in weights.items())
