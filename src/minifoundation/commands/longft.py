"""``longft``: a trained model to one with a longer context."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minifoundation import config
from minifoundation.commands.pretrain import layered, sources
from minifoundation.config import REPOSITORY, LongftOptions, ModelConfig, RunConfig, TrainConfig

DEFAULT_CONFIG = REPOSITORY / "configs" / "longft.yaml"


def longft(options: LongftOptions, values: dict[str, Any]) -> None:
    """Train the model of ``options.ckpt_in`` on longer rows: its settings < YAML (default configs/longft.yaml) < command line."""
    from minifoundation.commands.import_hf import beginning, settings_of
    from minifoundation.train.run import run
    from minifoundation.train.state import Start

    checkpoint = beginning(options.ckpt_in)
    if options.config is None:
        options = options.model_copy(update={"config": DEFAULT_CONFIG})
    base = settings_of(checkpoint) | {"out_dir": str(Path("outputs") / "longft")}
    settings = layered(options, values, below=base)
    if "factor" not in layered(options, values, below={}).get("model", {}).get("rope", {}):
        seq_len = config.build(TrainConfig, settings["train"], sources(options), section="train.").seq_len
        settings = config.merged(settings, {"model": {"rope": reaching(seq_len, checkpoint.config.model)}})
    run_config = config.build(RunConfig, settings, f"{options.ckpt_in}, {sources(options)}")
    run(run_config, resume=options.resume, allowed=options.allow_change, dry_run=options.dry_run, start=Start("longft", checkpoint))


def reaching(seq_len: int, model: ModelConfig) -> dict[str, Any]:
    """Return the RoPE settings under which ``model`` reaches ``seq_len``.

    The factor counts from the length of pretraining, also when an extended model is extended again, and never shrinks.
    """
    factor = max(model.rope.factor, math.ceil(seq_len / model.original_seq_len))
    return {"factor": factor} if factor > 1 else {"factor": 1.0, "scaling": "none"}
