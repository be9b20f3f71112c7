"""Training in 8 bits against bf16: curves of several seeds on real text, and the error of gradients on the weights of a trained model.

    python -m benchmarks.fp8 --corpus wiki --tokenizer spm.model               one GPU: three seeds of each, 60M tokens, about seven minutes
    python -m benchmarks.fp8 --corpus wiki --tokenizer spm.model --seeds 2 --keep   one seed, put beside what is kept already
    python -m benchmarks.fp8 --gradients folder --corpus wiki                  any machine: a Llama in Hugging Face's layout, on the corpus
    python -m benchmarks.fp8 --quick                                           tiny, on any device

The model has 54M parameters, and a corpus of fewer than 60M tokens is read several times. Held-out losses at the end are those of the
trained float32 weights computed in bf16 by both, so that they tell of the training alone.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import ROOT, finish, with_kept
from benchmarks.small_model import parser_of, settings
from minifoundation import runtime
from minifoundation.checkpoint import load_checkpoint
from minifoundation.config import ModelConfig, RunConfig
from minifoundation.distributed import World
from minifoundation.export.weights import from_hf
from minifoundation.model.fp8 import SETTLING
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.corpus import training_data
from minifoundation.train.kernels import Kernels, transformer_for
from minifoundation.train.plan import plan
from minifoundation.train.run import run
from minifoundation.train.step import held_out_loss

TOKENS_A_STEP = 65_536
PRECISIONS = ("bf16", "fp8")


def trained(config: RunConfig) -> dict[str, Any]:
    """Train and return the curve, the held-out loss of the weights in bf16, and what was cut off."""
    shutil.rmtree(config.out_dir, ignore_errors=True)
    path = run(config, resume=None, dry_run=False)
    assert path is not None
    with (config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cut_off = [float(row["cut_off"] or 0) for row in rows]
    return {
        "loss": [round(float(row["loss"]), 4) for row in rows],
        "held_out_bits_per_byte": {row["step"]: float(row["held_out_bits_per_byte"]) for row in rows if row["held_out_bits_per_byte"]},
        "held_out_nats_in_bf16": round(held_out_in_bf16(config, path), 5),
        "steps_with_cut_off": sum(cut > 0 for cut in cut_off),
        "most_cut_off": max(cut_off),
        "skipped": sum(bool(row["skipped"]) for row in rows),
        "tokens_per_second": round(statistics.median(float(row["tokens_per_second"]) for row in rows)),
        "seconds": round(sum(int(rows[0]["tokens"]) / float(row["tokens_per_second"]) for row in rows), 1),
    }


def held_out_in_bf16(config: RunConfig, path: Path) -> float:
    """Return the held-out loss of a checkpoint, nats a token, computed in bf16."""
    machine = runtime.machine()
    half = config.replaced(train={"precision": "bf16"})
    checkpoint = load_checkpoint(path)
    half = half.model_copy(update={"model": checkpoint.config.model})
    data = training_data(half, plan(half, 1), World(), lambda _: None, resumed=None, start=None, stepped_over=[])
    transformer = transformer_for(half, machine, Kernels(half.model.attention, "own"))
    transformer.load_state_dict(checkpoint.model)
    model = TrainingModel(transformer, z_loss=0.0, chunk=half.train.loss_chunk)
    nats = held_out_loss(model, data.held_out.batches, World(), machine.device)
    assert nats is not None
    return nats


def curves(options: Any, work: Path) -> list[dict[str, Any]]:
    """Train every seed in both precisions, in turn."""
    tokens = 32 * 16 * 12 if options.quick else options.tokens
    shape = {"batch_size": 16, "seq_len": 32} if options.quick else {"batch_size": TOKENS_A_STEP // 1024, "seq_len": 1024}
    results = []
    for seed in options.seeds:
        for precision in PRECISIONS:
            train = {**shape, "tokens": tokens, "seed": seed, "precision": precision, "eval_every": 4 if options.quick else 100}
            config = settings(options.corpus, work, options.tokenizer, quick=options.quick, train=train)
            results.append({"seed": seed, "precision": precision, "tokens": tokens, **trained(config)})
            last = {name: value for name, value in results[-1].items() if name not in ("loss", "held_out_bits_per_byte")}
            print(last, flush=True)
    return results


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the training losses, and how far fp8's is above bf16's of the same seed, as means of 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def smooth(loss: list[float]) -> list[float]:
        return [statistics.mean(loss[i : i + SMOOTHED]) for i in range(0, len(loss) - SMOOTHED + 1, SMOOTHED)]

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained", height_ratios=(2, 1))
    loss = {(row["seed"], row["precision"]): smooth(row["loss"]) for row in results}
    for (seed, precision), curve in loss.items():
        steps = [SMOOTHED * (i + 0.5) for i in range(len(curve))]
        first = seed == min(row["seed"] for row in results)
        above.plot(steps, curve, color="C0" if precision == "bf16" else "C1", linewidth=0.9, label=precision if first else None)
        if precision == "fp8" and (seed, "bf16") in loss:
            gap = [a - b for a, b in zip(curve, loss[seed, "bf16"], strict=True)]
            below.plot(steps, gap, color=f"C{seed + 1}", linewidth=0.9, label=f"seed {seed}")
    above.set(ylabel="training loss, nats a token")
    above.legend()
    below.set(ylabel="fp8 above bf16", xlabel="step")
    below.axhline(0, color="grey", linewidth=0.5)
    below.legend()
    figure.savefig(path, dpi=130)


SMOOTHED = 20
"""Steps whose mean is a point of the plot."""


def compared(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far fp8 is from bf16, and how far bf16 is from itself with another seed."""
    nats = {name: [row["held_out_nats_in_bf16"] for row in results if row["precision"] == name] for name in PRECISIONS}
    mean = {name: statistics.mean(values) for name, values in nats.items()}
    return {
        "held_out_nats": {name: round(value, 4) for name, value in mean.items()},
        "difference": round(mean["fp8"] - mean["bf16"], 4),
        "spread_of_bf16": [round(min(nats["bf16"]), 4), round(max(nats["bf16"]), 4)],
        "steps_with_cut_off": max(row["steps_with_cut_off"] for row in results),
        "tokens_per_second": {name: [row["tokens_per_second"] for row in results if row["precision"] == name] for name in PRECISIONS},
    }


