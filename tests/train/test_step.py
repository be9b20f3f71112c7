"""A step: accumulation, clipping, the start and the end of learning."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.data.batch import Batch
from minifoundation.data.tokenizer import EOS
from minifoundation.distributed import World
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw
from minifoundation.train.step import StepStats, held_out_loss, train_step

CONFIG = ModelConfig(vocab_size=1024, d_model=64, n_layer=2, n_head=4, n_kv_head=2, d_ff=128, original_seq_len=32)
ALONE = World()


def made(precision: torch.dtype = torch.float32, lr: float = 3e-3) -> tuple[TrainingModel, torch.optim.Optimizer]:
    transformer = Transformer(CONFIG, dtype=precision)
    transformer.initialise(0)
    return TrainingModel(transformer, z_loss=1e-4, chunk=24), adamw(dict(transformer.named_parameters()), TrainConfig(tokens=1, lr=lr))


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randint(1024, (count, 33), generator=torch.Generator().manual_seed(seed))


def batches(tokens: Tensor, parts: int) -> list[Batch]:
    return [Batch(part[:, :-1], part[:, 1:]) for part in tokens.chunk(parts)]


def step(model: TrainingModel, optimizer: torch.optim.Optimizer, parts: list[Batch], grad_clip: float | None = 1.0) -> StepStats:
    tokens = sum(batch.tokens.numel() for batch in parts)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return train_step(model, optimizer, scaler, parts, lr=3e-3, grad_clip=grad_clip, tokens=tokens, world=ALONE)


def test_four_micro_batches_equal_one_large_batch() -> None:
    """With plain gradient descent: AdamW divides by the gradient's size and so makes rounding of tiny gradients large."""
    results = []
    for parts in (1, 4):
        model, _ = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for seed in range(5):
            stats = step(model, optimizer, batches(rows(4, seed), parts))
        results.append((model.state_dict(), stats))
    (one, first), (four, second) = results
    assert tuple(first.read()) == pytest.approx(tuple(second.read()), abs=1e-6)
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_loss_at_initialisation_is_that_of_guessing(precision: torch.dtype) -> None:
    model, optimizer = made(precision)
    stats = step(model, optimizer, batches(rows(8), 1))
    assert stats.read()[0] == pytest.approx(math.log(1024), rel=0.01)


def test_one_batch_can_be_learnt_by_heart() -> None:
    model, optimizer = made()
    for _ in range(200):
        stats = step(model, optimizer, batches(rows(2), 1))
    assert stats.read()[0] < 0.05


def test_the_norm_is_that_before_clipping_and_the_gradient_that_after() -> None:
    model, _ = made()
    seen: list[Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm())

    recorder = Recorder(model.parameters(), lr=1.0)
    free = step(model, recorder, batches(rows(2), 1), grad_clip=None)
    clipped = step(model, recorder, batches(rows(2), 1), grad_clip=0.01)
    assert free.read()[2] == pytest.approx(clipped.read()[2]) == pytest.approx(float(seen[0]))
    assert float(seen[1]) == pytest.approx(0.01, rel=1e-3)


def test_fp16_loss_scaling_gives_the_gradient_of_fp32_and_skips_overflow() -> None:
    gradients = []
    for precision, scale in ((torch.float32, None), (torch.float16, 2.0**10)):
        model, _ = made(precision)
        seen: dict[str, Tensor] = {}

        class Recorder(torch.optim.SGD):
            def step(self, closure: None = None) -> None:  # type: ignore[override]
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})  # noqa: B023

        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        recorder = Recorder(model.parameters(), lr=1.0)
        train_step(model, recorder, scaler, batches(rows(4), 2), lr=1.0, grad_clip=None, tokens=4 * 32, world=ALONE)
        gradients.append(seen)
    for name, exact in gradients[0].items():
        assert float((gradients[1][name] - exact).norm() / exact.norm()) < 0.02, name

    model, optimizer = made(torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    train_step(model, optimizer, scaler, batches(rows(2), 1), lr=1.0, grad_clip=1.0, tokens=64, world=ALONE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() < 2.0**60


def test_bf16_compute_leaves_fp32_weights_and_gradients() -> None:
    model, optimizer = made(torch.bfloat16)
    step(model, optimizer, batches(rows(2), 1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}


def test_a_step_within_documents_is_that_of_the_documents_apart() -> None:
    """Cut into documents of 8 and 24 tokens, in two micro-batches; each kind of document also as a batch of its own."""
    tokens = rows(4).masked_fill(rows(4) == EOS, 5)
    tokens[:, 7] = EOS
    apart = [Batch(tokens[:, :8], tokens[:, 1:9]), Batch(tokens[:, 8:32], tokens[:, 9:])]
    whole = [Batch.of_rows(part.numpy(), mask_documents=True) for part in tokens.chunk(2)]
    results = []
    for parts in (apart, whole):
        model, _ = made()
        stats = step(model, torch.optim.SGD(model.parameters(), lr=1.0), parts)
        results.append((stats.read(), model.state_dict(), held_out_loss(model, parts, ALONE, torch.device("cpu"))))
    (one, first, held_out), (two, second, same) = results
    assert tuple(one) == pytest.approx(tuple(two), abs=1e-5) and held_out == pytest.approx(same, abs=1e-5)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0, msg=name)
    assert stats.attended_length == (8 * 8 + 24 * 24) / 32
    other, _ = made()
    crossing = step(other, torch.optim.SGD(other.parameters(), lr=1.0), batches(tokens, 2))
    assert crossing.attended_length == 32 and crossing.read()[0] != pytest.approx(two[0], abs=1e-5)


def test_held_out_loss_is_the_mean_over_tokens_of_unequal_batches() -> None:
    model, _ = made()
    parts = [*batches(rows(3, 1), 1), *batches(rows(1, 2), 1)]
    with torch.no_grad():
        expected = sum(
            torch.nn.functional.cross_entropy(model.transformer.logits(b.tokens).flatten(0, 1), b.targets.flatten(), reduction="sum")
            for b in parts
        )
    assert held_out_loss(model, parts, ALONE, torch.device("cpu")) == pytest.approx(float(expected) / (4 * 32), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(precision: torch.dtype) -> None:
    """Which is held back while steps are launched: a cycle of objects would keep its tensors until the next evaluation."""
    model, optimizer = made(precision)
    step(model, optimizer, batches(rows(4), 2))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for seed in range(3):
            step(model, optimizer, batches(rows(4, seed), 2))
        gc.collect()
        assert [thing for thing in gc.garbage if isinstance(thing, Tensor)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
