"""Loss curves over the same weights, data and order: ours, Hugging Face's model with torch's AdamW, and ours with int8 moments.

    python -m benchmarks.curves --corpus wiki/ [--tokenizer spm.model]     bf16 on a GPU, 300 steps, three seeds
    python -m benchmarks.curves --quick

Two curves agree when the mean gap between them over the last third is within the spread that another seed makes.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.record import ROOT, finish
from benchmarks.small_model import curve, parser_of, settings
from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.data.loader import Loader, micro_batches
from minifoundation.data.prepare import prepare_shards, tokenizer_for
from minifoundation.data.samples import Samples
from minifoundation.export.weights import hf_config, to_hf
from minifoundation.model.transformer import Transformer
from minifoundation.train.schedule import learning_rate

SEEDS = (1, 2, 3)


def hugging_face(run: RunConfig, work: Path, steps: int) -> dict[str, Any]:
    """Train transformers' model in a loop written out plainly, under torch's autocast, and return its losses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = runtime.machine().device
    tokenizer = tokenizer_for(run.tokenizer, run.data, work / "tokenizer")
    (source,) = run.data.weights
    shards = prepare_shards(source, run.data, tokenizer, tokens=run.train.tokens)
    loader = Loader({source: Samples(shards, seq_len=run.train.seq_len, seed=run.train.seed)}, run.data.weights)
    ours = Transformer(run.model)
    ours.initialise(run.train.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(run.model)), attn_implementation="sdpa").float()
    model.load_state_dict(to_hf(run.model, ours.state_dict()), strict=False)
    model.tie_weights()
    model.to(device)
    decayed = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("proj.weight")]
    groups = [{"params": decayed, "weight_decay": run.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(run.train.beta1, run.train.beta2), eps=run.train.eps)
    half = run.train.precision == "bf16"
    losses = []
    assert isinstance(run.train.batch_size, int)
    rows = run.train.batch_size * run.train.grad_accum
    for step in tqdm(range(steps), desc="transformers"):
        total = torch.zeros((), device=device)
        for batch in micro_batches(
            loader, step * rows, batch_size=run.train.batch_size, grad_accum=run.train.grad_accum, rank=0, world_size=1
        ):
            with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                logits = model(batch.tokens.to(device)).logits.float()
            log_z = logits.logsumexp(-1)
            cross_entropy = (log_z - logits.gather(-1, batch.targets.to(device)[..., None])[..., 0]).mean()
            ((cross_entropy + run.train.z_loss * log_z.square().mean()) / run.train.grad_accum).backward()
            total += cross_entropy.detach() / run.train.grad_accum
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, run.train)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"loss": [round(float(x), 4) for x in losses]}


def tail(losses: list[float]) -> float:
    """Return the mean loss of the last third."""
    return statistics.fmean(losses[-len(losses) // 3 :])


def main() -> None:
    """Train every variant with every seed and compare the curves."""
    parser = parser_of(__doc__)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--warmup", type=float, default=0.1)
    options = parser.parse_args()
    steps, rows = (20, 4) if options.quick else (300, 32)
    variants = ["ours", "transformers"] + (["ours, int8 moments"] if torch.cuda.is_available() else [])
    curves: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed in SEEDS:
            for name in variants:
                train: dict[str, Any] = {"batch_size": rows, "lr": options.lr, "warmup": options.warmup, "seed": seed}
                train["optimizer_states"] = "int8" if "int8" in name else "fp32"
                train["tokens"] = steps * rows * (32 if options.quick else 1024)
                chosen = settings(options.corpus, work, options.tokenizer, quick=options.quick, train=train)
                curves[name][seed] = hugging_face(chosen, work, steps) if name == "transformers" else curve(chosen)
                print(
                    seed,
                    name,
                    {k: v for k, v in curves[name][seed].items() if k != "loss"},
                    f"tail loss {tail(curves[name][seed]['loss']):.4f}",
                    flush=True,
                )
    noise = statistics.stdev(tail(curves["transformers"][seed]["loss"]) for seed in SEEDS)
    gaps = {
        name: statistics.fmean(tail(result["loss"]) - tail(curves["transformers"][seed]["loss"]) for seed, result in curves[name].items())
        for name in variants
        if name != "transformers"
    }
    figures = {"steps": steps, "seed_noise": round(noise, 5), **{f"gap of {name}": round(gap, 5) for name, gap in gaps.items()}}
    if not options.quick:
        plot(curves, ROOT / "docs" / "data" / "curves.png")
    finish("curves", figures, results=curves, quick=options.quick)


def plot(curves: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw every curve, and below it the gap to transformers' of the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained", height_ratios=(2, 1))
    for number, (name, by_seed) in enumerate(curves.items()):
        for seed, result in by_seed.items():
            label = name if seed == SEEDS[0] else None
            above.plot(result["loss"], color=f"C{number}", linewidth=0.8, label=label)
            if name != "transformers":
                gap = [a - b for a, b in zip(result["loss"], curves["transformers"][seed]["loss"], strict=True)]
                below.plot(gap, color=f"C{number}", linewidth=0.8)
    above.set(ylabel="training loss, nats a token")
    below.set(ylabel="gap to transformers", xlabel="step", ylim=(-0.1, 0.1))
    above.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
