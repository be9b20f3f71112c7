"""Tasks of lm-eval on a folder in Hugging Face form: the model, the data sets, one request at a time.

Written against lm-eval 0.4.13. Two traps of it shape this file: per-task settings in dict form load nothing or collapse a
group, so shots and data sets are set where a task is built; and ``limit=0`` is an error, so all is None.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from minifoundation.errors import UserError
from minifoundation.evaluate.mirror import first_line, go_offline_unless_reachable, read_dataset
from minifoundation.evaluate.protocols import OWN, Outcome, Request, check_names

SEED = 1234
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
_TASKS = Path(lm_eval.tasks.__file__).parent


class Model(HFLM):
    """lm-eval's Hugging Face model with batches of bounded size, a float32 softmax and a count of truncated requests.

    Args:
        rows: rows in a batch; None fits them to the free memory.
    """

    def __init__(self, folder: Path, *, dtype: str, device: str, rows: int | None) -> None:
        if dtype == "auto" and device == "cpu":  # bf16 takes five times as long there
            dtype = "fp32"
        super().__init__(pretrained=str(folder), dtype=DTYPES[dtype], device=device, batch_size="auto", softmax_dtype="float32")
        self.fixed_rows = rows
        self.batch_tokens = _batch_tokens(self.device, self.config.get_text_config().vocab_size)
        self.truncated = 0
        self._longest = self.max_length
        self._batch = (0, 0)

    def _rows(self, tokens: int) -> int:
        return self.fixed_rows or max(1, self.batch_tokens // tokens)

    def _batch_scheduler(self, pos: int, requests: Sequence[Any]) -> int:
        """Return the size of the batch that holds request ``pos``, by the length of its first and longest one.

        It must not change within a batch: lm-eval closes a batch only when its length equals this number.
        """
        first, size = self._batch
        if pos == 0 or pos >= first + size:
            _, context, continuation = requests[pos]
            self._batch = pos, self._rows(len(context) + len(continuation))
        return self._batch[1]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        return self._rows(self._longest)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        self.truncated += sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        prompts = [len(self.tok_encode(request.args[0])) for request in requests]
        room = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
        if max(room) >= self.max_length:
            raise UserError("context", f"{max(room)} tokens are generated, the model reads {self.max_length}", "extend it with longft")
        self.truncated += sum(prompt > self.max_length - new for prompt, new in zip(prompts, room, strict=True))
        # generation keeps the logits of one position, so more rows fit than where every position is scored
        self._longest = -(-min(self.max_length, max(map(sum, zip(prompts, room, strict=True)))) // 8)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model: sizes, dtype, and the hash of every file that decides its answers."""
        folder = Path(self.pretrained)
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".json", ".model") and path.is_file()]
        return {
            "path": str(folder),
            "architecture": self.model.config.architectures,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype),
            "device": str(self.device),
            "max_length": self.max_length,
            "bos": self.tok_encode("a")[:1] == [self.tokenizer.bos_token_id],
            "batch_tokens": self.batch_tokens,
            "batch_rows": self.fixed_rows,
            "sha256": {path.name: _sha256(path) for path in files},
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batch_tokens(device: torch.device, vocab_size: int) -> int:
    """Return how many tokens a batch may have, so that half of the free memory holds its logits.

    With their float32 log-softmax they take about 16 bytes a token and entry of the vocabulary.
    """
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 65_536
    else:
        free, most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), 8_192
    return min(most, free // 2 // (16 * vocab_size))


def load_model(path: str, *, dtype: str, device: str | None, rows: int | None) -> Model:
    """Return the model in folder ``path``, or on the hub under that name.

    Raises:
        UserError: no model there, or one that transformers cannot load.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _downloaded(path)
    if not (folder / "config.json").is_file():
        raise UserError("--model_path", f"{path} holds no config.json", "give a folder written by export_hf or in the same form")
    try:
        return Model(folder, dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), rows=rows)
    except Exception as error:  # what a bad file raises is as varied as the libraries that read it
        problem = f"{path} does not load ({first_line(error)})"
        raise UserError("--model_path", problem, "check that AutoModelForCausalLM loads it") from error


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    remedy = "write one with export_hf, or give the hub name of a model as org/name"
    if name.count("/") != 1 or name.startswith((".", "/", "outputs/")):
        raise UserError("--model_path", f"{name}: no such folder", remedy)
    go_offline_unless_reachable()
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError):
        raise UserError("--model_path", f"{name}: no such folder, and not to be had from the hub", remedy) from None


class Factory(TaskFactory):
    """Builds the tasks of one request: its shots, and data sets by ``read_dataset``.

    ``_load_full_config`` is private to lm-eval 0.4.13; tests/evaluate/test_harness.py holds it in place. The key
    ``fewshot_dataset_path`` of a task file names another data set whose ``fewshot_split`` gives the examples.
    """

    def __init__(self, data_dir: Path | None, shots: int | None, meta: dict[str, Any]) -> None:
        super().__init__(meta=meta)
        self.data_dir = data_dir
        self.shots = shots

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
            config |= {"fewshot_split": None, "fewshot_config": config["fewshot_config"] | {"samples": examples}}
        if config.get("dataset_path") and not config.get("custom_dataset"):
            read = partial(_dataset, self.data_dir, config["dataset_path"], config.get("dataset_name"), config.pop("dataset_kwargs", None))
            config["custom_dataset"] = read
        return config


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
    model: Model, manager: TaskManager, requests: Sequence[Request], *, limit: int, data_dir: Path | None, code: bool
) -> Iterator[Outcome]:
    """Yield what each request comes to, in order; one that cannot run says why and the others go on.

    Args:
        limit: documents of each task, 0 means all.
        code: whether programs written by the model may be run.
    """
    for place, request in enumerate(requests, 1):
        print(f"[{place}/{len(requests)}] {request.label}", flush=True)
        start = time.monotonic()
        try:
            outcomes = _run_one(model, manager, request, limit=limit, data_dir=data_dir, code=code)
        except KeyboardInterrupt:
            raise
        except UserError as error:
            outcomes = [Outcome(request, request.label, not_run=str(error))]
        except Exception as error:  # hours of other results must not be lost to one task
            outcomes = [Outcome(request, request.label, not_run=first_line(error), raw={"traceback": traceback.format_exc()})]
        for outcome in outcomes:
            outcome.seconds = round(time.monotonic() - start, 1)
            yield outcome


def _run_one(model: Model, manager: TaskManager, request: Request, *, limit: int, data_dir: Path | None, code: bool) -> list[Outcome]:
    row = request.row
    if row.runs_code and not code:
        return [Outcome(request, request.label, not_run="needs --allow_code_exec")]
    lengths = [length for length in LENGTHS if length <= model.max_length]
    if row.lengths and not lengths:
        raise UserError(row.name, f"needs a context of {LENGTHS[0]}, the model reads {model.max_length}", "extend it with longft")
    meta = {"tokenizer": str(model.pretrained), "max_seq_lengths": lengths} if row.lengths else {}
    manager._factory = Factory(data_dir, request.shots, meta)
    with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
        loaded = manager.load(row.task_names)
        tasks = loaded["tasks"]
        if not row.runs_code and any(getattr(task, "UNSAFE_CODE", False) or task.config.unsafe_code for task in tasks.values()):
            raise UserError(row.name, "would run programs outside the sandbox", "use humaneval or mbpp")
        for task in tasks.values():
            task.set_fewshot_seed(SEED)
        model.truncated = 0
        results = lm_eval.evaluate(model, loaded, limit=limit or None, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=code)
    samples = results.pop("samples")
    shots = max(task.config.num_fewshot for task in tasks.values())
    wanted = [(f"{request.label}@{length}", str(length)) for length in lengths] if row.lengths else [(request.label, row.metric)]
    outcomes = []
    for label, metric in wanted:
        outcome = Outcome(request, label, shots=shots, truncated=model.truncated, raw=results, samples=samples)
        outcome.requests = sum(len(task.instances) for task in tasks.values())
        if _score(outcome, metric):
            outcomes.append(outcome)
    return outcomes


def _score(outcome: Outcome, metric: str | None) -> bool:
    """Fill in the headline of ``outcome`` from its samples, and return whether there is one."""
    row, results = outcome.request.row, outcome.raw["results"]
    tasks = list(outcome.samples)
    name, rule = (metric, row.filter) if outcome.request.known else _first_metric(results[tasks[0]])
    key = f"{name},{rule}"
    scores, errors, counts = [], [], []
    for task in tasks:
        documents = [sample for sample in outcome.samples[task] if sample["filter"] == rule]
        values = [sample[name] for sample in documents if name in sample and not (row.lengths and sample[name] == -1.0)]
        if key not in results[task] or not values:
            continue
        scores.append(float(results[task][key]))
        counts.append(len(values))
        # only where the metric is a mean over documents does their spread give its standard error
        mean = all(isinstance(value, int | float) for value in values) and math.isclose(fmean(values), scores[-1], abs_tol=1e-9)
        errors.append(stdev(values) / math.sqrt(len(values)) if mean and len(values) > 1 else math.nan)
    if not scores:
        return False
    weights = [1 / len(scores)] * len(scores) if row.aggregate == "macro" else [count / sum(counts) for count in counts]
    error = math.sqrt(sum((weight * each) ** 2 for weight, each in zip(weights, errors, strict=True)))
    outcome.score = sum(weight * score for weight, score in zip(weights, scores, strict=True))
    outcome.stderr = None if math.isnan(error) else error
    outcome.n = sum(counts)
    outcome.metric = key
    outcome.measure = row.measure if outcome.request.known else f"lm-eval's {name}"
    outcome.also = {other: float(results[task][f"{other},none"]) for other in row.also for task in tasks}
    return True


def _first_metric(results: dict[str, Any]) -> tuple[str, str]:
    """Return metric and filter of a task without a row here: acc_norm where there is one, else its first."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    name, rule = next((key for key in keys if key.startswith("acc_norm,")), keys[0]).split(",", 1)
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
