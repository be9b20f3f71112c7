"""``doctor``: what this machine can do, and whether all in the folder of a run is whole, in plain words."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import click
import torch

from minifoundation import config, runtime
from minifoundation.checkpoint import FINAL, fault, load_checkpoint, step_folders, step_of
from minifoundation.config import REPOSITORY, DoctorOptions, RunConfig
from minifoundation.data import hub, survey
from minifoundation.data.ledger import Entry
from minifoundation.data.shards import Shards
from minifoundation.errors import UserError
from minifoundation.evaluate.requests import read_tasks
from minifoundation.lock import holder
from minifoundation.model.attention import resolve
from minifoundation.model.kernels import gated
from minifoundation.packages import installed
from minifoundation.runtime import Machine
from minifoundation.train.metrics import METRICS, table
from minifoundation.train.provenance import RUN, driver_version
from minifoundation.train.rollback import rollbacks
from minifoundation.wording import counted

LITTLE_DISK = 20 * 2**30
"""Three checkpoints of the 0.5B model, about."""


class Finding(NamedTuple):
    """What one check has found."""

    kind: Literal["ok", "note", "wrong"]
    text: str


def doctor(options: DoctorOptions) -> None:
    """Print what is found, line by line.

    Raises:
        UserError: something is wrong.
    """
    wrong = 0
    sections: list[tuple[str, Iterator[Finding]]] = [("this machine", _machine(options))]
    if options.run is not None:
        sections.append((str(options.run), _run(options.run)))
    for title, findings in sections:
        click.echo(f"{title}:")
        for kind, text in findings:
            click.echo(f"  {kind:<6} {text}")
            wrong += kind == "wrong"
    if wrong:
        raise UserError("doctor", f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong", "see the lines that begin with wrong")


def _machine(options: DoctorOptions) -> Iterator[Finding]:
    where = runtime.machine()
    yield Finding("ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    if where.is_cuda:
        major, minor = where.capability
        memory = f"{where.memory_bytes / 2**30:.1f} GiB"
        yield Finding("ok", f"{where.name}, {memory}, compute capability {major}.{minor}, driver {driver_version() or 'unknown'}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or driver is found"
        yield Finding("note", f"no GPU ({why}): fine for a taste and the tests, too slow for 0.5B")
    yield from _tried(where)
    reason = runtime.can_compile(where)
    yield Finding("note", f"--compile has no effect: {reason}") if reason else Finding("ok", "torch.compile can run")
    free = runtime.free_disk_bytes(Path.cwd())
    yield Finding("note" if free < LITTLE_DISK else "ok", f"{free / 2**30:,.0f} GiB free on the disk of {Path.cwd()}")
    yield from _benchmarks()
    if options.network:
        problem = hub.unreachable()
        yield Finding("note", f"{problem}: give --data a path") if problem else Finding("ok", "the Hugging Face Hub answers")


def _tried(where: Machine) -> Iterator[Finding]:
    """Multiply once in each precision, and name the attention kernel."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            runtime.compute_dtype(name, where)
            ones = torch.ones(64, 64, dtype=dtype, device=where.device)
            good = bool(((ones @ ones) == 64).all())
        except (RuntimeError, UserError) as error:
            yield Finding("wrong", f"{name}: {str(error).splitlines()[0]}")
        else:
            yield (
                Finding("ok", f"{name} computes") if good else Finding("wrong", f"{name}: a product of ones is wrong: the device is broken")
            )
    kernel, _ = resolve("auto", where.device.type, capability=where.capability)
    yield Finding("ok", f"attention kernel: {kernel if where.is_cuda else 'the one of torch for CPUs'}")
    if where.is_cuda and gated.obstacle(torch.bfloat16, where.capability) is None:
        fails = gated.fault(where.device, torch.bfloat16)
        yield (
            Finding("note", f"SwiGLU is slower than it could be: QuACK {fails}") if fails else Finding("ok", "SwiGLU: in QuACK's products")
        )


def _benchmarks() -> Iterator[Finding]:
    if not installed("lm_eval"):
        yield Finding("note", "lm-eval is not installed, so eval cannot run: pip install -e '.[eval]'")
        return
    tasks = read_tasks(str(REPOSITORY / "configs" / "tasks.txt"))
    try:
        from minifoundation.evaluate import harness

        harness.quieten()
        harness.task_manager(tasks)
    except (UserError, ImportError) as error:
        yield Finding("wrong", f"lm-eval: {error}")
    else:
        yield Finding("ok", f"lm-eval has the {len(tasks)} tasks of configs/tasks.txt")


