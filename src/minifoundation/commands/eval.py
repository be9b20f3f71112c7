"""``eval``: benchmarks of a folder in Hugging Face form, or of a checkpoint as it would be exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minifoundation import launch
from minifoundation.config import EvalOptions
from minifoundation.errors import UserError
from minifoundation.evaluate import tables
from minifoundation.evaluate.baselines import Baselines
from minifoundation.evaluate.folder import is_checkpoint
from minifoundation.evaluate.mirror import fingerprint, first_line, sha256
from minifoundation.evaluate.requests import Request, read_tasks
from minifoundation.evaluate.results import RESULTS, Folder, Outcome, folder_for, replace_text
from minifoundation.lock import held
from minifoundation.packages import installed

if TYPE_CHECKING:
    from minifoundation.distributed import World
    from minifoundation.evaluate.model import Evaluated, Loaded


def evaluate(options: EvalOptions) -> None:
    """Run the tasks of ``options``, write the results after each, print the table; several processes (torchrun) share the requests."""
    requests = read_tasks(options.tasks)
    baselines = Baselines.load(reruns=options.beside)
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError("--data_dir", f"{options.data_dir}: no such folder", "give a mirror folder, or leave it out to read from the hub")
    if options.engine == "vllm":
        _check_vllm(options)
    try:
        from minifoundation.distributed import join
        from minifoundation.evaluate import harness
    except ImportError as error:
        raise UserError("lm-eval", f"is not installed ({error})", "pip install -e '.[eval]'") from None
    harness.quieten()
    with join() as world, nullcontext() if world.is_first else redirect_stdout(StringIO()):
        _evaluate(options, requests, baselines, world)


def _evaluate(options: EvalOptions, requests: list[Request], baselines: Baselines, world: World) -> None:
    from minifoundation.evaluate import harness

    with ExitStack() as opened:
        with world.together():
            manager = harness.task_manager(requests)
            model = opened.enter_context(_model(options, world))
        described = model.facts()
        sandboxed = None
        if options.allow_code_exec and any(request.row.runs_code for request in requests):
            from minifoundation.evaluate.sandbox import sandbox

            sandboxed = sandbox().description()
        facts = {
            "settings": options.model_dump(mode="json"),
            "model": described,
            "versions": harness.versions(),
            "sandbox": sandboxed,
            "identity": {
                "model": described["sha256"],
                "dtype": described["dtype"],
                "engine": described["engine"],
                "limit": options.limit,
                "data": fingerprint(options.data_dir),
                "versions": harness.versions(),
            },
        }
        folder = world.agreed(lambda: folder_for(options.out_dir or _default_folder(options.model_path), facts, requests))
        world.agreed(lambda: opened.enter_context(held(folder.path)))  # each writes all that it has: two would lose scores
        left = [request for request in requests if request.label not in folder.done]
        if folder.done:
            count = f"{len(requests) - len(left)} of {len(requests)}"
            print(f"{folder.path}: continuing with what is left there, tasks done: {count}")
        running = harness.run(model, manager, left, limit=options.limit, data_dir=options.data_dir, code=options.allow_code_exec)
        outcomes: list[Outcome] = []
        for place, request in enumerate(requests, 1):
            if request.label in folder.done:
                outcomes += folder.done[request.label]
                continue
            print(f"[{place}/{len(requests)}] {request.label}", flush=True)
            outcomes += next(running)
            for outcome in outcomes:
                outcome.samples.clear()  # prompts of every document: more than memory should hold for all tasks
            world.agreed(partial(_write, folder, outcomes, facts, baselines, complete=False))
        world.agreed(partial(_write, folder, outcomes, facts, baselines, complete=True))
    print(f"\n{tables.table(outcomes, baselines)}\n\n{folder.path / 'report.md'}\n{folder.path / RESULTS}")
    with world.together():
        if all(outcome.not_run for outcome in outcomes):
            raise UserError("eval", "no task could run", "the table says why for each")


def _write(folder: Folder, outcomes: list[Outcome], facts: dict[str, Any], baselines: Baselines, *, complete: bool) -> None:
    folder.write(outcomes, complete=complete)
    replace_text(folder.path / "report.md", tables.report(outcomes, facts, baselines))


def _check_vllm(options: EvalOptions) -> None:
    """Raise a UserError when vLLM cannot do what ``options`` ask for."""
    processes = launch.world_size()
    if processes > 1:
        raise UserError("--engine", f"vllm runs in one process, {processes} were started", "start it without torchrun")
    if is_checkpoint(Path(options.model_path)):
        problem = f"vllm reads folders in Hugging Face form, {options.model_path} is a checkpoint"
        raise UserError("--engine", problem, f"write one with export_hf --ckpt {options.model_path}, or leave --engine out")
    if options.device is not None:
        raise UserError("--device", "vllm computes on the GPU that it finds", "leave it out; CUDA_VISIBLE_DEVICES chooses among several")
    if not installed("vllm"):
        raise UserError("--engine", "vllm is not installed", "pip install vllm, or leave --engine out")


@contextmanager
def _model(options: EvalOptions, world: World) -> Iterator[Evaluated]:
    """Give the model as lm-eval takes it."""
    from minifoundation.evaluate.model import Model, Share

    if options.engine == "vllm":
        try:
            from minifoundation.evaluate.vllm import from_folder
        except Exception as error:  # a torch that it was not built for, a package that lm-eval does not find
            remedy = "install vllm in an environment of its own, or leave --engine out"
            raise UserError("--engine", f"vllm does not load ({first_line(error)})", remedy) from error
        yield from_folder(options.model_path, dtype=options.dtype, rows=options.batch_size)
        return
    with _loaded(options) as loaded:
        yield Model(loaded, rows=options.batch_size, share=Share(world.rank, world.size, world.of_all))


@contextmanager
def _loaded(options: EvalOptions) -> Iterator[Loaded]:
    """Give the model, from a folder, the hub or a checkpoint."""
    from minifoundation.evaluate import model

    path = Path(options.model_path)
    if not is_checkpoint(path):
        if options.ema:
            raise UserError("--ema", f"{path} is not a checkpoint", "leave it out: an exported folder holds what export_hf --ema was told")
        yield model.from_folder(options.model_path, dtype=options.dtype, device=options.device)
        return
    from minifoundation.checkpoint import TENSORS, load_checkpoint
    from minifoundation.commands.export_hf import trained
    from minifoundation.commands.native import in_memory

    checkpoint = load_checkpoint(path)
    if options.ema and checkpoint.ema is None:
        raise UserError("--ema", f"{path} holds no averaged weights", "leave --ema out, or train with --train.ema 0.999")
    device = model.default_device(options.device)
    dtype = model.DTYPES["fp32" if device == "cpu" else "bf16"] if options.dtype == "auto" else model.DTYPES[options.dtype]
    file = path / TENSORS if path.is_dir() else path
    hashes = {file.name: sha256(file)} | ({"weights": "ema"} if options.ema else {})
    with in_memory(checkpoint, dtype=dtype, ema=options.ema) as inside:
        network = model.placed(inside.network, device)
        source = model.Source(options.model_path, inside.folder, hashes, trained(checkpoint))
        yield model.Loaded(network, inside.tokenizer, source)


def _default_folder(model_path: str) -> Path:
    path = Path(model_path)
    if is_checkpoint(path):
        return path.parent / f"eval_{path.stem}"
    return path / "eval" if path.is_dir() else Path("outputs") / "eval" / model_path.replace("/", "--")
