from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minifoundation.model.loss import IGNORED, token_losses

N, D, V = 37, 16, 50


def inputs(dtype: torch.dtype, head_dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(N, D, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).to(head_dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[[3, 20, N - 1]] = IGNORED
    return hidden, head, targets


def plain(hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float) -> dict[str, Any]:
    """Return the losses and gradients by the formula, in float64, from the values as ``token_losses`` sees them."""
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = head.detach().to(hidden.dtype).double().requires_grad_()
    logits = exact_hidden @ exact_head.T
    counted = targets != IGNORED
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    z = z_loss * (logits.logsumexp(-1)[counted] ** 2).sum()
    d_hidden, d_head = torch.autograd.grad(cross_entropy + z, (exact_hidden, exact_head))
    return {"cross_entropy": cross_entropy, "z": z, "tokens": counted.sum(), "d_hidden": d_hidden, "d_head": d_head}


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_formula(z_loss: float, chunk: int, dtype: torch.dtype) -> None:
    hidden, head, targets = inputs(dtype, dtype)
    losses = token_losses(hidden, head, targets, z_loss=z_loss, chunk=chunk)
    expected = plain(hidden, head, targets, z_loss)
    tight: Any = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(losses.cross_entropy, expected["cross_entropy"], **tight)
    torch.testing.assert_close(losses.z_loss, expected["z"], **tight)
    torch.testing.assert_close(losses.total, expected["cross_entropy"] + expected["z"], **tight)
    assert losses.tokens == expected["tokens"] == N - 3
    d_hidden, d_head = torch.autograd.grad(3.0 * losses.total, (hidden, head))
    torch.testing.assert_close(d_hidden, 3 * expected["d_hidden"], **tight)
    torch.testing.assert_close(d_head, 3 * expected["d_head"], **tight)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_hidden_with_a_float32_head(dtype: torch.dtype, error: float) -> None:
    hidden, head, targets = inputs(dtype, torch.float32, scale=0.3)
    losses = token_losses(hidden, head, targets, z_loss=1e-4, chunk=8)
    expected = plain(hidden, head, targets, 1e-4)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx((expected["cross_entropy"] + expected["z"]).item(), rel=error)
    d_hidden, d_head = torch.autograd.grad(losses.total, (hidden, head))
    assert (d_hidden.dtype, d_head.dtype) == (dtype, torch.float32)
    assert (d_hidden - expected["d_hidden"]).norm() < 2 * error * expected["d_hidden"].norm()
    assert (d_head - expected["d_head"]).norm() < 2 * error * expected["d_head"].norm()


def test_the_heads_gradient_is_summed_over_chunks_in_float32() -> None:
    """Many chunks of equal rows: a bfloat16 sum would stop growing at 256 times one row's part."""
    rows = 1024
    hidden = torch.ones(rows, D, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(V, D, requires_grad=True)
    losses = token_losses(hidden, head, torch.zeros(rows, dtype=torch.int64), z_loss=0.0, chunk=1)
    (d_head,) = torch.autograd.grad(losses.total, (head,))
    torch.testing.assert_close(d_head[0], torch.full((D,), rows * (1 / V - 1)), rtol=2**-8, atol=0)


def test_a_confident_prediction_keeps_its_gradient_in_bfloat16() -> None:
    head = torch.eye(V, D, requires_grad=True)
    hidden = torch.zeros(1, D, dtype=torch.bfloat16)
    hidden[0, 0] = 12.0
    losses = token_losses(hidden.requires_grad_(), head, torch.tensor([0]), z_loss=0.0, chunk=1)
    (d_head,) = torch.autograd.grad(losses.total, (head,))
    assert d_head[0, 0].item() == pytest.approx(plain(hidden, head, torch.tensor([0]), 0.0)["d_head"][0, 0].item(), rel=0.01)


def test_a_loss_scale_reaches_the_gradients_and_overflow_is_seen() -> None:
    hidden, head, targets = inputs(torch.float16, torch.float32)
    one = torch.autograd.grad(token_losses(hidden, head, targets, z_loss=0.0, chunk=8).total, (hidden, head))
    scaled = torch.autograd.grad(256.0 * token_losses(hidden, head, targets, z_loss=0.0, chunk=8).total, (hidden, head))
    for plain_gradient, gradient in zip(one, scaled, strict=True):
        torch.testing.assert_close(gradient.float(), 256 * plain_gradient.float())
    (d_hidden,) = torch.autograd.grad(1e6 * token_losses(hidden, head, targets, z_loss=0.0, chunk=8).total, (hidden,))
    assert d_hidden.isinf().any(), "the scaler finds the overflow and skips the step"


def test_all_targets_ignored_and_no_gradient_wanted() -> None:
    hidden, head, _ = inputs(torch.float32, torch.float32)
    losses = token_losses(hidden, head, torch.full((N,), IGNORED), z_loss=0.1, chunk=8)
    assert (losses.total.item(), losses.tokens.item()) == (0.0, 0)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(losses.total, (hidden, head)))
    with torch.no_grad():
        assert not token_losses(hidden, head, torch.zeros(N, dtype=torch.int64), z_loss=0.0, chunk=8).total.requires_grad


def test_only_one_chunk_of_logits_is_ever_held() -> None:
    """No tensor of more than chunk x V elements is made on the way."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    rows, chunk, vocabulary, width = 256, 8, 300, 4
    hidden, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    with Watch():  # type: ignore[no-untyped-call]
        token_losses(hidden, head, torch.zeros(rows, dtype=torch.int64), z_loss=1e-4, chunk=chunk).total.backward()
    assert largest == chunk * vocabulary