def gradients(path: Path, text: str) -> dict[str, Any]:
    """Return the relative error of every matrix's gradient in bf16 and fp8 against float32, of a Hugging Face Llama on ``text``.

    Args:
        path: a folder, or a GGUF file (which needs the package gguf).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder, **where)(text)["input_ids"][: LENGTH + 1])[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    values = theirs.config
    config = ModelConfig.model_validate(
        {
            "vocab_size": values.vocab_size,
            "d_model": values.hidden_size,
            "n_layer": values.num_hidden_layers,
            "n_head": values.num_attention_heads,
            "n_kv_head": values.num_key_value_heads,
            "d_ff": values.intermediate_size,
            "original_seq_len": values.max_position_embeddings,
            "norm_eps": values.rms_norm_eps,
            "rope": {"theta": values.rope_parameters["rope_theta"]},
        }
    )
    state = from_hf(config, theirs.state_dict())
    with torch.no_grad():
        expected = float(theirs(ids, labels=ids).loss)
    del theirs
    exact, loss = _gradients(config, state, ids, torch.float32)
    found = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        got, half_loss = _gradients(config, state, ids, torch.bfloat16, fp8=fp8)
        errors = {weight: float((got[weight].double() - g.double()).norm() / g.double().norm()) for weight, g in exact.items()}
        kinds = {kind: [e for weight, e in errors.items() if f".{kind}." in f".{weight}"] for kind in KINDS}
        found[name] = {
            "loss": round(half_loss, 5),
            "median": round(statistics.median(errors.values()), 4),
            "worst": round(max(errors.values()), 4),
            "worst_weight": max(errors, key=lambda weight: errors[weight]),
            **{kind: round(statistics.median(values), 4) for kind, values in kinds.items() if values},
        }
    return {"model": path.name, "tokens": LENGTH, "loss": round(loss, 5), "transformers_loss": round(expected, 5), **found}


LENGTH = 512
KINDS = ("embedding", "qkv", "out", "gate_up", "down")


def _gradients(
    config: ModelConfig, state: dict[str, Tensor], ids: Tensor, dtype: torch.dtype, *, fp8: bool = False
) -> tuple[dict[str, Tensor], float]:
    """Return the gradients of the matrices by name, and the loss in nats a token."""
    machine = runtime.machine()
    transformer = Transformer(config, dtype=dtype, fp8=fp8)
    transformer.load_state_dict(state)
    transformer.to(machine.device)
    model = TrainingModel(transformer, z_loss=0.0, chunk=LENGTH)
    tokens, targets = ids[:, :-1].to(machine.device), ids[:, 1:].to(machine.device)
    for _ in range(SETTLING + 1 if fp8 else 1):
        model.zero_grad()
        sums = model(tokens, targets)
        (sums.total / LENGTH).backward()
        if transformer.scales is not None:
            transformer.scales.update()
    return {
        name: weight.grad.cpu() for name, weight in transformer.named_parameters() if weight.grad is not None and weight.ndim == 2
    }, float(sums.cross_entropy / LENGTH)


def main() -> None:
    """Train the curves, or measure the gradients."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--keep", action="store_true", help="put the rows beside those that are kept of other seeds")
    parser.add_argument("--gradients", type=Path, help="a model in Hugging Face's layout, instead of curves")
    options = parser.parse_args()
    if options.gradients is not None:
        found = gradients(options.gradients, options.corpus.read_text(encoding="utf-8"))
        finish("fp8_gradients", found, results=found, quick=options.quick)
        return
    if options.quick:
        options.seeds = [1]
    with tempfile.TemporaryDirectory() as work:
        results = curves(options, Path(work))
    if options.keep:
        results = with_kept("fp8", results, alike=("seed", "precision"))
    if not options.quick:
        plot(results, ROOT / "docs" / "data" / "fp8.png")
    finish("fp8", compared(results), results=results, quick=options.quick)


if __name__ == "__main__":
    main()
