"""AdamW (arXiv:1711.05101) with decay on matrices alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minifoundation.config import TrainConfig
from minifoundation.errors import UserError


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay acts on a parameter: matrices, but not the embedding, norms or biases."""
    return parameter.ndim >= 2 and "embedding" not in name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the two groups of AdamW, decayed and not, in the order of ``named_parameters``."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if decayed(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decayed(n, p)], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the fp32 weights of ``model`` with moments in ``config.optimizer_states``.

    Raises:
        UserError: int8 moments without torchao.
    """
    groups = parameter_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    if config.optimizer_states == "fp32":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("train.optimizer_states", "int8 needs torchao", "pip install 'minifoundation[gpu]', or use fp32") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate ``lr``; torchao holds it in a tensor that must be filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
