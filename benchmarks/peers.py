"""The step of other training codes beside ours: the same model with the same weights, the same tokens, the same optimizer.

    python -m benchmarks.peers                          one GPU: every peer that is installed, 0.5B
    python -m benchmarks.peers --only 'ours|torchtitan' peers whose name matches; --list prints the names
    python -m benchmarks.peers --keep --config model_1b the other model, put beside the rows that are kept already
    python -m benchmarks.peers --quick                  a tiny model on any device

    pip install --no-deps litgpt==0.5.13 torchtitan==0.2.2 liger-kernel==0.8.5
    pip install lightning jsonargparse einops tyro tomli torchdata    what the two import

A step is forward, backward, clipping to norm 1, fused AdamW (0.9, 0.95), on random tokens in rows of 4,096. Peers compute as their own
recipes for one GPU do: bf16 autocast over float32 weights. Each row is a process; of ``--rows`` the most are tried first, and fewer until
that is slower; with ``--grad_accum`` a step has as many micro-batches, for every peer alike. Every peer is given our weights, and in
float32 its loss of eight tokens at the end of a row must be ours, so that all are one model: over many random targets any model has the
loss of guessing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.apart import apart, context
from benchmarks.record import ROOT, finish, with_kept
from minifoundation import config, runtime
from minifoundation.config import ModelConfig, RunConfig
from minifoundation.distributed import World
from minifoundation.export.weights import hf_config, to_hf
from minifoundation.model.loss import IGNORED
from minifoundation.model.size import flops_per_token
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine, Moment
from minifoundation.train.kernels import attention_kernel
from minifoundation.train.metrics import model_flops_utilisation
from minifoundation.train.trial import WARM_UP, trial

TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 256, "vocab_size": 512, "original_seq_len": 64}
CHECKED = 8
"""Tokens whose loss is compared."""
SAME = 5e-4
"""How far that loss may lie from ours in float32, nats a token: 0 for the tiny model, and 7e-4 with a base of RoPE wrong by a tenth."""


class Row(NamedTuple):
    """A training code, and how it is set up."""

    name: str
    package: str
    flags: str


ROWS = [
    Row("ours", "minifoundation", "--compile, attention auto, kernels in Triton, weights kept in bf16 beside float32"),
    Row("torchtitan", "torchtitan", "blocks and loss compiled, autocast, sdpa with cuDNN first, head tied"),
    Row("litgpt", "litgpt", "torch.compile, autocast (bf16-mixed), chunked_cross_entropy, head tied"),
    Row("transformers + Liger", "liger-kernel", "apply_liger_kernel_to_llama, eager, sdpa, autocast"),
    Row("transformers, compiled", "transformers", "torch.compile of the whole model, sdpa, autocast"),
    Row("transformers", "transformers", "eager, sdpa, autocast"),
]
Loss = Callable[[Tensor, Tensor], Tensor]
"""From tokens and targets (B, T) to the mean loss over the targets that are not -100."""


def settings(name: str, batch_size: int, precision: str, grad_accum: int = 1) -> RunConfig:
    """Return our run of configs/<name>.yaml."""
    values = config.read_yaml(ROOT / "configs" / f"{name}.yaml") if name != "tiny" else {"model": TINY, "train": {"seq_len": 64}}
    train = {"tokens": 10**12, "batch_size": batch_size, "precision": precision, "compile": name != "tiny", "loss_chunk": 8192}
    train["grad_accum"] = grad_accum
    return config.build(RunConfig, config.merged(values, {"data": {"source": "random tokens"}, "train": train}), name)


def build(
    name: str, model: ModelConfig, seq_len: int, weights: dict[str, Tensor], *, compiled: bool, backend: str
) -> tuple[nn.Module, Loss]:
    """Return the model of a peer with ``weights`` (Hugging Face's names) on their device, and its loss.

    Args:
        backend: of torch.compile.
    """
    device = next(iter(weights.values())).device
    match name:
        case "torchtitan":
            return _torchtitan(model, seq_len, weights, device, compiled=compiled, backend=backend)
        case "litgpt":
            return _litgpt(model, seq_len, weights, device, compiled=compiled, backend=backend)
        case _:
            how = backend if compiled and "compiled" in name else None
            return _transformers(model, weights, device, liger="Liger" in name, backend=how)


def _transformers(
    model: ModelConfig, weights: dict[str, Tensor], device: torch.device, *, liger: bool, backend: str | None
) -> tuple[nn.Module, Loss]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model)), attn_implementation="sdpa").float()
    theirs.load_state_dict(weights, strict=False)  # a tied head is not repeated
    theirs.tie_weights()
    theirs.train()
    call = torch.compile(theirs, backend=backend) if backend else theirs

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = call(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        return found

    return theirs, loss


def _litgpt(
    model: ModelConfig, seq_len: int, weights: dict[str, Tensor], device: torch.device, *, compiled: bool, backend: str
) -> tuple[nn.Module, Loss]:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    shape = Config(
        name="ours",
        block_size=seq_len,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        n_layer=model.n_layer,
        n_embd=model.d_model,
        n_head=model.n_head,
        n_query_groups=model.n_kv_head,
        intermediate_size=model.d_ff,
        rotary_percentage=1.0,
        rope_base=int(model.rope.theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    with torch.device(device):
        theirs = GPT(shape)
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(shape, {}, state, dict(weights))
    theirs.load_state_dict(state, strict=False)
    theirs.transformer.wte.weight = theirs.lm_head.weight  # as litgpt's --train.tie_embeddings
    theirs.max_seq_length = seq_len
    call = torch.compile(theirs, backend=backend) if compiled else theirs
    return theirs, lambda tokens, targets: chunked_cross_entropy(call(tokens), targets)


def _torchtitan(
    model: ModelConfig, seq_len: int, weights: dict[str, Tensor], device: torch.device, *, compiled: bool, backend: str
) -> tuple[nn.Module, Loss]:
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3.infra.parallelize import apply_compile
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer as Theirs
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    shape = TransformerModelArgs(
        dim=model.d_model,
        n_layers=model.n_layer,
        n_heads=model.n_head,
        n_kv_heads=model.n_kv_head,
        vocab_size=model.vocab_size,
        multiple_of=1,
        ffn_dim_multiplier=(model.d_ff + 0.5) / int(8 * model.d_model / 3),
        norm_eps=model.norm_eps,
        rope_theta=model.rope.theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        max_seq_len=seq_len,
    )
    with torch.device(device):
        theirs = Theirs(shape)
    theirs.load_state_dict(Llama3StateDictAdapter(shape, None).from_hf(weights), strict=False)
    theirs.output.weight = theirs.tok_embeddings.weight
    job = JobConfig()
    job.compile.enable, job.compile.backend = compiled, backend
    if compiled:
        apply_compile(theirs, job.compile)
    sum_of_losses = build_cross_entropy_loss(job)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = sum_of_losses(theirs(tokens), targets) / (targets != IGNORED).sum()
        return found

    return theirs, loss


def measured(row: Row, name: str, batch_size: int, grad_accum: int, precision: str, steps: int) -> dict[str, Any]:
    """Return the figures of ``row`` at ``grad_accum`` micro-batches of ``batch_size`` rows."""
    machine = runtime.machine()
    run = settings(name, batch_size, precision, grad_accum)
    if row.name == "ours":
        kernel, _ = attention_kernel(run, machine, World(), None)
        found = trial(run.replaced(model={"attention": kernel}), machine, steps=steps)
        shown = found.figures()
        return {
            name: shown[name]
            for name in ("tokens_per_second", "ms_per_step", "ms_spread", "mfu", "peak_gib", "first_step_seconds", "kernel", "swiglu")
        }
    weights, expected = _our_weights(run.model, run.train.seq_len, machine)
    theirs, loss = build(
        row.name,
        run.model,
        run.train.seq_len,
        weights,
        compiled=row.name != "transformers",
        backend="inductor" if machine.is_cuda else "aot_eager",
    )
    del weights
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # in float32, and without compiling for it
        off = float(loss(*_checked(run.model, run.train.seq_len, machine))) - expected
    machine.forget()
    parameters = sum(p.numel() for p in dict.fromkeys(theirs.parameters()))
    figures = _timed(theirs, loss, run, machine, steps)
    return {**figures, "parameters": parameters, "loss_off_ours": round(off, 6)}


def _timed(theirs: nn.Module, loss: Loss, run: RunConfig, machine: Machine, steps: int) -> dict[str, Any]:
    """Return what ``steps`` steps of a peer take, timed as ``trial`` times ours."""
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    assert isinstance(run.train.batch_size, int)
    shape = (run.train.batch_size, run.train.seq_len + 1)
    random = torch.Generator(machine.device).manual_seed(0)
    ends: list[Moment] = []
    with runtime.collector_held() as collect:
        began = time.perf_counter()
        for number in range(WARM_UP + steps):
            for _ in range(run.train.grad_accum):
                rows = torch.randint(run.model.vocab_size, shape, device=machine.device, generator=random)
                with torch.autocast(machine.device.type, torch.bfloat16):
                    total = loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
                (total / run.train.grad_accum).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ends.append(Moment(machine))
            if number == 0:
                machine.synchronize()
                first = time.perf_counter() - began
                collect()
    machine.synchronize()
    seconds = [end.seconds_since(before) for before, end in pairwise(ends[WARM_UP - 1 :])]
    median, tokens = statistics.median(seconds), run.train.grad_accum * shape[0] * run.train.seq_len
    mfu = model_flops_utilisation(tokens / median, flops_per_token(run.model, run.train.seq_len), machine.peak_flops, 1)
    return {
        "tokens_per_second": round(tokens / median),
        "ms_per_step": round(1e3 * median, 2),
        "ms_spread": [round(1e3 * min(seconds), 2), round(1e3 * max(seconds), 2)],
        "mfu": mfu and round(mfu, 4),
        "peak_gib": round(machine.peak_memory_bytes() / 2**30, 3),
        "first_step_seconds": round(first, 1),
    }


def _our_weights(model: ModelConfig, seq_len: int, machine: Machine) -> tuple[dict[str, Tensor], float]:
    """Return weights under Hugging Face's names, large enough that attention is not uniform, and the loss of ours that peers must have."""
    with torch.device(machine.device):
        transformer = Transformer(model)
    transformer.to(machine.device)
    random = torch.Generator(machine.device).manual_seed(1)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            std = 0.03 if "embedding" in name else weight.shape[-1] ** -0.5
            _ = weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, std, generator=random)
        tokens, targets = _checked(model, seq_len, machine)
        sums = TrainingModel(transformer, z_loss=0.0, chunk=8192)(tokens, targets)
    return to_hf(model, transformer.state_dict()), float(sums.cross_entropy) / CHECKED


