"""``eval-data``: the data of benchmarks in a mirror folder, pulled from the hub and checked by its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minifoundation.config import CheckOptions, PullOptions
from minifoundation.errors import UserError
from minifoundation.evaluate import mirror
from minifoundation.evaluate.requests import Request, read_tasks
from minifoundation.wording import counted


def pull(options: PullOptions) -> None:
    """Write the splits that the tasks read to ``options.data_dir``, each file whole or not at all, then the manifest.

    Raises:
        UserError: a data set cannot be had; those before it are there.
    """
    written: dict[tuple[str, str | None, str], Path] = {}
    failed: list[str] = []
    for request, needed in _needed(options.tasks, None, failed):
        for path, name, splits in tqdm(needed, desc=request.label, unit="data set", leave=False):
            data = None
            for split in sorted(splits):
                if (path, name, split) in written:
                    continue
                data = mirror.read_dataset(None, path, name) if data is None else data
                file = options.data_dir / path / (name or "default") / f"{split}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                data[split].to_parquet(part)
                part.replace(file)
                written[path, name, split] = file
    if written:
        sealed = mirror.seal(options.data_dir, list(written.values()))
        print(f"{options.data_dir}: {counted(len(written), 'file')} written, {sealed} in {mirror.MANIFEST}")
    if failed:
        without = f"{counted(len(failed), 'task')} without data: {failed[0]}"
        raise UserError("eval-data pull", without, "fix it and run the same command again")


def check(options: CheckOptions) -> None:
    """Print what each task finds in the mirror, after its files have been compared with the manifest.

    Raises:
        UserError: a file is missing, changed or foreign, or a task has no data.
    """
    data_dir = options.data_dir
    if not data_dir.is_dir():
        raise UserError("--data_dir", f"{data_dir}: no such folder", "make one with eval-data pull")
    if options.seal:
        print(f"{data_dir}: {counted(mirror.seal(data_dir), 'file')} in {mirror.MANIFEST}")
    hashes = mirror.read_manifest(data_dir)
    if hashes is None:
        raise UserError(str(data_dir), f"has no {mirror.MANIFEST}", "write one with --seal if the files are right")
    wrong = mirror.faults(data_dir, hashes)
    for line in wrong:
        print(line)
    failed: list[str] = []
    for request, _ in _needed(options.tasks, data_dir, failed):
        print(f"{request.label}: has its data")
    for line in failed:
        print(line)
    if wrong:
        raise UserError(str(data_dir), f"{counted(len(wrong), 'file')} not as in {mirror.MANIFEST}, the first {wrong[0]}", mirror.PULL)
    if failed:
        without = f"{counted(len(failed), 'task')} without data"
        raise UserError(str(data_dir), without, "pull it with eval-data pull, or name fewer with --tasks")
    print(f"{data_dir}: {counted(len(hashes), 'file')} as in {mirror.MANIFEST}")


def _needed(tasks: str, data_dir: Path | None, failed: list[str]) -> Iterator[tuple[Request, list[tuple[str, str | None, set[str]]]]]:
    """Yield each request with the data sets it reads; one whose data cannot be read adds a line to ``failed`` instead."""
    from minifoundation.evaluate import harness

    harness.quieten()
    requests = read_tasks(tasks)
    manager: Any = harness.task_manager(requests)
    for request in requests:
        if request.row.lengths:  # generates its own
            continue
        try:
            harness.loaded_tasks(manager, request, data_dir=data_dir)
        except UserError as error:
            failed.append(f"{request.label}: {error}")
            continue
        yield request, manager._factory.needed
