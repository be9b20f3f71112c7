"""``eval``: benchmarks of a folder in Hugging Face form."""

from __future__ import annotations

from pathlib import Path

from minifoundation.config import EvalOptions
from minifoundation.errors import UserError
from minifoundation.evaluate import report
from minifoundation.evaluate.protocols import Outcome, read_tasks


def evaluate(options: EvalOptions) -> None:
    """Run the tasks of ``options``, write the results after each, print the table."""
    requests = read_tasks(options.tasks)
    baselines = report.Baselines.load()
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError("--data_dir", f"{options.data_dir}: no such folder", "give a mirror folder, or leave it out to read from the hub")
    try:
        from minifoundation.evaluate import harness
    except ImportError as error:
        raise UserError("lm-eval", f"is not installed ({error})", "pip install -e '.[eval]'") from None
    harness.quieten()
    manager = harness.task_manager(requests)
    model = harness.load_model(options.model_path, dtype=options.dtype, device=options.device, rows=options.batch_size)
    is_local = Path(options.model_path).is_dir()
    default = Path(options.model_path) / "eval" if is_local else Path("outputs") / "eval" / options.model_path.replace("/", "--")
    folder = report.free_folder(options.out_dir or default)
    sandboxed = None
    if options.allow_code_exec and any(request.row.runs_code for request in requests):
        from minifoundation.evaluate.sandbox import sandbox

        sandboxed = sandbox().description()
    facts = {"settings": options.model_dump(mode="json"), "model": model.facts(), "versions": harness.versions(), "sandbox": sandboxed}
    outcomes: list[Outcome] = []
    for outcome in harness.run(model, manager, requests, limit=options.limit, data_dir=options.data_dir, code=options.allow_code_exec):
        outcomes.append(outcome)
        report.write(folder, outcomes, facts, baselines)
    print(f"\n{report.table(outcomes, baselines)}\n\n{folder / 'report.md'}\n{folder / 'results.json'}")
    if all(outcome.not_run for outcome in outcomes):
        raise UserError("eval", "no task could run", "the table says why for each")
