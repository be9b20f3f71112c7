"""The log-likelihood suite by eval and by lm-eval's own HFLM, in one run: seconds, and whether the answers are the same.

    python -m benchmarks.evaluation --data_dir MIRROR                      0.5B of random weights; the first 200 documents of each task
    python -m benchmarks.evaluation --data_dir MIRROR --model FOLDER       any model in Hugging Face form, or a .gguf file (needs gguf)
    python -m benchmarks.evaluation --quick                                a tiny one on the bundled documents

Speed does not depend on what weights hold; how often two computations choose alike does, so agreement is for a trained model. HFLM runs
with the best of its batch sizes, found beforehand on HellaSwag. Both take lm-eval's tasks, as loaded once, and are timed from there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.record import ROOT, finish
from minifoundation import config
from minifoundation.commands.native import network
from minifoundation.config import TokenizerConfig
from minifoundation.data.tokenizer import Tokenizer, train_tokenizer
from minifoundation.evaluate import harness, mirror
from minifoundation.evaluate.model import Loaded, Model, Source, default_device, from_folder
from minifoundation.evaluate.requests import read_tasks
from minifoundation.export.tokenizer import write_tokenizer
from minifoundation.model.transformer import Transformer

SUITE = "mmlu,mmlu_continuation,hellaswag,arc_easy,arc_challenge,arc_challenge_mcf,winogrande,truthfulqa_mc2,piqa,lambada_openai"
SUBJECTS = 57
BATCHES = (8, 16, 32, 64, 128)
SHORT = "arc_easy,hellaswag:0,piqa"
"""What is bundled with the examples."""


def texts(data_dir: Path) -> Iterator[str]:
    """Yield the text of a mirror, to train a tokenizer that cuts benchmarks about as one of that size would."""
    for path in mirror.files(data_dir):
        for row in mirror.read_file(path):
            yield " ".join(str(value) for value in row.values())[:4000]


def random_model(data_dir: Path, work: Path, *, quick: bool) -> Loaded:
    """Return the 0.5B model with random weights and a tokenizer of its vocabulary."""
    sizes = config.read_yaml(ROOT / "configs" / "model_0p5b.yaml")["model"]
    if quick:
        sizes |= {"n_layer": 2, "d_model": 64, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 1024, "original_seq_len": 1024}
    path = work / "tokenizer.model"
    train_tokenizer(texts(data_dir), TokenizerConfig(kind="bpe", vocab_size=1024 if quick else 32_768), path)
    tokenizer = Tokenizer.load(path)
    shape = config.ModelConfig.model_validate(sizes)
    write_tokenizer(tokenizer, work, max_seq_len=shape.max_seq_len)
    transformer = Transformer(shape)
    transformer.initialise(0)
    from transformers import AutoTokenizer

    model = network(shape, transformer.state_dict(), tokenizer.special, torch.float32)
    return Loaded(model, AutoTokenizer.from_pretrained(work), Source("random weights", work, {}))


def trained_model(path: Path) -> Loaded:
    """Return the model in a folder or a .gguf file, in float32 on the CPU."""
    if path.suffix != ".gguf":
        return from_folder(str(path), dtype="fp32", device="cpu")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return Loaded(model, AutoTokenizer.from_pretrained(path.parent, **options), Source(path.stem, path.parent, {}))


def plain(loaded: Loaded, rows: int) -> HFLM:
    """Return lm-eval's own model with batches of ``rows``."""
    return HFLM(pretrained=loaded.network, tokenizer=loaded.tokenizer, batch_size=rows, softmax_dtype="float32")


