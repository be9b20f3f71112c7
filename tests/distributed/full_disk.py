"""The program, whose disk is full when the checkpoint of step 6 is written beside the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minifoundation.checkpoint import saver
from minifoundation.cli import main

if __name__ == "__main__":
    write_step = saver.write_step  # type: ignore[attr-defined]

    def on_a_full_disk(state: dict[str, Any], *arguments: Any) -> Path:
        if state["progress"]["step"] == 6:
            raise OSError(28, "No space left on device", "the disk")
        return Path(write_step(state, *arguments))

    saver.write_step = on_a_full_disk  # type: ignore[assignment, attr-defined]
    sys.exit(main())
