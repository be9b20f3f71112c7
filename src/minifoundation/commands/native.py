"""A checkpoint of ours as a model and tokenizer of transformers, in memory: what export_hf would write, without writing it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation.checkpoint import Checkpoint
from minifoundation.commands.export_hf import native_tokenizer
from minifoundation.config import ModelConfig
from minifoundation.data.tokenizer import Special
from minifoundation.export.tokenizer import write_tokenizer
from minifoundation.export.weights import hf_config, to_hf


@dataclass(frozen=True)
class InMemory:
    """A model of transformers with its tokenizer, whose files are in ``folder`` as long as it is open."""

    network: Any
    tokenizer: Any
    folder: Path


def network(config: ModelConfig, state: dict[str, Tensor], special: Special, dtype: torch.dtype) -> Any:
    """Return the weights ``state`` of a ``Transformer`` as the model class of transformers that exports use, on the CPU."""
    import transformers

    settings = transformers.AutoConfig.for_model(**hf_config(config, special))
    kind = getattr(transformers, settings.architectures[0])
    # Not from_config and load_state_dict: that draws random weights first, seven seconds of them for 0.5B, at each evaluation of a run.
    model = kind.from_pretrained(None, config=settings, state_dict=to_hf(config, state), dtype=dtype)
    return model.eval()


@contextmanager
def in_memory(checkpoint: Checkpoint, *, dtype: torch.dtype, ema: bool = False) -> Iterator[InMemory]:
    """Give the model of ``checkpoint``, its averaged weights with ``ema``, rounded to ``dtype``."""
    from transformers import AutoTokenizer

    config = checkpoint.config.model
    state = checkpoint.ema if ema and checkpoint.ema is not None else checkpoint.model
    with tempfile.TemporaryDirectory() as name, native_tokenizer(checkpoint) as tokenizer:
        folder = Path(name)
        write_tokenizer(tokenizer, folder, max_seq_len=config.max_seq_len)
        yield InMemory(network(config, state, tokenizer.special, dtype), AutoTokenizer.from_pretrained(folder), folder)
