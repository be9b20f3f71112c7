"""The model under evaluation on vLLM: lm-eval's own class for it, with the counts and facts that a report needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from minifoundation.errors import UserError
from minifoundation.evaluate.mirror import first_line
from minifoundation.evaluate.model import DTYPES, Source, T, cut_prompts, default_device, source_of

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported, here and in the processes that it starts

import vllm
from lm_eval.models.utils import resolve_max_length
from lm_eval.models.vllm_causallms import VLLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class VllmModel(VLLM):
    """lm-eval's vLLM model, with a count of truncated requests.

    Of a prompt that is too long it keeps two tokens fewer than ``Model``: vLLM generates one after what it scores.

    Args:
        dtype: of the weights: fp32, bf16, fp16, or auto: as stored, and fp32 on a CPU.
        rows: requests handed over at once; None: all of them, vLLM makes its own batches.
    """

    def __init__(self, source: Source, *, dtype: str, rows: int | None) -> None:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        # Not its own "auto": that rounds weights stored in float32.
        stored = torch.float32 if default_device(None) == "cpu" else config.dtype
        self.dtype = str(DTYPES.get(dtype, stored) or "auto").removeprefix("torch.")
        super().__init__(
            pretrained=str(source.folder),
            dtype=self.dtype,
            batch_size=rows or "auto",
            max_model_len=resolve_max_length(config, AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)),
        )
        self.source = source
        self.rows = rows
        self.truncated = 0
        self.label = ""
        self.silent = False
        with torch.device("meta"):
            self.parameters = AutoModelForCausalLM.from_config(config).num_parameters()

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        fitting = []
        for key, context, continuation in requests:
            tokens = [*context, *continuation]
            kept = tokens[-(self.max_length - 1) :]  # vLLM wants room for a token more
            self.truncated += len(kept) < len(tokens)
            scored = max(1, len(kept) - len(continuation))
            fitting.append((key, kept[:scored], kept[scored:]))
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(fitting, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        prompts = [len(ids) for ids in self.tok_encode([request.args[0] for request in requests])]
        room = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
        self.truncated += cut_prompts(prompts, room, self.max_length)
        written: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return written

    def together(self, work: Callable[[], T]) -> T:
        """As ``Evaluated.together``; there is one process."""
        return work()

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model: sizes, dtype, and the hash of every file that decides its answers."""
        return self.source.facts() | {
            "engine": f"vllm {vllm.__version__}",
            "architecture": self._config.architectures,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "max_length": self.max_length,
            "bos": self.tok_encode("a")[:1] == [self.tokenizer.bos_token_id],
            "batch_rows": self.rows,
        }


def from_folder(path: str, *, dtype: str, rows: int | None) -> VllmModel:
    """Return the model in folder ``path``, or on the hub under that name, on vLLM.

    Raises:
        UserError: no model there, or one that vLLM does not start on.
    """
    source = source_of(path)
    try:
        return VllmModel(source, dtype=dtype, rows=rows)
    except Exception as error:  # what it raises is as varied as the processes and libraries below it
        raise UserError("--engine", f"vllm does not start on {path} ({first_line(error)})", "leave --engine out") from error