def _run(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("wrong", f"a file: give the folder, {folder.parent}" if folder.is_file() else "no such folder")
        return
    owner = holder(folder)
    if owner is not None:
        yield Finding("note", f"a run is going on ({owner}): what it is writing now can look unfinished")
    imported = not (folder / "config.yaml").exists() and (folder / FINAL).exists() and (folder / "parity.json").exists()
    if imported:
        yield Finding("ok", "a model that import_hf wrote: it has no settings and metrics of a run")
    else:
        yield from _settings(folder)
    good: list[Path] = []
    checkpoints = [*step_folders(folder), *([folder / FINAL] if (folder / FINAL).exists() else [])]
    for path in checkpoints:
        problem = _quietly(lambda path=path: fault(path))  # type: ignore[misc]
        yield Finding("wrong", f"{path.name}: {problem}") if problem else Finding("ok", f"{path.name}: whole (every byte compared)")
        good += [] if problem else [path]
    if not checkpoints:
        yield Finding("note", "no checkpoint yet")
    for left in sorted([*folder.glob("*.part"), *folder.glob("*.aside*"), *folder.glob("*.undone*")]):
        yield Finding(
            "note", f"{left.name}: not used by the run; it can be removed" + (" once no process uses the folder" if owner else "")
        )
    if imported:
        return
    steps = [step_of(path) for path in good if path.name != FINAL]
    yield from _metrics(folder / METRICS, max(steps, default=0))
    yield from _rolled_back(folder)
    if good:
        yield from _shards(good[-1])


def _quietly(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except UserError as error:
        return f"{error.problem}; {error.remedy}"


def _settings(folder: Path) -> Iterator[Finding]:
    path = folder / "config.yaml"
    try:
        config.build(RunConfig, config.read_yaml(path), str(path))
        yield Finding("ok", "config.yaml: valid settings")
    except UserError as error:
        yield Finding("wrong", f"config.yaml: {error.where}: {error.problem}")
    try:
        starts = json.loads((folder / RUN).read_text(encoding="utf-8"))["starts"]
        yield Finding("ok", f"{RUN}: {counted(len(starts), 'start')}, the last {starts[-1]['time']} with: {starts[-1]['command']}")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        yield Finding("note", f"{RUN}: missing or damaged; the next start writes it again")


def _metrics(path: Path, saved: int) -> Iterator[Finding]:
    try:
        rows = table(path)
        steps = [int(row["step"]) for row in rows]
        bad = [row["step"] for row in rows if not math.isfinite(float(row["loss"])) and not row["skipped"]]
    except FileNotFoundError:
        yield Finding("note", f"{METRICS}: not there yet")
        return
    except UserError as error:
        yield Finding("wrong", f"{METRICS}: {error.problem}; {error.remedy}")
        return
    except (OSError, ValueError, KeyError, TypeError):
        yield Finding("wrong", f"{METRICS}: a row is damaged; --resume auto cuts it back to its checkpoint")
        return
    falls = next((b for a, b in pairwise(steps) if b <= a), None)
    if falls is not None:
        yield Finding("wrong", f"{METRICS}: step {falls} comes twice or out of order")
    elif bad:
        yield Finding("wrong", f"{METRICS}: the loss of step {bad[0]} is not a number, and the step was not skipped")
    elif steps and steps[-1] < saved:
        yield Finding("note", f"{METRICS}: ends at step {steps[-1]:,}, before the checkpoint of step {saved:,} (train.log_every?)")
    else:
        skipped = sum(bool(row["skipped"]) for row in rows)
        left_out = f", {counted(skipped, 'skipped step')}" if skipped else ""
        yield Finding("ok", f"{METRICS}: {counted(len(rows), 'row')} in order{left_out}")


def _rolled_back(folder: Path) -> Iterator[Finding]:
    try:
        for one in rollbacks(folder):
            over = f"over samples {one['first_sample']:,} to {one['end'] - 1:,}"
            yield Finding("note", f"went back from step {one['last_step']:,} to {one['to']:,}, {over}: {one['seen']}")
    except UserError as error:
        yield Finding("wrong", f"{error.where}: {error.problem}; {error.remedy}")


def _shards(checkpoint: Path) -> Iterator[Finding]:
    try:
        entries = [Entry(**kept) for kept in load_checkpoint(checkpoint, verified=True).ledger]
    except (UserError, TypeError) as error:
        yield Finding("wrong", f"{checkpoint.name}: {error}")
        return
    for folder in sorted({entry.folder for entry in entries}):
        try:
            shards = Shards.open(Path(folder))
            survey.check(shards)
        except UserError as error:
            yield Finding("wrong", f"token shards: {error}")
        else:
            yield Finding("ok", f"token shards {folder}: {len(shards.train)} whole (every byte compared)")
