"""A run folder and an evaluation that nobody trained, as files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.requests import Request
from minifoundation.evaluate.results import Outcome, folder_for
from tests.evaluate.made import FACTS

SPIKE = 70
SIZES = {"vocab_size": 256, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 64}
PARAMETERS = 256 * 64 + 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
SCORES = {
    "mmlu": 0.262,
    "mmlu_continuation": 0.301,
    "hellaswag": 0.431,
    "arc_easy": 0.566,
    "arc_challenge": 0.284,
    "winogrande": 0.519,
    "truthfulqa_mc2": 0.412,
    "piqa": 0.687,
    "lambada_openai": 0.398,
    "gsm8k": 0.014,
}


FINEWEB_EDU = {"hub": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT", "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"}


def write_run(
    folder: Path,
    *,
    rows: int = 120,
    ledger: bool = True,
    benchmark: str | None = None,
    corpora: Mapping[str, dict[str, Any]] | None = None,
    imported_from: str | None = None,
    before: int = 0,
    **progress: Any,
) -> Path:
    """Write config.yaml, metrics.csv with one spike and, with ``benchmark``, its scores at every 40th row, and final.pth.

    Args:
        corpora: by source, what the run read of in equal parts; FineWeb-Edu by default.
        before: tokens that an earlier phase had read.
        progress: of the checkpoint, beside what is usual.
    """
    corpora = corpora or {"fineweb-edu": FINEWEB_EDU}
    from minifoundation.checkpoint import Checkpoint, save_final
    from minifoundation.config import DataConfig, ModelConfig, RunConfig, TrainConfig, to_yaml
    from minifoundation.model.transformer import Transformer
    from minifoundation.train.metrics import COLUMNS

    model = ModelConfig.model_validate(SIZES)
    settings = RunConfig(
        out_dir=folder, model=model, data=DataConfig(source="fineweb-edu"), train=TrainConfig(tokens=1_200_000, seq_len=64)
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *([f"eval/{benchmark}"] if benchmark else [])])
        writer.writeheader()
        for i in range(rows):
            figures: dict[str, Any] = dict.fromkeys(COLUMNS)
            loss = 2.6 + 5 * math.exp(-i / 15) + 0.02 * math.sin(7 * i) + (1.5 if i == SPIKE else 0)
            figures |= {
                "step": 10 * (i + 1),
                "tokens": 10_000 * (i + 1),
                "loss": loss,
                "lr": 1e-3 * min(1, i / 10),
                "grad_norm": 0.5 + 3 / (i + 1),
            }
            figures |= {"tokens_per_second": 1000.0, "held_out_bits_per_byte": 1.1 + 1 / (i + 1) if i % 20 == 19 else None}
            figures |= {f"eval/{benchmark}": 0.25 + i / 1000 if i % 40 == 39 else None} if benchmark else {}
            writer.writerow(figures)
    transformer = Transformer(model)
    transformer.initialise(0)
    samples = 10_000 * rows // 64
    parts = {source: samples // len(corpora) for source in corpora}
    read = [_entry("pretrain", "other", {}, before // 64)] if before else []
    read += [_entry("pretrain", source, corpora[source], count) for source, count in parts.items()]
    progress = {"phase": "pretrain", "step": 10 * rows, "sample": sum(parts.values()), "imported_from": imported_from} | progress
    save_final(Checkpoint(settings, transformer.state_dict(), b"spm", progress, read if ledger else []), folder)
    return folder


def _entry(phase: str, source: str, corpus: dict[str, Any], samples: int) -> dict[str, Any]:
    entry = {"phase": phase, "source": source, "share": 1.0, "folder": "shards", "corpus": corpus, "tokenizer_sha256": "ab" * 32}
    return entry | {"first_shard": 0, "shards": 3, "shards_sha256": "cd" * 32, "samples": samples, "seq_len": 64, "epochs": None}


def write_evaluation(
    folder: Path,
    *,
    tokens: int = 1_200_000,
    shift: float = 0.0,
    name: str = "outputs/hf_export",
    imported_from: str | None = None,
    proof: str | None = None,
) -> Path:
    """Write results.json with most of the paper suite, a row that could not run, and items of ARC-Easy.

    Args:
        proof: content of the ``parity.json`` of the evaluated model, which is written beside.
    """
    made = []
    for label, score in SCORES.items():
        row = ROWS[label]
        outcome = Outcome(Request(row, row.shots), label, max(0.0, score + shift), 0.006, n=row.documents or 0, shots=row.shots or 0)
        outcome.measure, outcome.metric, outcome.requests = row.measure, f"{row.metric},{row.filter}", 4 * (row.documents or 0)
        made.append(outcome)
    made[4].truncated = 12
    made[3].items = [{"doc_hash": str(i), "score": float(i % 2), "task": "arc_easy", "doc_id": i, "target": 0} for i in range(100)]
    made.append(Outcome(Request(ROWS["humaneval"], 0), "humaneval", not_run="needs --allow_code_exec"))
    model = FACTS["model"] | {"path": name, "trained_tokens": tokens, "sha256": {"model.safetensors": "ef" * 32}, "parameters": PARAMETERS}
    if imported_from is not None:
        model |= {"trained_tokens": None, "imported_from": imported_from, "tokens_since_import": tokens}
    if proof is not None:
        folder.mkdir(parents=True)
        (folder.parent / "parity.json").write_text(proof)
        model["sha256"] = model["sha256"] | {"parity.json": hashlib.sha256(proof.encode()).hexdigest()}
    settings = {"limit": 0, "model_path": name, "tasks": "paper"}
    folder_for(folder, FACTS | {"model": model, "settings": settings}, []).write(made, complete=True)
    return folder


def write_contamination(path: Path) -> Path:
    """Write findings by which ten of the items of ARC-Easy are dirty."""
    dirty = [str(i) for i in range(0, 20, 2)]
    row = {"benchmark": "arc_easy", "items": 100, "short": {"13": 7, "8": 0}, "dirty": {"13": dirty, "8": dirty}}
    path.write_text(json.dumps({"sizes": [13, 8], "text": {"tokens": 1_200_000}, "benchmarks": [row], "not_read": []}))
    return path
