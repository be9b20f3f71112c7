"""Where the time of a step goes, by kind of kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minifoundation.runtime import Machine

KINDS = {
    "communication": "nccl",
    "data": "HtoD",
    "optimizer": "multi_tensor_apply|lpnorm|norm_kernel|_fused_adamw|foreach|linalg_vector_norm",
    "loss": "^_losses|logsumexp|log_softmax",
    "rounding to 8 bits": "^_round$",
    "attention": "cudnn|fmha|flash|sdpa|attention|Flash|bwd_preprocess|bwd_postprocess",
    "matrix products": "nvjet|gemm|Gemm|cutlass|xmma|GEMM|splitK|aten::mm|aten::addmm|aten::bmm",
    "embedding": "embedding|indexing|sort|Sort|segment|compute_grad",
    "SwiGLU": "^_product|^_gradients|^_rounded_gradients|silu|sigmoid|swiglu",
    "norms": "^_normed|^_norm_gradients|^_columns|rsqrt|fused.*_pow_|aten::pow|aten::mean",
    "rotation": "^_rotate|^_merge|cat|clone",
    "copies": "copy|Copy|Memcpy|Memset|fill|Fill",
}
"""Regular expressions of the names of kernels, on a CPU of operators; the first that matches counts. What is fused goes by a part of it."""

REST = "rest"


@dataclass(frozen=True)
class Breakdown:
    """The time of one step."""

    milliseconds: dict[str, float]
    """By kind, the most first. On a GPU of its kernels, on a CPU of its operators."""
    kernels: dict[str, tuple[float, int]]
    """Milliseconds and number of calls by kind and name, of the kernels that take most."""
    hidden: float
    """Milliseconds of communication between GPUs during which others of this GPU's kernels ran."""

    def figures(self) -> dict[str, object]:
        """Return the figures as JSON takes them."""
        return {"ms": self.milliseconds, "hidden_communication_ms": self.hidden, "kernels": self.kernels}


def breakdown(step: Callable[[], None], machine: Machine) -> Breakdown:
    """Return where the time of ``step`` goes, which is called once."""
    activity = torch.profiler.ProfilerActivity.CUDA if machine.is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as recorded:
        step()
        machine.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        if event.device_type.name != machine.device.type.upper() or event.key.startswith(("Optimizer.", "ProfilerStep")):
            continue  # a span around kernels, not one
        ms = (event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total) / 1e3
        kind = kind_of(event.key)
        kinds[kind] += ms
        kernels[f"{kind}: {event.key[:90]}"] = round(ms, 2), event.count
    return Breakdown(
        {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:24]),
        round(_hidden(recorded, machine), 2),
    )


def _hidden(recorded: torch.profiler.profile, machine: Machine) -> float:
    sent: list[tuple[float, float]] = []
    computed: list[tuple[float, float]] = []
    for event in recorded.events() or []:
        if event.device_type.name == machine.device.type.upper() and machine.is_cuda:
            kind = kind_of(event.name)
            if kind != "copies":
                (sent if kind == "communication" else computed).append((event.time_range.start, event.time_range.end))
    return overlap(sent, computed) / 1e3


def overlap(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Return for how long one of ``some`` intervals and one of ``others``, start and end of each, are there at once."""
    total, at = 0.0, 0
    joined = _joined(others)
    for start, end in _joined(some):
        while at < len(joined) and joined[at][1] <= start:
            at += 1
        later = at
        while later < len(joined) and joined[later][0] < end:
            total += min(end, joined[later][1]) - max(start, joined[later][0])
            later += 1
    return total


def _joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return ``intervals`` in order, those that touch as one."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def kind_of(name: str) -> str:
    """Return the kind of the kernel or operator ``name``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)
