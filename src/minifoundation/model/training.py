"""The model with its loss inside: what is compiled, spread over processes, and called by the training step."""

from __future__ import annotations

from torch import Tensor, nn

from minifoundation.model.loss import LossSums, token_losses
from minifoundation.model.transformer import Transformer


class TrainingModel(nn.Module):
    """A transformer whose forward returns the summed losses; the head's weight is used inside it, where FSDP has gathered it.

    Args:
        z_loss: weight of log(Z)^2.
        chunk: tokens whose logits are held at once.
    """

    def __init__(self, transformer: Transformer, *, z_loss: float, chunk: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.z_loss = z_loss
        self.chunk = chunk

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> LossSums:
        """Return the losses summed over ``targets`` (B, T) given ``tokens`` (B, T) and, as ``Transformer`` takes them, the documents."""
        hidden = self.transformer(tokens, cu_seqlens).flatten(0, 1)
        head = self.transformer.output
        return token_losses(
            hidden,
            head.weight,
            targets.flatten(),
            z_loss=self.z_loss,
            chunk=self.chunk,
            head_copy=head.copy,
            small=self.transformer.head_in_8_bits(),
        )