def ran(model: Any, tasks: Any, limit: int) -> tuple[float, list[tuple[list[float], float]]]:
    """Return the seconds that the tasks took, and of every document its log-likelihoods and its score."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(harness.SEED)  # else the second run would draw other examples
    started = time.perf_counter()
    samples = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=0)["samples"]
    seconds = time.perf_counter() - started
    found = []
    for of_task in samples.values():
        for sample in of_task:
            score = next(float(sample[name]) for name in ("acc_norm", "acc") if name in sample)
            found.append(([response[0][0] for response in sample["resps"]], score))
    return seconds, found


def agreement(ours: list[tuple[list[float], float]], theirs: list[tuple[list[float], float]]) -> tuple[float, float, int]:
    """Return the largest difference in nats, the share of documents with the same most likely choice, and their number."""
    largest, same = 0.0, 0
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        largest = max(largest, *(abs(a - b) for a, b in zip(mine, other, strict=True)))
        same += len(mine) == 1 or mine.index(max(mine)) == other.index(max(other))
    return largest, same / len(ours), len(ours)


def best_rows(loaded: Loaded, tasks: Any, limit: int, candidates: tuple[int, ...]) -> tuple[int, dict[int, float]]:
    """Return the batch size with which HFLM is fastest on ``tasks``, and the seconds of each that fits."""
    seconds: dict[int, float] = {}
    for rows in candidates:
        with suppress(torch.OutOfMemoryError):
            seconds[rows] = round(ran(plain(loaded, rows), tasks, limit)[0], 2)
    return min(seconds, key=lambda rows: seconds[rows]), seconds


def fitting(loaded: Loaded, rows: int, tasks: Any, limit: int) -> tuple[tuple[float, list[tuple[list[float], float]]], int]:
    """Return what ``ran`` does of HFLM with ``rows``, or with the next smaller ones whose logits fit; and the rows."""
    while True:
        try:
            return ran(plain(loaded, rows), tasks, limit), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        torch.cuda.empty_cache()


def main() -> None:
    """Time both, then compare what they answer in float32 and in bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "examples" / "benchmarks")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tasks", default=SUITE)
    parser.add_argument("--limit", type=int, default=200, help="documents of a task; of MMLU a tenth of it from each subject")
    parser.add_argument("--agree", type=int, default=40, help="the same for the comparison in float32")
    given = parser.parse_args()
    if given.quick:
        given.tasks, given.limit, given.agree = SHORT, 8, 4
    harness.quieten()
    device = default_device(None)
    requests = read_tasks(given.tasks)
    manager = harness.task_manager(requests)
    loaded_tasks = {request.label: harness.loaded_tasks(manager, request, data_dir=given.data_dir) for request in requests}

    def documents(label: str, limit: int) -> int:
        return max(1, limit // 10) if "mmlu" in label else limit

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # nothing encoded beforehand
        loaded = trained_model(given.model) if given.model else random_model(given.data_dir, work, quick=given.quick)
        agreed: dict[str, Any] = {}
        loaded.network.to(device)
        for label, tasks in loaded_tasks.items():
            limit = documents(label, given.agree)
            ours = ran(Model(loaded, rows=None), tasks, limit)[1]
            one = ran(Model(loaded, rows=1), tasks, limit)[1] if label in read_labels(SHORT) else ours
            nats, same, count = agreement(ours, ran(plain(loaded, 1), tasks, limit)[1])
            agreed[label] = {"largest_nats": nats, "same_choices": same, "documents": count, "batch_sizes_nats": agreement(ours, one)[0]}
            print(label, agreed[label], flush=True)
        if device != "cpu":
            loaded.network.to(torch.bfloat16)
        probe = next((label for label in loaded_tasks if label.startswith("hellaswag")), next(iter(loaded_tasks)))
        rows, probed = best_rows(loaded, loaded_tasks[probe], min(given.limit, 50), BATCHES if device != "cpu" else BATCHES[:2])
        print(f"HFLM on {probe} by rows: {probed}", flush=True)
        seconds: dict[str, Any] = {}
        for label, tasks in loaded_tasks.items():
            limit = documents(label, given.limit)
            model = Model(loaded, rows=None)
            with harness.templates_compiled_once():
                mine, ours = ran(model, tasks, limit)
            (theirs, others), of_task = fitting(loaded, rows, tasks, limit)
            with harness.templates_compiled_once():
                again = ran(model, tasks, limit)[0]
            _, same, count = agreement(ours, others)
            seconds[label] = {
                "eval": mine,
                "eval_encoded": again,
                "hflm": theirs,
                "hflm_rows": of_task,
                "documents": count,
                "same_choices": same,
            }
            print(label, seconds[label], flush=True)
    total = {name: round(sum(row[name] for row in seconds.values()), 2) for name in ("eval", "eval_encoded", "hflm")}
    counted = sum(row["documents"] for row in agreed.values())
    figures = {
        "model": loaded.source.name,
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "documents_of_a_task": given.limit,
        "seconds": total["eval"],
        "seconds_encoded_before": total["eval_encoded"],
        "seconds_hflm": total["hflm"],
        "hflm_rows": rows,
        "times_as_fast": round(total["hflm"] / total["eval"], 2),
        "fp32_largest_nats": max(row["largest_nats"] for row in agreed.values()),
        "fp32_same_choices": sum(row["same_choices"] * row["documents"] for row in agreed.values()) / counted,
        "fp32_documents": counted,
        "fp32_batch_sizes_nats": max(row["batch_sizes_nats"] for row in agreed.values()),
    }
    finish(
        "evaluation_trained" if given.model else "evaluation",
        figures,
        results={"agreement": agreed, "seconds": seconds, "hflm_by_rows": probed},
        quick=given.quick,
    )


def read_labels(tasks: str) -> set[str]:
    """Return the labels of a list of tasks."""
    return {request.label for request in read_tasks(tasks)}


if __name__ == "__main__":
    main()
