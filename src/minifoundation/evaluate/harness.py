"""Tasks of lm-eval on a model: the tasks, their data sets, one request at a time.

Written against lm-eval 0.4.13. Two traps of it shape this file: per-task settings in dict form load nothing or collapse a
group, so shots and data sets are set where a task is built; and ``limit=0`` is an error, so all is None.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import torch
import transformers
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks.ruler import common_utils as ruler
from tqdm import tqdm

from minifoundation.errors import UserError
from minifoundation.evaluate.mirror import first_line, read_dataset
from minifoundation.evaluate.model import Evaluated
from minifoundation.evaluate.protocols import OWN, ROWS
from minifoundation.evaluate.requests import Request, check_names
from minifoundation.evaluate.results import Outcome

SEED = 1234
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LM_EVAL_MODELS = ("lm_eval.models.huggingface", "lm_eval.models.vllm_causallms")
_TASKS = Path(lm_eval.tasks.__file__).parent


class Factory(TaskFactory):
    """Builds the tasks of one request: its shots, and data sets by ``read_dataset``.

    ``_load_full_config`` is private to lm-eval 0.4.13; tests/evaluate/test_harness.py holds it in place. The key
    ``fewshot_dataset_path`` of a task file names another data set whose ``fewshot_split`` gives the examples.
    """

    def __init__(self, data_dir: Path | None, shots: int | None, meta: dict[str, Any]) -> None:
        super().__init__(meta=meta)
        self.data_dir = data_dir
        self.shots = shots
        self.needed: list[tuple[str, str | None, set[str]]] = []
        """Each data set that was read: path, configuration, and the splits that count."""

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if entry.kind is not Kind.TASK:
            return config
        config["num_fewshot"] = shots = (config.get("num_fewshot") or 0) if self.shots is None else self.shots
        examples_from = config.pop("fewshot_dataset_path", None)
        if shots == 0:  # else lm-eval reads the split of examples all the same
            config |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
        elif examples_from:
            examples = read_dataset(self.data_dir, examples_from, config["dataset_name"])[config["fewshot_split"]].to_list()
            self.needed.append((examples_from, config["dataset_name"], {config["fewshot_split"]}))
            config |= {"fewshot_split": None, "fewshot_config": config["fewshot_config"] | {"samples": examples}}
        if config.get("dataset_path") and not config.get("custom_dataset"):
            kinds = ("training_split", "validation_split", "test_split", "fewshot_split")
            splits = {str(config[kind]) for kind in kinds if config.get(kind)}
            self.needed.append((config["dataset_path"], config.get("dataset_name"), splits))
            read = functools.partial(
                _dataset, self.data_dir, config["dataset_path"], config.get("dataset_name"), config.pop("dataset_kwargs", None)
            )
            config["custom_dataset"] = read
        if process := config.get("process_docs"):
            config["process_docs"] = _remembered(process)
        if "max_seq_lengths" in self._meta:
            config["process_docs"] = _in_turn
        return config


def _remembered(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``process`` of a data set, which lm-eval asks for three times in an evaluation, done once for each."""
    found: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(process)
    def remembered(data: Any) -> Any:
        if id(data) not in found:
            found[id(data)] = data, process(data)  # the data too, so that its id stays its own
        return found[id(data)][1]

    return remembered


def _in_turn(data: Any) -> Any:
    """Return the documents of a task with one score a length, one of each length after the other: a limit leaves some of all."""
    seen: Counter[int] = Counter()
    turns = []
    for place, length in enumerate(data["max_length"]):
        turns.append((seen[length], place))
        seen[length] += 1
    return data.select([place for _, place in sorted(turns)])


