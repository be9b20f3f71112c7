"""``pretrain``: settings to a trained model."""

from __future__ import annotations

from typing import Any

from minifoundation import config
from minifoundation.config import PretrainOptions, RunConfig, RunOptions
from minifoundation.errors import UserError


def pretrain(options: PretrainOptions, values: dict[str, Any]) -> None:
    """Train a model from scratch with the YAML of ``options`` overlaid by ``values`` of the command line."""
    run_config = config.build(RunConfig, layered(options, values, below={}), sources(options))
    from minifoundation.train.run import run

    run(run_config, resume=options.resume, allowed=options.allow_change, dry_run=options.dry_run)


def layered(options: RunOptions, values: dict[str, Any], *, below: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings: ``below`` < YAML < command line, with ``--amp`` and ``--bf16`` spelled as ``train.precision``.

    Raises:
        UserError: the short flags contradict ``--train.precision``.
    """
    given = values
    precision = "bf16" if options.bf16 else "fp16" if options.amp else None
    if precision is not None:
        said = values.get("train", {}).get("precision")
        if said not in (None, precision):
            flag = "--bf16" if options.bf16 else "--amp"
            raise UserError("--train.precision", f"{said} contradicts {flag}, which means {precision}", "give one of them")
        given = config.merged(values, {"train": {"precision": precision}})
    from_yaml = config.read_yaml(options.config) if options.config else {}
    return config.merged(config.merged(below, from_yaml), given)


def sources(options: RunOptions) -> str:
    """Return where settings came from, for messages."""
    return f"{options.config}, command line" if options.config else "command line"