def _checked(model: ModelConfig, seq_len: int, machine: Machine) -> tuple[Tensor, Tensor]:
    """Return a row of tokens, and targets at its last places alone."""
    random = torch.Generator(machine.device).manual_seed(2)
    rows = torch.randint(model.vocab_size, (2, 1, seq_len), device=machine.device, generator=random)
    tokens, targets = rows
    targets[:, :-CHECKED] = IGNORED
    return tokens, targets


def main() -> None:
    """Measure every peer at its best number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--config", default="model_0p5b", help="configs/<name>.yaml")
    parser.add_argument("--ours-precision", default="bf16", help="train.precision of our row")
    parser.add_argument("--rows", default="16,8,4", help="rows at once, the most first")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--keep", action="store_true", help="keep the rows of docs/data/peers.json that are not measured again")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=150.0, help="for a row")
    options = parser.parse_args()
    rows = [row for row in ROWS if re.search(options.only, row.name)]
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    name, sizes = ("tiny", [2]) if options.quick else (options.config, [int(size) for size in options.rows.split(",")])
    steps, where = 2 if options.quick else options.steps, context()
    results: list[dict[str, Any]] = []
    for row in rows:
        try:
            found_version = None if row.name == "ours" else version(row.package)
        except PackageNotFoundError:
            results.append({"name": row.name, "failed": f"{row.package} is not installed"})
            print(f"{row.name}: {results[-1]['failed']}", flush=True)
            continue
        print(f"{row.name} {found_version or ''}: {row.flags}", flush=True)
        before = 0.0
        for size in sizes:
            found = apart(where, measured, row, name, size, options.grad_accum, options.ours_precision, steps, seconds=options.seconds)
            what = {"name": row.name, "version": found_version, "flags": row.flags, "config": name}
            what |= {"rows": size, "grad_accum": options.grad_accum}
            results.append({**what, "precision": options.ours_precision if row.name == "ours" else "bf16", **found})
            print(f"  {size} rows: {found}", flush=True)
            if abs(found.get("loss_off_ours", 0.0)) > SAME:
                print(f"  its loss is not ours by {found['loss_off_ours']}: another model", flush=True)
            if found.get("tokens_per_second", before) < before:
                break
            before = found.get("tokens_per_second", before)
    if options.keep:
        results = with_kept("peers", results, alike=["name", "config", "rows", "grad_accum", "precision"])
    best: dict[str, int] = {}
    for found in results:
        if (found.get("config"), found.get("grad_accum")) == (name, options.grad_accum) and "tokens_per_second" in found:
            label = "ours, fp8" if found.get("precision") == "fp8" else found["name"]
            best[label] = max(best.get(label, 0), found["tokens_per_second"])
    figures: dict[str, Any] = {"config": name, "grad_accum": options.grad_accum, "tokens_per_second": best}
    for ours in (label for label in best if label.startswith("ours")):
        figures[f"{ours} over"] = {other: round(best[ours] / rate, 3) for other, rate in best.items() if not other.startswith("ours")}
    for label, rate in sorted(best.items(), key=lambda item: -item[1]):
        ratios = [f"{ours} is {best[ours] / rate:.2f} of it" for ours in best if ours.startswith("ours") and ours != label]
        print(f"{label:<24} {rate:>10,}  {', '.join(ratios)}")
    finish("peers", figures, results=results, quick=options.quick)


if __name__ == "__main__":
    main()
