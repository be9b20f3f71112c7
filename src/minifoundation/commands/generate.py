"""``generate``: a prompt and its continuation, printed as it grows, by a checkpoint or an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minifoundation.checkpoint import load_checkpoint
from minifoundation.commands.native import in_memory
from minifoundation.config import GenerateOptions
from minifoundation.errors import UserError
from minifoundation.evaluate.folder import is_checkpoint, loaded
from minifoundation.export.verify import quiet_transformers

GREEDY = 1e-6
"""A temperature up to this is none: divided by much less, logits are no float32 any more."""


def generate(options: GenerateOptions) -> None:
    """Print the prompt and its continuation, which ends at the end-of-text token, at ``max_new_tokens`` or at the end of the context.

    Raises:
        UserError: no such model, a prompt that fills the context, or too little memory.
    """
    from transformers import TextStreamer

    if not options.model.exists():
        raise UserError("--model", f"{options.model}: no such file or folder", "give final.pth, a step_ folder or an exported folder")
    with quiet_transformers():
        if is_checkpoint(options.model):
            model, tokenizer = _from_checkpoint(options.model)
        else:
            model, tokenizer = loaded(options.model, "--model", dtype=torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        prompt = tokenizer(options.prompt, return_tensors="pt").to(device)
        context: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
        length = prompt.input_ids.shape[1]
        if length == 0:
            raise UserError("--prompt", "is empty, and this model's texts begin with no token of their own", "give at least one character")
        if length >= context:
            raise UserError("--prompt", f"{length:,} tokens as the model reads it, but the context is {context:,}", "shorten the prompt")
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > GREEDY:
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        # Rows of the embedding beyond the tokenizer's pieces are padding: a barely trained model could choose one.
        unused = list(range(len(tokenizer), model.config.vocab_size))
        torch.manual_seed(options.seed)
        try:
            model.to(device).eval().generate(
                input_ids=prompt.input_ids,
                attention_mask=prompt.attention_mask,
                max_new_tokens=min(options.max_new_tokens, context - length),
                suppress_tokens=unused or None,
                streamer=TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                **sampling,
            )
        except torch.OutOfMemoryError:
            problem = f"{options.model} in float32 and its context do not fit the memory of the GPU"
            raise UserError("--model", problem, "run it on the CPU: put CUDA_VISIBLE_DEVICES= before the command") from None


def _from_checkpoint(path: Path) -> tuple[Any, Any]:
    with in_memory(load_checkpoint(path), dtype=torch.float32) as model:
        return model.network, model.tokenizer
