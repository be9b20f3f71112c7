"""Losses and the gradient that overwrites the logits, against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.model.kernels import cross_entropy
from tests.model.kernels.conftest import TOLERANCE, relative


def check(logits: Tensor, losses_: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    targets = torch.randint(logits.shape[1], (len(logits),), device=logits.device)
    targets[1] = -100
    exact = logits.double().requires_grad_()
    each = F.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    z = 1e-2 * exact.logsumexp(-1).square() * (targets >= 0)
    (gradient,) = torch.autograd.grad((each + z).sum(), exact)
    found = losses_(logits, targets, 1e-2)
    assert relative(found, torch.stack([each, z])) < 1e-6
    assert relative(logits, gradient) < TOLERANCE[logits.dtype]
    assert not logits[1].any(), "a token without a target has no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_definition_is_autograd(dtype: torch.dtype) -> None:
    check((torch.randn(7, 300) * 4).to(dtype), cross_entropy.losses_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [100, 4096, 9001])
def test_the_kernel_is_autograd(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    def launched(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        losses = torch.full((2, len(logits)), torch.nan, device=device)
        cross_entropy.launch_losses_(logits, targets, z_loss, losses)
        return losses

    check((torch.randn(5, vocabulary, device=device) * 4).to(dtype), launched)


def test_a_confident_prediction_keeps_its_gradient() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 14.0
    exact = float(1 - logits.double().softmax(-1)[0, 3])
    half = logits.bfloat16()
    cross_entropy.losses_(half, torch.tensor([3]), 0.0)
    assert float(-half[0, 3]) == pytest.approx(exact, rel=0.02)
