"""What a machine cannot do of the settings, and what takes its place."""

from __future__ import annotations

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.model.attention import resolve
from minifoundation.runtime import Machine
from minifoundation.train.printer import Say


def supported(config: RunConfig, machine: Machine, say: Say) -> RunConfig:
    """Return ``config`` with what this machine cannot do replaced by the fallback, each said in one line."""
    if config.train.precision == "fp8" and (obstacle := runtime.fp8_obstacle(machine)):
        say(f"warning: train.precision: fp8 cannot run here: {obstacle}; using bf16")
        config = config.replaced(train={"precision": "bf16"})
    dtype = runtime.compute_dtype(config.train.precision, machine)
    if config.train.precision == "fp16" and not machine.is_cuda:
        say("warning: --amp alone is fp16, which is slow on a CPU; --amp --bf16 is faster")
    _, warning = resolve(
        config.model.attention,
        machine.device.type,
        dtype=dtype,
        head_dim=config.model.head_width,
        capability=machine.capability,
        masked=config.data.mask_documents,
        chunked=config.train.context_parallel > 1,
    )
    if warning:
        say(f"warning: model.attention: {warning}")
    if config.model.checkpointing == "offload" and (obstacle := _offload_obstacle(config, machine)):
        say(f"warning: model.checkpointing: offload {obstacle}; using attention")
        config = config.replaced(model={"checkpointing": "attention"})
    if config.train.deterministic:
        runtime.make_deterministic()
        asked = config.model.attention
        if machine.is_cuda and asked in ("auto", "cudnn", "flash4"):  # of the fast kernels, flash is the one that follows torch's switch
            if asked != "auto":
                say(f"warning: model.attention: {asked} does not follow train.deterministic; using flash")
            config = config.replaced(model={"attention": "flash"})
    compiled = config.train.compile
    if compiled and (reason := runtime.can_compile(machine)):
        say(f"warning: --compile: {reason}; running without it")
        compiled = False
    return config.replaced(train={"compile": compiled})


def _offload_obstacle(config: RunConfig, machine: Machine) -> str | None:
    """Return why activations cannot be kept in host memory, or None: it is the blocks by hand that do it."""
    if not machine.is_cuda:
        return f"needs a CUDA GPU and this is {machine.device.type}"
    if config.train.precision == "fp32":
        return "is for half precision"
    return "cannot do dropout" if config.model.dropout else None
