"""``bench``: what this machine does with a model, and which settings suit it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import click
import torch

from minifoundation import config, launch, runtime
from minifoundation.checkpoint import write_whole
from minifoundation.commands.pretrain import layered, sources
from minifoundation.config import BenchOptions, RunConfig
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train import capacity
from minifoundation.train.ceilings import copy_bandwidth, matrix_products
from minifoundation.train.fallbacks import supported
from minifoundation.train.finder import predicted_to_fit, with_batch_size
from minifoundation.train.kernels import attention_kernel, milliseconds, swiglu_kernel, usable_kernels
from minifoundation.train.out_of_memory import is_out_of_memory
from minifoundation.train.parallel import accumulated
from minifoundation.train.plan import USABLE_MEMORY, micro_batch, predicted_memory
from minifoundation.train.trial import WARM_UP, Trial, trial

CHECKPOINTING = ("none", "attention", "full")
"""From the most memory to the least."""

STEP_TOKENS = 262_144
"""What a step is filled up to where ``grad_accum`` says nothing, as in configs/gpu_80gb.yaml."""

ON_A_CPU = {"model": {"n_layer": 2, "vocab_size": 4096}, "train": {"seq_len": 256, "batch_size": 1, "grad_accum": 1, "loss_chunk": 256}}
"""The most that a CPU is given to do."""


def bench(options: BenchOptions, values: dict[str, Any]) -> None:
    """Measure the model of ``options`` and ``values`` on this machine and print a table for each topic, or tell what fits other ones.

    Raises:
        UserError: there are several processes, which would measure each other's load; nothing fits; no file can be written at ``json_out``.
    """
    if options.json_out is not None:  # a mistake in it should not show after the measurement
        if options.json_out.is_dir():
            raise UserError("--json", f"{options.json_out} is a folder", "give the path of a file")
        options.json_out.parent.mkdir(parents=True, exist_ok=True)
    if (processes := launch.world_size()) > 1:
        remedy = "start it without torchrun (benchmarks/scaling.py measures several GPUs)"
        raise UserError("torchrun", f"{processes} processes, and bench measures one GPU", remedy)
    machine = runtime.machine()
    below: dict[str, Any] = {"data": {"source": "random tokens"}, "train": {"tokens": 10**12, "batch_size": "auto"}}
    if machine.is_cuda:
        below["train"] |= {"precision": "bf16", "compile": True}
    settings = layered(options, values, below=below)
    asked = config.build(RunConfig, settings, sources(options))
    if options.fit:
        figures = _what_fits(accumulated(asked, World()), options.fit)
    elif asked.train.context_parallel > 1:
        remedy = "leave it out, or give --fit (benchmarks/scaling.py measures several GPUs)"
        raise UserError("train.context_parallel", f"{asked.train.context_parallel}, and bench measures one GPU", remedy)
    else:
        parameters = f"{capacity.billions(asked.model) * 1e3:,.1f}M parameters, {asked.train.precision}"
        click.echo(f"{machine.name}, torch {torch.__version__}: {parameters}{', compiled' if asked.train.compile else ''}")
        if not machine.is_cuda:
            asked = config.build(RunConfig, config.merged(settings, _less(asked)), sources(options))
            sizes = f"n_layer {asked.model.n_layer}, vocab_size {asked.model.vocab_size:,}, one row of {asked.train.seq_len} tokens"
            click.echo(f"on a CPU: a part of it ({sizes}); all figures are of that model")
        figures = _measured(accumulated(asked, World()), machine, options.steps)
    if options.json_out is not None:
        write_whole(options.json_out, json.dumps(figures, indent=1).encode())
        click.echo(f"\nwrote {options.json_out}")


def _less(asked: RunConfig) -> dict[str, Any]:
    """Return the settings of which ``asked`` has more than ``ON_A_CPU``, at that."""

    def size(section: str, name: str, most: int) -> int:
        value = getattr(getattr(asked, section), name)
        return min(value, most) if isinstance(value, int) else most

    return {section: {name: size(section, name, most) for name, most in sizes.items()} for section, sizes in ON_A_CPU.items()}


def _measured(asked: RunConfig, machine: Machine, steps: int) -> dict[str, Any]:
    """Print every table and return its figures."""
    figures: dict[str, Any] = {"machine": machine.name, "torch": torch.__version__}
    asked = supported(asked, machine, click.echo)
    expected = with_batch_size(asked, machine)
    needed = sum(predicted_memory(expected).values())
    if needed > machine.memory_bytes and not machine.is_cuda:  # it would be killed without a word; a GPU says what does not fit
        problem = f"{needed / 2**30:.1f} GiB are predicted, and {machine.name} has {machine.memory_bytes / 2**30:.1f}"
        raise UserError("model", problem, "take a smaller one, or --fit, which tells what fits GPUs")
    figures["ceilings"] = _ceilings(expected, machine)
    kernel, line = attention_kernel(expected, machine, World(), None)
    figures["attention_ms"] = _attention(expected, machine)
    click.echo(line or f"attention: {kernel}")
    swiglu, line = swiglu_kernel(expected, machine)
    click.echo(line or f"swiglu: {swiglu}")
    warm_up, steps = (WARM_UP, steps) if machine.is_cuda else (1, 2)
    chosen, found = _largest(asked.replaced(model={"attention": kernel}), machine, steps=steps, warm_up=warm_up, profiled=True)
    figures["step"] = _split(chosen) | found.figures()
    _step(chosen, found, machine)
    _time(found)
    if asked.train.batch_size == "auto":
        tried: dict[str, tuple[RunConfig, Trial]] = {chosen.model.checkpointing: (chosen, found)}
        for way in CHECKPOINTING:
            other = asked.replaced(model={"attention": kernel, "checkpointing": way})
            if way not in tried and predicted_to_fit(other, machine):
                tried[way] = _largest(other, machine, steps=min(steps, 5), warm_up=warm_up)
        figures["settings"] = _settings(tried)
    return figures


def _largest(asked: RunConfig, machine: Machine, *, steps: int, warm_up: int, profiled: bool = False) -> tuple[RunConfig, Trial]:
    """Return the settings with the most rows that fit, and what their steps take.

    Raises:
        UserError: not even one row fits, or not those that were given.
    """
    found: list[Trial] = []

    def fits(one: RunConfig) -> bool:
        torch.compiler.reset()  # it compiles a limited number of shapes, and then runs without
        try:
            found.append(trial(one, machine, steps=steps, warm_up=warm_up, profiled=profiled))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    chosen = with_batch_size(asked, machine, fits)
    if not found and not fits(chosen):
        rows = f"{micro_batch(chosen.train)} of {chosen.train.seq_len} tokens"
        raise UserError("train.batch_size", f"{rows} do not fit the memory of {machine.name}", "lower it, or leave it out to find the most")
    return chosen, found[0]


def _split(run: RunConfig) -> dict[str, Any]:
    return {"batch_size": run.train.batch_size, "grad_accum": run.train.grad_accum, "seq_len": run.train.seq_len}


def _ceilings(run: RunConfig, machine: Machine) -> dict[str, Any]:
    products, copied = matrix_products(run, machine), copy_bandwidth(machine)
    unit, size = ("TFLOP/s", 1e12) if machine.is_cuda else ("GFLOP/s", 1e9)
    rows = [[p.name, f"{p.d_in} x {p.d_out}", *(f"{rate / size:,.0f}" for rate in p[3:])] for p in products]
    _table(f"matrix products by themselves, {unit}", ["", "shape", "forward", "input gradient", "weight gradient"], rows)
    click.echo(f"copies within memory: {copied / 1e9:,.0f} GB/s read and written")
    return {"products": [p._asdict() for p in products], "copy_bytes_per_second": copied}


def _attention(run: RunConfig, machine: Machine) -> dict[str, float | None]:
    times = milliseconds(usable_kernels(run, machine), run, machine)
    # Seven products, two of them forward, over the half of T x T that is seen.
    flops = 7.0 * run.model.n_head * run.model.head_width * run.train.seq_len**2 * int(run.train.batch_size)
    rows = []
    for kernel, ms in times.items():
        rate = f"{flops / ms / 1e9:,.1f}" if math.isfinite(ms) and not run.data.mask_documents else ""
        rows.append([kernel, f"{ms:,.2f}" if math.isfinite(ms) else "failed", rate])
    shape = f"{run.train.batch_size} x {run.train.seq_len}, {run.model.n_head}/{run.model.n_kv_head} heads of {run.model.head_width}"
    _table(f"attention of a block, forward and backward, {shape}", ["", "ms", "TFLOP/s"], rows)
    return {k: ms if math.isfinite(ms) else None for k, ms in times.items()}


def _step(run: RunConfig, found: Trial, machine: Machine) -> None:
    ms = [1e3 * seconds for seconds in found.seconds]
    rows = [
        ["tokens/s", f"{found.tokens_per_second:,.0f}"],
        ["MFU", f"{found.mfu:.1%}" if found.mfu is not None else f"(peak rate of {machine.name} not known)"],
        ["ms a step, median", f"{statistics.median(ms):,.1f} ({min(ms):,.1f} to {max(ms):,.1f} over {len(ms)})"],
        ["first step, s", f"{found.first_seconds:.1f}"],
        ["compiled again", f"{found.graphs_after_warm_up} graphs"],
    ]
    if machine.is_cuda:
        rows.append(["peak memory, GiB", f"{_gib(found.peak_bytes)} ({_gib(sum(found.predicted.values()))} predicted)"])
    _table(f"a step of {_rows(run)}, checkpointing {run.model.checkpointing}, {found.kernel} attention", ["", ""], rows)


def _time(found: Trial) -> None:
    assert found.breakdown is not None
    spent = found.breakdown.milliseconds
    whole = sum(spent.values())
    _table("where its time goes", ["", "ms", "share"], [[kind, f"{ms:,.1f}", f"{ms / whole:.1%}"] for kind, ms in spent.items()])


def _settings(tried: dict[str, tuple[RunConfig, Trial]]) -> dict[str, Any]:
    rows = []
    for way, (run, found) in tried.items():
        memory = [_gib(found.peak_bytes), _gib(sum(found.predicted.values()))]
        rows.append([way, _rows(run), f"{found.tokens_per_second:,.0f}", *memory])
    _table("the most rows that fit, by checkpointing", ["", "rows", "tokens/s", "peak GiB", "predicted"], rows)
    way = max(tried, key=lambda way: tried[way][1].tokens_per_second)
    run, found = tried[way]
    parts = run.train.grad_accum
    if parts == 1:
        parts = max(1, round(STEP_TOKENS / found.tokens_per_step))
    micro = "" if run.train.tokens_per_step else f"--grad_accum {parts} "  # it follows, there
    flags = f"--batch_size {run.train.batch_size} {micro}--model.checkpointing {way} --model.attention {found.kernel}"
    click.echo(f"recommended: {flags}")
    return {"recommended": flags, "tried": {way: _split(run) | found.figures() for way, (run, found) in tried.items()}}


def _what_fits(asked: RunConfig, sizes: Sequence[float]) -> dict[str, Any]:
    """Print what is predicted to fit GPUs of ``sizes`` GiB."""
    rows, figures = [], []
    for size in sizes:
        for way in CHECKPOINTING:
            run, memory = asked.replaced(model={"checkpointing": way}), size * 2**30
            largest = capacity.largest_model(run, memory)
            found = {
                "gib": size,
                "checkpointing": way,
                "rows": capacity.most_rows(run, memory),
                "longest_row": capacity.longest_row(run, memory),
                "largest_model_billions": capacity.billions(largest) if largest else 0.0,
            }
            figures.append(found)
            model = f"{found['largest_model_billions']:.2f}B: {largest.n_layer} x {largest.d_model}" if largest else "none"
            rows.append([f"{size:g}", way, f"{found['rows']:,}", f"{found['longest_row']:,}", model])
    train = asked.train
    parameters = f"{capacity.billions(asked.model) * 1e3:,.1f}M parameters"
    click.echo(f"{parameters}, {train.precision}, {train.optimizer_states} moments, {train.grad_accum} micro-batches to a step")
    columns = ["GiB", "checkpointing", f"rows of {train.seq_len:,}", "longest row", f"largest model, one row of {train.seq_len:,}"]
    _table(f"predicted to fit in {USABLE_MEMORY:.0%} of the memory", columns, rows)
    return {"fit": figures}


def _rows(run: RunConfig) -> str:
    return f"{run.train.batch_size} x {run.train.seq_len} x {run.train.grad_accum}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` under ``title``: the first column to the left, the others to the right."""
    lines = [row for row in (header, *rows) if any(row)]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    click.echo(f"\n{title}")
    for row in lines:
        first, *others = (
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo(f"  {'  '.join([first, *others])}".rstrip())
