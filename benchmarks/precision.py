"""What bf16 does to gradients and to the loss, on a CPU: ours against transformers under autocast, and the residual stream by itself.

    python -m benchmarks.precision            a 1.3M model on Shakespeare, three seeds, about 20 minutes on one core
    python -m benchmarks.precision --quick

The curves are computed in fp32 with what a bf16 run would round rounded there: the outputs of norms and branches, and with or without the
residual stream. Arithmetic in bf16 itself is slow on most CPUs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import ROOT, finish
from benchmarks.small_model import curve
from minifoundation import config
from minifoundation.config import RunConfig
from minifoundation.export.weights import hf_config, to_hf
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Block, Transformer

SEEDS = (1, 2, 3)
Branches = Callable[[Block, Tensor, Tensor, Tensor, Any, Tensor | None], Tensor]


def rounded(x: Tensor) -> Tensor:
    """Return ``x`` rounded to bf16; the gradient is rounded on its way back."""
    return x.bfloat16().float()


def residual_in_fp32(block: Block, x: Tensor, cos: Tensor, sin: Tensor, kernel: Any, documents: Tensor | None) -> Tensor:
    """Return what a block gives when only norms and branches are rounded."""
    x = x + rounded(block.attention(rounded(block.attention_norm(x)), cos, sin, kernel, documents))
    return x + rounded(block.mlp(rounded(block.mlp_norm(x))))


def residual_in_bf16(block: Block, x: Tensor, cos: Tensor, sin: Tensor, kernel: Any, documents: Tensor | None) -> Tensor:
    """Return what a block gives when the residual stream is rounded too."""
    x = rounded(rounded(x) + rounded(block.attention(rounded(block.attention_norm(x)), cos, sin, kernel, documents)))
    return rounded(x + rounded(block.mlp(rounded(block.mlp_norm(x)))))


def gradients(sizes: config.ModelConfig, state: dict[str, Tensor], rows: Tensor, how: str) -> dict[str, Tensor]:
    """Return the gradients under Hugging Face's names of the mean loss of ``rows``, computed in one of three ways."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    if how == "transformers, autocast":
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(sizes)), attn_implementation="sdpa").float()
        model.load_state_dict(to_hf(sizes, state), strict=False)
        model.tie_weights()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens).logits.float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}
    transformer = Transformer(sizes, dtype=torch.bfloat16 if how == "ours, bf16" else torch.float32)
    transformer.load_state_dict(state)
    (TrainingModel(transformer, z_loss=0.0, chunk=1024)(tokens, targets).total / targets.numel()).backward()
    return to_hf(sizes, {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})


def gradient_errors() -> dict[str, list[float]]:
    """Return the least, median and largest relative error of a matrix's gradient against fp32."""
    sizes = config.ModelConfig(vocab_size=512, d_model=128, n_layer=6, n_head=4, n_kv_head=2, d_ff=384, original_seq_len=128)
    transformer = Transformer(sizes)
    transformer.initialise(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            if weight.ndim == 2:
                weight.mul_(2)  # about the size that weights have after some training
    rows = torch.randint(1, 512, (8, 129), generator=torch.Generator().manual_seed(0))
    exact = gradients(sizes, transformer.state_dict(), rows, "fp32")
    found = {}
    for how in ("ours, bf16", "transformers, autocast"):
        got = gradients(sizes, transformer.state_dict(), rows, how)
        errors = sorted(float((got[n] - g).norm() / g.norm()) for n, g in exact.items() if n in got)
        found[how] = [round(e, 5) for e in (errors[0], statistics.median(errors), errors[-1])]
    return found


def main() -> None:
    """Compare the gradients, then train with and without each rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    errors = gradient_errors()
    print(errors, flush=True)
    plain: Branches = Block.branches
    variants: dict[str, Branches] = {"fp32": plain, "residual in fp32": residual_in_fp32, "residual in bf16": residual_in_bf16}
    tails: dict[str, dict[int, float]] = {name: {} for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS[: 1 if quick else None]:
            for name, branches in variants.items():
                setattr(Block, "branches", branches)  # noqa: B010
                losses = curve(_settings(Path(folder), seed, steps=10 if quick else 300))["loss"]
                tails[name][seed] = round(statistics.fmean(losses[-len(losses) // 3 :]), 4)
                print(seed, name, tails[name][seed], flush=True)
    setattr(Block, "branches", plain)  # noqa: B010
    gaps = {name: [round(tails[name][s] - tails["fp32"][s], 4) for s in tails[name]] for name in variants if name != "fp32"}
    finish("precision", {"gradient_errors": errors, "loss_gap_to_fp32": gaps}, results=tails, quick=quick)


def _settings(work: Path, seed: int, *, steps: int) -> RunConfig:
    sizes = {"vocab_size": 2048, "d_model": 128, "n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_ff": 384, "original_seq_len": 128}
    never = {"eval_every": 10**9, "save_every": 10**9}
    values = {
        "out_dir": str(work / "run"),
        "model": sizes,
        "tokenizer": {"vocab_size": 2048},
        "data": {"source": str(ROOT / "examples" / "shakespeare.txt"), "shards_dir": str(work / "shards"), "max_document_bytes": 4096},
        "train": {"tokens": 1024 * steps, "seq_len": 128, "batch_size": 8, "lr": 2e-3, "warmup": 0.1, "seed": seed, **never},
    }
    return config.build(RunConfig, config.merged(values, {"data": {"held_out": 0.03}}), "benchmark")


if __name__ == "__main__":
    main()
