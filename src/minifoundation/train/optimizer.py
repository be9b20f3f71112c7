"""AdamW (arXiv:1711.05101) with decay on matrices alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from minifoundation.config import TrainConfig
from minifoundation.distributed import World, is_split, local, part_of, whole
from minifoundation.errors import UserError


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay acts on a parameter: matrices, but not the embedding, norms or biases."""
    return parameter.ndim >= 2 and "embedding" not in name


def parameter_groups(weights: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the two groups of AdamW, decayed and not, each in the order of ``weights``."""
    return [
        {"params": [p for n, p in weights.items() if decayed(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in weights.items() if not decayed(n, p)], "weight_decay": 0.0},
    ]


def adamw(weights: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over fp32 ``weights``, by name, with moments in ``config.optimizer_states``.

    Raises:
        UserError: int8 moments without torchao.
    """
    groups = parameter_groups(weights, config.weight_decay)
    made: Any = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    optimizer: torch.optim.Optimizer
    if config.optimizer_states == "fp32":
        optimizer = torch.optim.AdamW(groups, **made, fused=True)
    else:
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("train.optimizer_states", "int8 needs torchao", "pip install -e '.[gpu]', or use fp32") from None
        optimizer = AdamW8bit(groups, **made)
    # Fused kernels do not count their changes, and the half-precision copies are made again by that count (model/matrix.py).
    changed = list(weights.values())
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(changed))
    return optimizer


def clip(optimizer: torch.optim.Optimizer, largest: float | None, world: World) -> Tensor:
    """Return the norm of the gradients, and see to it that the next step of ``optimizer`` uses them scaled down to norm ``largest``."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    if world.nodes > 1:  # each machine may have summed it by itself, and in an order of its own: its weights would go their own way
        norm = world.least(norm.detach().clone())
    if largest is None:
        return norm
    if optimizer.defaults.get("fused"):
        # torch's fused kernel divides gradients by this in its own pass over them.
        optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1.0)  # type: ignore[attr-defined]
    else:
        torch._foreach_mul_([local(gradient) for gradient in gradients], (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def update(optimizer: torch.optim.Optimizer, *, skip: Tensor) -> None:
    """Take a step unless ``skip``, a number on the device, is 1: then neither weights nor state change, its count of steps included.

    torch's fused AdamW leaves the step out on the device; other optimizers have to wait for the number.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimizer's tensors by "what/whose"; those of a kind that is made of others are given as their parts."""
    return {
        f"{key}/{names[weight]}": tensor
        for weight, state in optimizer.state.items()
        for what, value in state.items()
        for key, tensor in _parts(what, value)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: Mapping[str, Tensor]) -> None:
    """Fill the optimizer with ``saved``, from ``optimizer_state``; what is empty is of a run that has made no step yet.

    The state does not exist before the first step, so one is made with gradients and a rate of zero, which changes no weight.
    """
    if not saved:
        return
    for weight in names:
        weight.grad = torch.zeros_like(weight)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for key, tensor in optimizer_state(optimizer, names).items():
        tensor.copy_(part_of(saved[key], tensor))


def _parts(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if is_split(value) or not is_traceable_wrapper_subclass(value):
        return [(name, value)]
    inner, _ = value.__tensor_flatten__()
    return [(f"{name}.{part}", getattr(value, part)) for part in inner]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate ``lr``; torchao holds it in a tensor that must be filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
