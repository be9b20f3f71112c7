"""``pretrain``: settings to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minifoundation import config
from minifoundation.config import ModelConfig, PretrainOptions, RunConfig, RunOptions
from minifoundation.errors import UserError


def pretrain(options: PretrainOptions, values: dict[str, Any]) -> None:
    """Train a model with the YAML of ``options`` overlaid by ``values`` of the command line.

    With ``options.init_from`` the model is that of those weights: what its settings say otherwise is refused.
    """
    if options.init_from is None:
        run_config = config.build(RunConfig, layered(options, values, below={}), sources(options))
        start = None
    else:
        from minifoundation.commands.import_hf import beginning
        from minifoundation.train.state import Start

        checkpoint = beginning(options.init_from)
        below = {"model": checkpoint.config.model.model_dump(mode="json")}
        run_config = config.build(RunConfig, layered(options, values, below=below), f"{options.init_from}, {sources(options)}")
        remedy = "leave it out (longft extends the context), or train without --init_from"
        refuse_another_model(run_config.model, checkpoint.config.model, options.init_from, remedy)
        start = Start("pretrain", checkpoint)
    from minifoundation.commands.suite import suite_for
    from minifoundation.train.run import run

    run(run_config, resume=options.resume, allowed=options.allow_change, dry_run=options.dry_run, start=start, suite_for=suite_for)


MAY_DIFFER = {"vocab_size", "dropout", "init_std", "attention", "swiglu", "checkpointing", "checkpoint_every"}
"""Settings of a model that its trained weights do not depend on; the vocabulary stays that of the weights."""


def refuse_another_model(asked: ModelConfig, trained: ModelConfig, path: Path, remedy: str, *, but: str | None = None) -> None:
    """Refuse settings of another model than that whose weights are in ``path``.

    Args:
        but: one that may differ too.

    Raises:
        UserError: one differs.
    """
    for name in ModelConfig.model_fields:
        here, there = getattr(asked, name), getattr(trained, name)
        if here != there and name not in MAY_DIFFER and name != but:
            raise UserError(f"model.{name}", f"{here} here, but {there} in {path}", remedy)


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
    beneath = config.merged(below, from_yaml)
    off = {name for name in ("amp", "bf16") if name in options.model_fields_set and not getattr(options, name)}
    before = (beneath.get("train") or {}).get("precision")
    if precision is None and ((before == "bf16" and off) or (before == "fp16" and "amp" in off)):
        given = config.merged({"train": {"precision": "fp32"}}, values)  # --no_bf16 and --no_amp
    return config.merged(beneath, given)


def sources(options: RunOptions) -> str:
    """Return where settings came from, for messages."""
    return f"{options.config}, command line" if options.config else "command line"
