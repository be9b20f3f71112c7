"""Text to benchmarked Hugging Face folder in one go, through the command line: pretrain, longft, export_hf, eval, generate.

    python -m benchmarks.first_run --corpus wiki/ --data_dir benchmarks_mirror/     the 0.5B model on one 80 GB GPU
    python -m benchmarks.first_run --quick                                          a tiny model on any device

Keeps the figures of every phase and plots of the curves beside them in docs/data.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, finish

TINY = [
    "--model.d_model",
    "32",
    "--model.n_layer",
    "2",
    "--model.n_head",
    "4",
    "--model.n_kv_head",
    "2",
    "--model.d_ff",
    "64",
    "--model.original_seq_len",
    "64",
    "--seq_len",
    "64",
    "--tokenizer.vocab_size",
    "600",
    "--data.max_document_bytes",
    "1024",
    "--data.shard_tokens",
    "8192",
    "--data.held_out",
    "0.1",
    "--train.eval_every",
    "10",
]
PROMPTS = ("The capital of France is", "The history of the city begins in", "In physics, energy is")


def stage(name: str, options: list[str], log: Path) -> dict[str, Any]:
    """Run one command to its end, its output kept in ``log`` and shown, and return its line and time."""
    command = ["python", "-m", "src.cli", name, *options]
    print("$ " + " ".join(command), flush=True)
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as out, log.with_suffix(".err").open("w", encoding="utf-8") as err:
        done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=out, stderr=err, check=False)
    for file in (log.with_suffix(".err"), log):
        print("\n".join(file.read_text(encoding="utf-8").replace("\r", "\n").splitlines()[-12:]), flush=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with code {done.returncode}")
    return {"command": " ".join(command), "seconds": round(time.perf_counter() - began, 1)}


def phase(folder: Path) -> dict[str, Any]:
    """Return what metrics.csv of one phase says."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steady = rows[len(rows) // 10 + 1 :] or rows
    return {
        "steps": int(rows[-1]["step"]),
        "tokens": int(rows[-1]["tokens"]),
        "last_loss": float(rows[-1]["loss"]),
        "held_out_bits_per_byte": [[int(r["step"]), float(r["held_out_bits_per_byte"])] for r in rows if r["held_out_bits_per_byte"]],
        "tokens_per_second": quartiles([float(r["tokens_per_second"]) for r in steady]),
        "mfu": quartiles([float(r["mfu"]) for r in steady if r["mfu"]]),
        "peak_memory_gib": max(float(r["peak_memory_gib"]) for r in rows),
        "data_wait_share": sum(float(r["data_wait_seconds"]) for r in steady)
        / sum(int(rows[0]["tokens"]) / float(r["tokens_per_second"]) for r in steady),
        "loss": [[int(r["step"]), float(r["loss"])] for r in rows],
    }


def quartiles(values: list[float]) -> list[float] | None:
    """Return the lower quartile, median and upper quartile."""
    return [float(f"{q:.5g}") for q in statistics.quantiles(values, n=4)] if len(values) > 1 else None


def main() -> None:
    """Run every command in turn and keep what it said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--corpus", default=str(ROOT / "examples" / "shakespeare.txt"))
    parser.add_argument("--tokenizer")
    parser.add_argument("--data_dir", default=str(ROOT / "examples" / "benchmarks"))
    parser.add_argument("--tasks", default="lambada_openai,arc_easy")
    parser.add_argument("--tokens", type=int, default=22_000_000)
    parser.add_argument("--long_tokens", type=int, default=2_621_440)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "first_run")
    options = parser.parse_args()
    work = options.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shared = ["--data", options.corpus, "--data.shards_dir", str(work / "shards")]
    if options.quick:
        pre = [*TINY, *shared, "--tokens", "20000", "--batch_size", "4", "--lr", "1e-2"]
        long = [*shared, "--tokens", "4096", "--seq_len", "256", "--lr", "1e-3"]
        tasks = "arc_easy"
    else:
        pre = ["--config", "configs/model_0p5b.yaml", *shared, "--tokens", str(options.tokens), "--batch_size", "8", "--grad_accum", "2"]
        pre += [
            "--amp",
            "--bf16",
            "--compile",
            "--train.loss_chunk",
            "8192",
            "--train.eval_every",
            "50",
            "--train.save_every",
            "100000",
            "--data.held_out",
            "0.01",
        ]
        pre += ["--tokenizer", options.tokenizer] if options.tokenizer else []
        long = [*shared, "--tokens", str(options.long_tokens), "--seq_len", "16384", "--batch_size", "1", "--grad_accum", "4"]
        long += ["--amp", "--bf16", "--compile", "--train.eval_every", "10", "--train.save_every", "100000"]
        tasks = options.tasks
    pretrain, longft, export = work / "pretrain", work / "longft", work / "hf_export"
    results: dict[str, Any] = {}
    results["pretrain"] = stage("pretrain", [*pre, "--out_dir", str(pretrain)], work / "pretrain.log") | phase(pretrain)
    results["longft"] = stage(
        "longft", ["--ckpt_in", str(pretrain / "final.pth"), *long, "--out_dir", str(longft)], work / "longft.log"
    ) | phase(longft)
    results["export_hf"] = stage("export_hf", ["--ckpt", str(longft / "final.pth"), "--out_dir", str(export)], work / "export.log")
    results["export_hf"]["parity"] = json.loads((export / "parity.json").read_text(encoding="utf-8"))
    limit = ["--limit", "20" if options.quick else "0"]
    results["eval"] = stage(
        "eval", ["--model_path", str(export), "--tasks", tasks, *limit, "--data_dir", options.data_dir], work / "eval.log"
    )
    results["eval"]["table"] = (export / "eval" / "report.md").read_text(encoding="utf-8")
    for prompt in PROMPTS[: 1 if options.quick else None]:
        words = ["--model", str(export), "--prompt", prompt, "--max_new_tokens", "60"]
        row = stage("generate", words, work / "generate.log")
        results.setdefault("generate", []).append(row | {"text": (work / "generate.log").read_text(encoding="utf-8")})
    if not options.quick:
        plot(results, ROOT / "docs" / "data" / "first_run.png")
    figures = {
        "pretrain_bits_per_byte": results["pretrain"]["held_out_bits_per_byte"][-1][1],
        "longft_bits_per_byte": results["longft"]["held_out_bits_per_byte"][-1][1],
        "pretrain_tokens_per_second": results["pretrain"]["tokens_per_second"],
        "pretrain_mfu": results["pretrain"]["mfu"],
        "seconds": {name: row["seconds"] for name, row in results.items() if isinstance(row, dict)},
    }
    finish("first_run", figures, results=results, quick=options.quick)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss and the held-out bits per byte of both phases over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    seen = 0.0
    for number, name in enumerate(("pretrain", "longft")):
        row = results[name]
        per_step = row["tokens"] / row["steps"] / 1e6
        above.plot(
            [seen + s * per_step for s, _ in row["loss"]], [v for _, v in row["loss"]], color=f"C{number}", label=name, linewidth=0.8
        )
        below.plot(
            [seen + s * per_step for s, _ in row["held_out_bits_per_byte"]],
            [v for _, v in row["held_out_bits_per_byte"]],
            "o-",
            color=f"C{number}",
        )
        seen += row["tokens"] / 1e6
    above.set(ylabel="training loss, nats a token")
    below.set(ylabel="held-out bits per byte", xlabel="million tokens")
    above.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
