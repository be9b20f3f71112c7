"""What Python's garbage collector costs a training step, and what a step leaves to it.

python -m benchmarks.collector            a tiny model of 16 blocks, compiled, on any device
python -m benchmarks.collector --quick    not compiled
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch

import minifoundation.train.run  # noqa: F401  (all that a run has loaded is what a collection visits)
from benchmarks.record import finish
from minifoundation import runtime
from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw
from minifoundation.train.step import train_step

STEPS = 20


def collected() -> dict[str, Any]:
    """Return how many objects a full collection visits, the milliseconds it takes and what it finds."""
    objects = len(gc.get_objects())
    began = time.perf_counter()
    found = gc.collect()
    return {"objects": objects, "ms": round(1e3 * (time.perf_counter() - began), 2), "found": found}


def main() -> None:
    """Collect before and after some steps, with all that lives in the way and with it set aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    machine = runtime.machine()
    sizes = {"vocab_size": 512, "d_model": 64, "n_layer": 16, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "original_seq_len": 64}
    transformer = Transformer(ModelConfig.model_validate(sizes), dtype=torch.bfloat16)
    transformer.initialise(1)
    transformer.to(machine.device)
    if not quick:
        transformer.compile_blocks()
    model = TrainingModel(transformer, z_loss=1e-4, chunk=64)
    optimizer = adamw(dict(model.named_parameters()), TrainConfig(tokens=1))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=False)

    def steps(count: int) -> None:
        for _ in range(count):
            rows = torch.randint(512, (2, 65), device=machine.device)
            micro = [Batch(rows[:, :-1], rows[:, 1:])] * 2
            train_step(model, optimizer, scaler, micro, lr=1e-3, grad_clip=1.0, tokens=256, world=World())

    steps(2)
    gc.collect()
    gc.disable()
    steps(STEPS)
    results = {"all that lives": collected()}
    gc.freeze()
    steps(STEPS)
    results["set aside"] = collected()
    for name, row in results.items():
        print(f"{name}: {row}")
    figures = {name.replace(" ", "_") + "_ms": row["ms"] for name, row in results.items()}
    finish("collector", figures | {"left_by_steps": sum(row["found"] for row in results.values())}, results=results, quick=quick)


if __name__ == "__main__":
    main()
