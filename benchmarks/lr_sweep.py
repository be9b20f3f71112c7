"""Learning rate x batch size for a model of about 50M parameters: what the defaults of the YAML files rest on.

    python -m benchmarks.lr_sweep --corpus wiki/ [--tokenizer spm.model]
    python -m benchmarks.lr_sweep --quick

Each run sees the same tokens in the same order, with a cosine to 10% and 5% warm-up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, finish
from benchmarks.small_model import curve, parser_of, settings
from minifoundation.errors import UserError

RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
ROWS = ((16, 1), (64, 1))
"""(rows in a micro-batch, micro-batches): 16k and 66k tokens a step."""
TOKENS = 8_388_608


def main() -> None:
    """Train at every rate and batch size."""
    options = parser_of(__doc__).parse_args()
    rates, rows, tokens = (RATES[1:3], ((4, 1),), 4096) if options.quick else (RATES, ROWS, TOKENS)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for batch_size, grad_accum in rows:
            for lr in rates:
                train = {"tokens": tokens, "batch_size": batch_size, "grad_accum": grad_accum, "lr": lr}
                chosen = settings(options.corpus, Path(work), options.tokenizer, quick=options.quick, train=train)
                step = batch_size * grad_accum * chosen.train.seq_len
                try:
                    result = curve(chosen)
                    row = {
                        "tokens_per_step": step,
                        "lr": lr,
                        **{k: v for k, v in result.items() if k != "loss"},
                        "last_loss": result["loss"][-1],
                    }
                except UserError as error:
                    row = {"tokens_per_step": step, "lr": lr, "failed": str(error)}
                results.append(row)
                print(row, flush=True)
    done = [r for r in results if "failed" not in r]
    best = {
        size: min((r for r in done if r["tokens_per_step"] == size), key=lambda r: r["held_out_bits_per_byte"])
        for size in {r["tokens_per_step"] for r in done}
    }
    figures = {"tokens": tokens, "best_lr": {str(size): row["lr"] for size, row in sorted(best.items())}}
    if not options.quick:
        plot(results, ROOT / "docs" / "data" / "lr_sweep.png")
    finish("lr_sweep", figures, results=results, quick=options.quick)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw held-out bits per byte over the rate, one line a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for size in sorted({r["tokens_per_step"] for r in results}):
        points = [(r["lr"], r["held_out_bits_per_byte"]) for r in results if r["tokens_per_step"] == size and "failed" not in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{size:,} tokens a step")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out bits per byte", title=f"{TOKENS:,} tokens, 54M parameters")
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