class _Tokenizers:
    """``AutoTokenizer`` for the tasks that generate their data by it: they would run the Python code that lies in a model's folder."""

    @staticmethod
    def from_pretrained(name: str, **_options: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


ruler.AutoTokenizer = _Tokenizers


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Have tasks draw what they draw (needles, the order of choices) as by lm-eval's own command: the same each time, in every process."""
    python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


def _dataset(data_dir: Path | None, path: str, name: str | None, options: dict[str, Any] | None, **_metadata: Any) -> Any:
    return read_dataset(data_dir, path, name, {key: value for key, value in (options or {}).items() if key != "trust_remote_code"})


def task_manager(requests: Sequence[Request]) -> TaskManager:
    """Return lm-eval's index of the tasks that ``requests`` need: a few folders, or all 14,683 names (8 s) for one without a row here.

    Raises:
        UserError: a name that is no task, with the nearest one.
    """
    folders = sorted({folder for request in requests for folder in request.row.folders} - {OWN})
    own = Path(__file__).parent / "tasks"
    if all(request.known for request in requests):
        return TaskManager(include_defaults=False, include_path=[*(_TASKS / folder for folder in folders), own])
    manager = TaskManager(include_path=own)
    check_names(requests, manager.all_tasks)
    return manager


def run(
    model: Evaluated, manager: TaskManager, requests: Sequence[Request], *, limit: int, data_dir: Path | None, code: bool
) -> Iterator[list[Outcome]]:
    """Yield what each request comes to, in order; one that cannot run says why and the others go on.

    Args:
        limit: documents of each task, 0 means all; a request's own limit counts where it is smaller.
        code: whether programs written by the model may be run.
    """
    for request in requests:
        start = time.monotonic()
        try:
            outcomes = _run_one(model, manager, request, limit=limit, data_dir=data_dir, code=code)
        except UserError as error:
            outcomes = [Outcome(request, request.label, not_run=str(error))]
        except Exception as error:  # hours of other results must not be lost to one task
            outcomes = [Outcome(request, request.label, not_run=first_line(error), raw={"traceback": traceback.format_exc()})]
        for outcome in outcomes:
            outcome.seconds = round(time.monotonic() - start, 1)
        yield outcomes


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Have lm-eval compile each of its prompt templates once.

    It compiles a template anew for every document and every example that it fills in, which is nine tenths of the time that building
    prompts takes: minutes for MMLU with five shots. The prompts are the same.
    """
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the method of its class shows again


@contextlib.contextmanager
def bars_of(label: str, *, silent: bool) -> Iterator[None]:
    """Have lm-eval's progress bars begin with the name of the benchmark, which they do not know, and go when they are full.

    Args:
        silent: show none.
    """
    modules: list[Any] = [sys.modules[name] for name in ("lm_eval.api.task", *LM_EVAL_MODELS) if name in sys.modules]

    def bar(iterable: Any = None, desc: str = "prompts", **options: Any) -> Any:
        return tqdm(iterable, f"{label}: {desc}", leave=False, **(options | {"disable": silent or options.get("disable", False)}))

    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = bar
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.tqdm = original


def loaded_tasks(manager: TaskManager, request: Request, *, data_dir: Path | None, meta: dict[str, Any] | None = None) -> Any:
    """Return lm-eval's tasks of a request with their data, as its evaluator takes them, and by name under the key ``tasks``.

    Raises:
        UserError: its data cannot be had, or is of another form.
    """
    manager._factory = Factory(data_dir, request.shots, meta or {})
    try:
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet), seeded():
            loaded = manager.load(request.row.task_names)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(request.label, f"needs a package ({first_line(error)})", "install it") from error
    except Exception as error:  # what a task's own functions make of documents of another form
        where = f"the files in {data_dir}" if data_dir else "what the hub holds"
        problem = f"{where} are not what lm-eval's task reads ({first_line(error)})"
        raise UserError(request.label, problem, "compare their columns with those of the data set") from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    return loaded


def _run_one(model: Evaluated, manager: TaskManager, request: Request, *, limit: int, data_dir: Path | None, code: bool) -> list[Outcome]:
    row = request.row
    if row.runs_code and not code:
        return [Outcome(request, request.label, not_run="needs --allow_code_exec")]
    lengths = [length for length in LENGTHS if length <= model.max_length]
    if row.lengths and not lengths:
        raise UserError(row.name, f"needs a context of {LENGTHS[0]}, the model reads {model.max_length}", "extend it with longft")
    meta = {"tokenizer": str(model.source.folder), "max_seq_lengths": lengths} if row.lengths else {}
    loaded = model.together(lambda: loaded_tasks(manager, request, data_dir=data_dir, meta=meta))
    tasks = loaded["tasks"]
    if not row.runs_code and any(getattr(task, "UNSAFE_CODE", False) or task.config.unsafe_code for task in tasks.values()):
        raise UserError(row.name, "would run programs outside the sandbox", "use humaneval or mbpp")
    if row.metric is not None and not any(row.metric in task.aggregation() for task in tasks.values()):
        known = sorted({name for task in tasks.values() for name in task.aggregation()})
        raise UserError(request.label, f"has no metric {row.metric}", f"choose from {', '.join(known)}")
    if not request.known:
        in_all = set.intersection(*(set(task.aggregation()) for task in tasks.values()))
        if not in_all or (row.metric is not None and row.metric not in in_all):
            lacks = f"not all of its tasks have {row.metric}" if row.metric else "its tasks have no metric in common"
            raise UserError(request.label, lacks, f"name them one by one: {', '.join(tasks)}")
    if row.documents is None:  # of a task without a row here: what it has is what its data set has
        row = replace(row, documents=sum(len(task.eval_docs) for task in tasks.values()))
        request = replace(request, row=row)
    documents = min(filter(None, (limit, request.limit)), default=None)
    model.truncated, model.label = 0, request.label
    with (
        Path(os.devnull).open("w") as quiet,
        contextlib.redirect_stdout(quiet),
        templates_compiled_once(),
        bars_of(request.label, silent=model.silent),
        seeded(),
    ):
        taken = documents and documents * max(1, len(lengths) if row.lengths else 1)
        results = lm_eval.evaluate(model, loaded, limit=taken, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=code)
    samples = results.pop("samples")
    shots = max(task.config.num_fewshot for task in tasks.values())
    wanted = [(f"{request.label}@{length}", str(length)) for length in lengths] if row.lengths else [(request.label, row.metric)]
    outcomes = []
    for label, metric in wanted:
        outcome = Outcome(request, label, shots=shots, truncated=model.truncated, raw=results, samples=samples)
        outcome.requests = sum(len(task.instances) for task in tasks.values())
        if _score(outcome, metric):
            outcomes.append(outcome)
    if not outcomes:
        raise UserError(request.label, "no document was scored", "check its data")
    return outcomes


def _score(outcome: Outcome, metric: str | None) -> bool:
    """Fill in the headline and the items of ``outcome`` from its samples, and return whether there is a headline."""
    row, results, samples = outcome.request.row, outcome.raw["results"], outcome.samples
    tasks = list(samples)
    in_all = [key for key in results[tasks[0]] if all(key in results[task] for task in tasks)]
    name, rule = (str(metric), row.filter) if outcome.request.known else _first_metric(in_all, metric)
    key = f"{name},{rule}"
    scores, errors, counts, shares = [], [], [], []
    for task in tasks:
        documents = [sample for sample in samples[task] if sample["filter"] == rule]
        documents = [sample for sample in documents if name in sample and not (row.lengths and sample[name] == -1.0)]
        if key not in results[task] or not documents:
            continue
        values = [sample[name] for sample in documents]
        scores.append(float(results[task][key]))
        counts.append(len(values))
        outcome.items += [_item(task, sample, name) for sample in documents]
        # only where the metric is a mean over documents does their spread give its standard error
        mean = all(isinstance(value, int | float) for value in values) and math.isclose(fmean(values), scores[-1], abs_tol=1e-9)
        errors.append(stdev(values) / math.sqrt(len(values)) if mean and len(values) > 1 else math.nan)
        shares.append(mean and all(0 <= value <= 1 for value in values))
    if not scores:
        return False
    weights = [1] * len(scores) if row.aggregate == "macro" else counts
    error = math.sqrt(sum((weight * each) ** 2 for weight, each in zip(weights, errors, strict=True))) / sum(weights)
    outcome.score = sum(weight * score for weight, score in zip(weights, scores, strict=True)) / sum(weights)
    outcome.stderr = None if math.isnan(error) else error
    outcome.n = sum(counts)
    outcome.metric = key
    outcome.measure = row.measure if outcome.request.known else f"lm-eval's {name}"
    outcome.is_share = (outcome.request.known and name == ROWS[row.name].metric) or all(shares)
    outcome.measure += "" if outcome.is_share else " (not in percent)"
    outcome.also = {other: float(results[task][f"{other},none"]) for other in row.also for task in tasks}
    return True


def _item(task: str, sample: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a document as it was scored: log-likelihoods of its choices, or what was written and what was read out of it."""
    answers = [response[0] for response in sample["resps"]]
    item = {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "score": sample[metric],
        "target": sample["target"],
    }
    if all(isinstance(answer, tuple | list) for answer in answers):
        return item | {"log_likelihoods": [answer[0] for answer in answers]}
    return item | {"written": answers[0], "answer": sample["filtered_resps"][0]}


def _first_metric(keys: Sequence[str], asked: str | None) -> tuple[str, str]:
    """Return metric and filter of a task without a row here: the one asked for, else acc_norm where there is one, else its first."""
    keys = [key for key in keys if "," in key and "_stderr," not in key]
    usual = next((key for key in keys if key.startswith("acc_norm,")), keys[0])
    name, rule = next((key for key in keys if key.startswith(f"{asked},")), f"{asked},none" if asked else usual).split(",", 1)
    return name, rule


def quieten() -> None:
    """Silence the libraries' log lines and the bars of data set processing; lm-eval's own bars stay."""
    for name in ("lm_eval", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def versions() -> dict[str, str]:
    """Return the versions that decide a score."""
    return {module.__name__: module.__version__ for module in (lm_eval, transformers, torch, datasets)}
