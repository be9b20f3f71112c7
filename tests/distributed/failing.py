"""The program, in which something fails at step 6: what the variable FAILS names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from minifoundation.checkpoint import saver
from minifoundation.cli import main
from minifoundation.train import loop


def on_a_full_disk() -> None:
    """A checkpoint that is written beside the training, by the first process."""
    write_step = saver.write_step  # type: ignore[attr-defined]

    def written(state: dict[str, Any], *arguments: Any) -> Path:
        if state["progress"]["step"] == 6:
            raise OSError(28, "No space left on device", "the disk")
        return Path(write_step(state, *arguments))

    saver.write_step = written  # type: ignore[assignment, attr-defined]


def without_memory() -> None:
    """Every process runs out of memory in the same step."""
    train_step, steps = loop.train_step, iter(range(1, 7))  # type: ignore[attr-defined]

    def taken(*arguments: Any, **settings: Any) -> Any:
        if next(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_step(*arguments, **settings)

    loop.train_step = taken  # type: ignore[attr-defined]


if __name__ == "__main__":
    {"disk": on_a_full_disk, "memory": without_memory}[os.environ["FAILS"]]()
    sys.exit(main())
