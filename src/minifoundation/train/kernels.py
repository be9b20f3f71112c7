"""The kernels of a run where several can compute the same: the fastest of those that can run here, and the model that takes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple, TypedDict

import torch

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.distributed import Context, Split, World
from minifoundation.model.attention import Backend, attend, candidates, documents_for, resolve, rows_for
from minifoundation.model.kernels import gated
from minifoundation.model.rope import positions_within
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine, Moment

Swiglu = Literal["quack", "own"]

SLOW = {"efficient", "math"}
"""Kernels that hold every score or repeat keys and values: they run where no other can."""

DOCUMENT_TOKENS = 512
"""Attention within documents is timed on rows cut into documents of this length."""

ONE = Split()

WARM_UP, ROUNDS = 3, 10


class Kernels(NamedTuple):
    """What computes what, under the names by which a checkpoint keeps it."""

    attention: Backend
    swiglu: Swiglu
    rows: Backend = "auto"
    """Of attention where it stays within documents, for rows that are one document each: more kernels can do those."""


def chosen_kernels(config: RunConfig, machine: Machine, world: World, recorded: Mapping[str, str]) -> tuple[Kernels, list[str]]:
    """Return the kernels of a run, the same on every process, and a line for each choice that was one.

    Args:
        recorded: those that the resumed checkpoint was trained with; empty for a run that begins.
    """
    by_quack = world.local_rank == 0 and _wants_quack(config, recorded.get("swiglu")) and _quack_obstacle(config, machine) is None
    dtype = runtime.compute_dtype(config.train.precision, machine)
    with gated.compiled_beside(machine.device, dtype) if by_quack else nullcontext():
        attention, of_attention = attention_kernel(config, machine, world, recorded.get("attention"))
        rows, of_rows = attention, None
        if config.data.mask_documents and config.data.min_tokens is not None:
            whole = config.replaced(data={"mask_documents": False})
            rows, line = attention_kernel(whole, machine, world, recorded.get("rows"))
            of_rows = line and f"rows of one document: {line}"
        swiglu, of_swiglu = swiglu_kernel(config, machine, recorded.get("swiglu"))
    return Kernels(attention, swiglu, rows), [line for line in (of_attention, of_rows, of_swiglu) if line]


def swiglu_kernel(config: RunConfig, machine: Machine, recorded: str | None = None) -> tuple[Swiglu, str | None]:
    """Return where SwiGLU is computed, and a line that says why where there was a choice; arguments as of ``chosen_kernels``."""
    asked = config.model.swiglu
    if not _wants_quack(config, recorded):
        return "own", None
    obstacle = _quack_obstacle(config, machine)
    fault = obstacle or gated.fault(machine.device, runtime.compute_dtype(config.train.precision, machine))
    if fault is None:
        return "quack", "swiglu: in the products beside it, by QuACK"
    if obstacle is None or asked == "quack" or recorded == "quack":  # what is there and should work is not left out without a word
        return "own", f"warning: model.swiglu: quack {fault}; using own"
    return "own", None


def _wants_quack(config: RunConfig, recorded: str | None) -> bool:
    asked = config.model.swiglu
    return asked == "quack" or (asked == "auto" and recorded != "own")


def _quack_obstacle(config: RunConfig, machine: Machine) -> str | None:
    model, precision = config.model, config.train.precision
    if precision == "fp8":
        return "is for half precision, and fp8 rounds in the same pass"
    if model.dropout:
        return "cannot do dropout"
    if not machine.is_cuda:
        return f"needs a CUDA GPU and this is {machine.device.type}"
    if model.d_model % 8 or model.d_ff % 8:
        return f"needs widths that are multiples of 8, not {model.d_model} and {model.d_ff}"
    return gated.obstacle(runtime.compute_dtype(precision, machine), machine.capability)


def transformer_for(
    config: RunConfig, machine: Machine, kernels: Kernels, split: Split = ONE, context: Context | None = None
) -> Transformer:
    """Return the model of a run on the device, its weights still to be set there: never all of them on the CPU first.

    Args:
        context: the processes that read a row together; None: the model reads whole rows.
    """
    model = config.model.model_copy(update={"attention": kernels.attention})
    dtype = runtime.compute_dtype(config.train.precision, machine)
    with torch.device(machine.device):
        transformer = Transformer(
            model,
            dtype=dtype,
            fp8=config.train.precision == "fp8",
            in_epilogue=kernels.swiglu == "quack",
            rows=kernels.rows,
            copies=not split.is_sharded,
            context=context,
        )
    return transformer.to(machine.device)  # the frequencies of RoPE and the first scales are made on the CPU


def attention_kernel(config: RunConfig, machine: Machine, world: World, recorded: str | None) -> tuple[Backend, str | None]:
    """Return the kernel that attention runs on, the same on every process, and a line that says how it was chosen where there was a choice.

    Args:
        recorded: the kernel that the resumed checkpoint was trained with: ``auto`` repeats it without measuring, so that a resumed run does
            the arithmetic of the run that was begun.
    """
    usable = usable_kernels(config, machine)
    kernel, _ = resolve(config.model.attention, machine.device.type, **_situation(config, machine))
    if config.model.attention != "auto" or not machine.is_cuda:
        return kernel, None
    lost = ""
    if recorded is not None:
        again = next((known for known in usable if known == recorded), None)
        if again is not None:
            return again, f"attention: {again}, as in the checkpoint"
        lost = f"; {recorded}, which the checkpoint was trained with, cannot run here"
    # Within rows flex is behind cuDNN and FlashAttention 4 (docs/speed.md), and compiling it would take seconds of every first start.
    beaten = SLOW if config.data.mask_documents else SLOW | {"flex"}
    contenders = [known for known in usable if known not in beaten] or list(usable[:1])
    if len(contenders) == 1:
        return contenders[0], f"attention: {contenders[0]}, the only kernel that can run here{lost}"
    mine = milliseconds(contenders, config, machine, world.context)
    total = world.total(torch.tensor([mine[known] for known in contenders], dtype=torch.float64, device=machine.device))
    times = {known: float(ms) / world.size for known, ms in zip(contenders, total, strict=True)}
    fastest = min(contenders, key=lambda known: times[known])
    if math.isinf(times[fastest]):
        fastest = kernel
    others = ", ".join(f"{known} {_shown(times[known])}" for known in contenders if known != fastest)
    rows = f"{config.train.batch_size} x {config.train.seq_len}"
    return fastest, f"attention: {fastest}, {_shown(times[fastest])} forward and backward of a block at {rows} ({others}){lost}"


def usable_kernels(config: RunConfig, machine: Machine) -> tuple[Backend, ...]:
    """Return the kernels that can run ``config`` on ``machine``."""
    return candidates(machine.device.type, **_situation(config, machine))


def milliseconds(kernels: Iterable[Backend], config: RunConfig, machine: Machine, context: Context | None = None) -> dict[Backend, float]:
    """Return the median time of each kernel's forward and backward at the shape of a micro-batch, in ms; infinite for one that fails.

    Args:
        context: the processes that read a row together: then that is what falls to this one, what is gathered for it left out.
    """
    times: dict[Backend, float] = {}
    for kernel in kernels:
        try:
            times[kernel] = _milliseconds(kernel, config, machine, context)
        except Exception:  # kernels of five libraries fail in ways of their own, and another one will do
            times[kernel] = math.inf
    machine.forget()
    return times


def _milliseconds(kernel: Backend, config: RunConfig, machine: Machine, context: Context | None) -> float:
    model, train = config.model, config.train
    assert isinstance(train.batch_size, int)
    dtype, device = runtime.compute_dtype(train.precision, machine), machine.device
    shape = (train.batch_size, train.seq_len)
    here = (train.batch_size, train.seq_len // (1 if context is None else context.size))
    heads = ((here, model.n_head), (shape, model.n_kv_head), (shape, model.n_kv_head))
    q, k, v = (torch.randn(*tokens, n, model.head_width, device=device, dtype=dtype).requires_grad_() for tokens, n in heads)
    d_out = torch.randn_like(q)
    mask = rows_for(kernel, torch.empty(here, device=device), context)
    if config.data.mask_documents:
        ends = [row * shape[1] + begin for row in range(shape[0]) for begin in range(0, shape[1], DOCUMENT_TOKENS)]
        cu_seqlens = torch.tensor([*ends, math.prod(shape)], dtype=torch.int32, device=device)
        mask = documents_for(kernel, cu_seqlens, positions_within(cu_seqlens, *shape), dtype, context)
    moments = [Moment(machine)]
    for _ in range(WARM_UP + ROUNDS):
        torch.autograd.grad(attend(q, k, v, kernel, mask), (q, k, v), d_out)
        moments.append(Moment(machine))
    times = [after.seconds_since(before) for before, after in pairwise(moments)]
    return 1e3 * statistics.median(times[WARM_UP:])


class _Situation(TypedDict):
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int]
    masked: bool
    chunked: bool


def _situation(config: RunConfig, machine: Machine) -> _Situation:
    """Return what decides which kernels can run."""
    return {
        "dtype": runtime.compute_dtype(config.train.precision, machine),
        "head_dim": config.model.head_width,
        "capability": machine.capability,
        "masked": config.data.mask_documents,
        "chunked": config.train.context_parallel > 1,
    }


def _shown(ms: float) -> str:
    return f"{ms:.2f} ms" if math.isfinite(ms) else "failed"
