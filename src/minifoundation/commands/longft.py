"""``longft``: a trained model to one with a longer context, and the proof that it has one."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minifoundation import config
from minifoundation.commands.pretrain import layered, refuse_another_model, sources
from minifoundation.config import REPOSITORY, LongftOptions, ModelConfig, RunConfig, TrainConfig
from minifoundation.errors import UserError

if TYPE_CHECKING:
    from minifoundation.checkpoint import Checkpoint
    from minifoundation.train.proof import Found

DEFAULT_CONFIG = REPOSITORY / "configs" / "longft.yaml"


def longft(options: LongftOptions, values: dict[str, Any]) -> None:
    """Train the model of ``options.ckpt_in`` on longer rows: its settings < YAML (default configs/longft.yaml) < command line.

    Raises:
        UserError: rows shorter than the context there is, a scaling that does not go on from that of the checkpoint, settings of another
            model than the checkpoint's, or an optimizer asked for that it has not.
    """
    from minifoundation.commands.import_hf import beginning, settings_of
    from minifoundation.commands.suite import suite_for
    from minifoundation.data.sources import find_corpus
    from minifoundation.distributed import is_first_process
    from minifoundation.train.run import run
    from minifoundation.train.state import Start

    checkpoint = beginning(options.ckpt_in)
    if options.config is None:
        options = options.model_copy(update={"config": DEFAULT_CONFIG})
        rope = checkpoint.config.model.rope
        if rope.scaling != "none" or rope.factor > 1:  # its weights have learnt these frequencies; none and a factor are a base of its own
            values = config.merged({"model": {"rope": {"scaling": rope.scaling}}}, values)
    base = settings_of(checkpoint) | {"out_dir": str(Path("outputs") / "longft")}
    settings = layered(options, values, below=base)
    own = layered(options, values, below={})
    if settings["train"].get("batch_size") == "auto" and "grad_accum" not in own.get("train", {}):
        settings["train"].pop("grad_accum", None)  # micro-batches of the phase before, here they would be the rows of a step
    seq_len = config.build(TrainConfig, settings["train"], sources(options), section="train.").seq_len
    model = checkpoint.config.model
    if seq_len < model.max_seq_len:
        remedy = f"give --seq_len above {model.max_seq_len}, or continue at the current length with pretrain"
        raise UserError("train.seq_len", f"{seq_len} is shorter than the {model.max_seq_len} tokens that {options.ckpt_in} reaches", remedy)
    asked = own.get("model", {}).get("rope", {})
    if model.rope.scaling == "llama3" and (other := asked.get("scaling", "llama3")) != "llama3":
        problem = f"{other} here, but {options.ckpt_in} was trained with llama3, and no other scaling can continue from its frequencies"
        raise UserError("model.rope.scaling", problem, "set it to llama3, whose factor grows as the length does")
    if "factor" not in asked:
        settings = config.merged(settings, {"model": {"rope": reaching(seq_len, model)}})
    run_config = config.build(RunConfig, settings, f"{options.ckpt_in}, {sources(options)}")
    refuse_another_model(run_config.model, model, options.ckpt_in, "leave it out: longft extends this model", but="rope")
    rope = run_config.model.rope
    if seq_len > model.max_seq_len and rope.scaling == "none" and rope.theta == model.rope.theta and is_first_process():
        said = f"none, and theta is {rope.theta:,.0f} as before, so the frequencies stay those of {model.max_seq_len:,} tokens"
        print(f"warning: model.rope.scaling: {said}; take yarn, or base: configs/longft.yaml in your YAML", file=sys.stderr)
    if options.proof_data is not None:
        try:
            find_corpus(options.proof_data, run_config.data)  # a mistake in it should not show after the training
        except UserError as error:
            raise UserError("--proof_data", error.problem, error.remedy) from None
    if options.carry_optimizer:
        _carries(checkpoint, run_config, options.ckpt_in)
    start = Start("longft", checkpoint, with_optimizer=options.carry_optimizer)
    final = run(run_config, resume=options.resume, allowed=options.allow_change, dry_run=options.dry_run, start=start, suite_for=suite_for)
    if final is not None and is_first_process() and (options.proof_documents or options.needles):
        prove(checkpoint, final, options)


def reaching(seq_len: int, model: ModelConfig) -> dict[str, Any]:
    """Return the RoPE settings under which ``model`` reaches ``seq_len``.

    The factor counts from the length of pretraining, also when an extended model is extended again. That of a model whose llama3 scaling
    states its length is no ratio of lengths (Llama 3.2: 32 for 16 times the length): it grows as the length does.
    """
    if model.rope.max_seq_len is not None:
        times = max(1.0, seq_len / model.rope.max_seq_len)
        return {"factor": model.rope.factor * times, "max_seq_len": max(seq_len, model.rope.max_seq_len)}
    factor = max(model.rope.factor, math.ceil(seq_len / model.original_seq_len))
    return {"factor": factor} if factor > 1 else {"factor": 1.0, "scaling": "none"}


def _carries(checkpoint: Checkpoint, run_config: RunConfig, path: Path) -> None:
    """Refuse to carry an optimizer that is not there, or whose moments are of another kind."""
    if not checkpoint.optimizer:
        raise UserError("--carry_optimizer", f"{path} holds no optimizer state", "give a step_ folder of the run, or leave it out")
    before, now = checkpoint.config.train.optimizer_states, run_config.train.optimizer_states
    if before != now:
        raise UserError("--carry_optimizer", f"the moments in {path} are {before}, here {now}", f"set --train.optimizer_states {before}")


def prove(start: Checkpoint, final: Path, options: LongftOptions) -> None:
    """Try the models before and after on the same text, print what came out and keep it beside ``final``."""
    import torch

    from minifoundation import runtime
    from minifoundation.checkpoint import load_checkpoint, write_whole
    from minifoundation.data.tokenizer import Tokenizer
    from minifoundation.train import proof

    extended, folder = load_checkpoint(final), final.parent
    tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer.model")
    on = proof.material(extended.config, tokenizer, documents=options.proof_documents, tries=options.needles, source=options.proof_data)
    machine = runtime.machine()
    machine.forget()
    precision = extended.config.train.precision
    try:
        before, after = (
            proof.found(checkpoint, on, machine, precision=precision, sliding=checkpoint is start) for checkpoint in (start, extended)
        )
    except torch.OutOfMemoryError:  # one process reads whole rows, without gradients
        said = f"rows of {on.length:,} tokens do not fit {machine.name} beside the model; {final} is whole, and not proved"
        print(f"warning: {said}", file=sys.stderr)
        return
    print(f"proof of {folder}:")
    for line in proof.described(before, after, on):
        print(line)
    write_whole(folder / "loss_by_position.csv", proof.positions_csv(before, after).encode())
    write_whole(folder / "needles.csv", proof.needles_csv(before, after).encode())
    written = ["loss_by_position.csv", "needles.csv"]
    if _pictured(before, after, folder / "long_context.png", on.original):
        written.append("long_context.png")
    print(f"  wrote {', '.join(written)}")


def _pictured(before: Found, after: Found, path: Path, original: int) -> bool:
    """Draw what was found, and return whether that could be done."""
    from minifoundation.checkpoint import write_whole

    try:
        from minifoundation.report.reach import picture
    except ImportError:
        print("  no picture: matplotlib is not installed; pip install -e '.[eval]'")
        return False
    models = {"before": before, "after": after}
    by_position = {"before": before.positions, "after": after.positions, "before, in sliding windows": before.sliding}
    curves = {name: [((p.first + p.last) / 2, p.nats) for p in places] for name, places in by_position.items() if places}
    grids: dict[str, dict[str, dict[tuple[int, float], float]]] = {}
    for name, one in models.items():
        for needle in one.needles:
            grids.setdefault(needle.task, {}).setdefault(name, {})[needle.length, needle.depth] = needle.found / needle.tries
    write_whole(path, picture(curves, grids, original))
    return True
