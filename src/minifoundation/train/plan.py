"""What a run will do and need, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from minifoundation.config import ModelConfig, RunConfig, TrainConfig
from minifoundation.distributed import Split
from minifoundation.errors import UserError
from minifoundation.model.size import flops_per_token, memory_bytes, n_parameters
from minifoundation.runtime import PEAK_TFLOPS, Machine, free_disk_bytes
from minifoundation.train.schedule import warmup_steps
from minifoundation.wording import counted, micro_batches, processes

USABLE_MEMORY = 0.92
"""Share of the device's memory that may be predicted to be taken; the rest is the context and fragmentation."""

ALONE = Split()

USUAL = "H100"
"""The GPU whose hours are told where this machine's peak rate is not known."""


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    steps: int
    tokens_per_step: int
    samples_per_step: int
    warmup_steps: int
    parameters: int
    flops_per_token: float
    split: Split
    memory: dict[str, int]
    """Predicted peak memory of each device by what it holds, bytes."""

    disk_bytes: int
    """What the checkpoints take at the most: those that are kept, the one being written, and final.pth."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())


def plan(config: RunConfig, world_size: int, split: Split = ALONE) -> Plan:
    """Return the plan of a run; ``batch_size`` must be a number by now (see ``train.finder``), and ``grad_accum`` what is done.

    Args:
        world_size: processes, a multiple of ``context_parallel``.

    Raises:
        UserError: fewer tokens than one step takes.
    """
    train = config.train
    assert isinstance(train.batch_size, int)
    groups = world_size // train.context_parallel
    samples = train.batch_size * train.grad_accum * groups
    tokens = samples * train.seq_len
    steps = train.tokens // tokens
    if steps == 0:
        what = "grad_accum" if train.grad_accum > 1 else "batch_size" if train.batch_size > 1 else "seq_len"
        raise UserError(
            "train.tokens",
            f"{train.tokens:,} is less than one step of {tokens:,} (batch_size {train.batch_size} x grad_accum {train.grad_accum} "
            f"x seq_len {train.seq_len} x {sharers(config, world_size)})",
            f"raise --tokens or lower --{what if train.tokens_per_step is None else 'train.tokens_per_step'}",
        )
    alone = predicted_memory(config)  # a checkpoint holds all parts
    final = alone["weights"] + alone["ema"]
    return Plan(
        steps=steps,
        tokens_per_step=tokens,
        samples_per_step=samples,
        warmup_steps=warmup_steps(train, steps),
        parameters=n_parameters(config.model),
        flops_per_token=flops_per_token(config.model, train.seq_len),
        split=split,
        memory=predicted_memory(config, split),
        disk_bytes=(train.keep + 1 + (steps // train.keep_every if train.keep_every else 0)) * (final + alone["optimizer"]) + final,
    )


def predicted_memory(config: RunConfig, split: Split = ALONE) -> dict[str, int]:
    """Return the predicted peak of device memory by what it holds, in bytes; ``batch_size`` must be a number.

    Args:
        split: how the model lies on the processes.
    """
    train = config.train
    assert isinstance(train.batch_size, int)
    return memory_bytes(
        config.model,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        context=train.context_parallel,
        grad_accum=train.grad_accum,
        precision=train.precision,
        optimizer_states=train.optimizer_states,
        ema=train.ema is not None,
        loss_chunk=train.loss_chunk,
        shards=split.shards,
        optimizer_shards=split.optimizer_shards,
        regathers=split.regathers,
        sent=2 if split.parallel == "ddp" and train.reduce_precision == "bf16" else 0,
    )


def describe(config: RunConfig, plan: Plan, machine: Machine, world_size: int) -> str:
    """Return the plan as lines for a person."""
    train, model = config.train, config.model
    flops = plan.flops_per_token * plan.tokens
    heads = f"{model.n_head}/{model.n_kv_head} heads" + (f" of {model.head_dim}" if model.head_dim is not None else "")
    shape = f"{counted(model.n_layer, 'block')} x {model.d_model}, {heads}, d_ff {model.d_ff}, vocabulary {model.vocab_size:,}"
    step = f"{micro_batch(train)} x {micro_batches(train.grad_accum)} x {train.seq_len} tokens x {sharers(config, world_size)}"
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.memory.items() if size)
    rows = {
        "model": f"{_millions(plan.parameters)} parameters: {shape}",
        **({"context": _context(model)} if model.rope.scaling != "none" or model.rope.factor > 1 else {}),
        "steps": f"{plan.steps:,} of {plan.tokens_per_step:,} tokens ({step}), {plan.warmup_steps:,} of them warm-up",
        "tokens": f"{plan.tokens:,} ({plan.tokens / plan.parameters:.1f} a parameter; Chinchilla's optimum is about 20, arXiv:2203.15556)",
        "compute": f"{flops:.3g} FLOP ({plan.flops_per_token / 1e9:.3f} GFLOP a token), {train.precision}",
        "disk": f"{plan.disk_bytes / 2**30:.1f} GiB for checkpoints, {free_disk_bytes(config.out_dir) / 2**30:.1f} GiB free",
        "memory": f"{plan.memory_total / 2**30:.1f} GiB of {machine.memory_bytes / 2**30:.1f} GiB predicted on {machine.name}: {parts}",
    }
    if world_size > 1:
        split = "a copy of the model on each" if plan.split.shards == 1 else f"the model in {plan.split.shards} parts"
        split += f", the optimizer in {plan.split.owners} parts" if plan.split.owners > 1 else ""
        rows["parallel"] = f"{plan.split.parallel}, {processes(world_size)}: {split}; gradients travel in {train.reduce_precision}"
        if train.context_parallel > 1:
            rows["parallel"] += f"; {train.context_parallel} read a row together, {train.seq_len // train.context_parallel:,} tokens each"
    peak = machine.peak_flops or PEAK_TFLOPS[USUAL] * 1e12
    seconds = {share: flops / (share * peak * world_size) for share in (0.3, 0.4, 0.5)}
    elsewhere = "" if machine.peak_flops else f" of an {USUAL}; the peak rate of {machine.name} is not known"
    rows["time"] = ", ".join(f"{_duration(s)} at {share:.0%}" for share, s in seconds.items()) + f" MFU{elsewhere}"
    return "\n".join(f"  {name:<8} {text}" for name, text in rows.items())


def _context(model: ModelConfig) -> str:
    """Return how a context beyond that of pretraining is reached, in words."""
    rope = model.rope
    how = "RoPE without scaling" if rope.scaling == "none" else f"RoPE scaled by {rope.scaling}"
    reach = f"{model.max_seq_len:,} tokens, pretrained at {model.original_seq_len:,}"
    return f"{reach}: {how}, theta {rope.theta:,.0f}, factor {rope.factor:g}"


def micro_batch(train: TrainConfig) -> str:
    """Return how many rows there are at once, in words."""
    assert isinstance(train.batch_size, int)
    return counted(train.batch_size, "row")


def sharers(config: RunConfig, world_size: int) -> str:
    """Return how many have rows of their own, in words."""
    together = config.train.context_parallel
    if together == 1:
        return processes(world_size)
    groups = world_size // together
    return f"{counted(groups, 'group')} of {processes(together)}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count:,}"
