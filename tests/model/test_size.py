from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minifoundation import config
from minifoundation.config import ModelConfig
from minifoundation.model.size import flops_per_token, memory_bytes, n_matmul_parameters, n_parameters, rows_divisor
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer

HALF_BILLION = ModelConfig(d_model=1536, n_layer=16, n_head=24, n_kv_head=8, d_ff=4096)
BILLION = ModelConfig(d_model=2048, n_layer=20, n_head=32, n_kv_head=8, d_ff=5504)


QWEN3 = ModelConfig(
    vocab_size=151_936, d_model=1024, n_layer=28, n_head=16, n_kv_head=8, head_dim=128, d_ff=3072, qk_norm=True, tie_embeddings=True
)


@pytest.mark.parametrize(("config", "count"), [(HALF_BILLION, 493_929_984), (BILLION, 1_007_765_504), (QWEN3, 596_049_920)])
def test_the_sizes_that_are_known(config: ModelConfig, count: int) -> None:
    assert n_parameters(config) == count
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == count


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head_dim", [None, 24])
def test_counts_are_those_of_the_model(qk_norm: bool, tie: bool, head_dim: int | None) -> None:
    sizes = {"vocab_size": 96, "d_model": 32, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "d_ff": 80, "head_dim": head_dim}
    config = ModelConfig.model_validate(sizes | {"qk_norm": qk_norm, "tie_embeddings": tie})
    weights = dict(Transformer(config).named_parameters())
    assert n_parameters(config) == sum(w.numel() for w in weights.values())
    look_up = 0 if tie else weights["embedding.weight"].numel()
    assert n_matmul_parameters(config) == sum(w.numel() for w in weights.values() if w.ndim == 2) - look_up


def test_flops_by_hand() -> None:
    """One block, width 8, 2 heads of 4, one key/value head, d_ff 24, vocabulary 16, rows of 6 tokens."""
    config = ModelConfig(vocab_size=16, d_model=8, n_layer=1, n_head=2, n_kv_head=1, d_ff=24)
    multiply_adds = 8 * 16 + 8 * 8 + 8 * 48 + 24 * 8 + 8 * 16  # qkv, out, gate and up, down, head
    attention = 2 * (2 * 4) * 6 / 2  # scores and values: 2 heads of 4, over half of 6 tokens
    assert flops_per_token(config, 6) == 3 * 2 * (multiply_adds + attention)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_flops_are_those_torch_counts(head_dim: int) -> None:
    """torch counts attention in full, we count the causal half; forward and backward of one row."""
    T = 16
    sizes = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": head_dim, "d_ff": 48}
    config = ModelConfig.model_validate(sizes | {"original_seq_len": T, "attention": "math"})
    model = TrainingModel(Transformer(config), z_loss=0.0, chunk=8)
    model.transformer.initialise(0)
    tokens = torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).total.backward()
    attention = 6 * config.n_layer * 4 * head_dim * T
    assert counter.get_total_flops() == T * (flops_per_token(config, T) + attention)


def test_flops_within_documents_are_those_of_the_documents_apart() -> None:
    lengths = [5, 1, 90, 32]
    attended_length = sum(length**2 for length in lengths) / sum(lengths)
    apart = sum(length * flops_per_token(HALF_BILLION, length) for length in lengths)
    assert sum(lengths) * flops_per_token(HALF_BILLION, attended_length) == pytest.approx(apart, rel=1e-12)
    assert flops_per_token(HALF_BILLION, attended_length) < flops_per_token(HALF_BILLION, sum(lengths))


def test_flops_of_the_two_sizes_at_4096() -> None:
    assert flops_per_token(HALF_BILLION, 4096) == pytest.approx(3.567e9, rel=1e-3)
    assert flops_per_token(BILLION, 4096) == pytest.approx(7.053e9, rel=1e-3)


def total(**changes: Any) -> int:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 4096,
        "grad_accum": 2,
        "precision": "bf16",
        "optimizer_states": "fp32",
        "ema": False,
        "loss_chunk": 2048,
    }
    model: dict[str, Any] = {name: changes.pop(name) for name in ("checkpointing", "checkpoint_every") if name in changes}
    parts: dict[str, int] = memory_bytes(HALF_BILLION.model_copy(update=model), **(settings | changes))
    return sum(parts.values())


def test_memory_terms_that_are_exact() -> None:
    n = n_parameters(HALF_BILLION)
    parts = memory_bytes(
        HALF_BILLION, batch_size=1, seq_len=64, grad_accum=2, precision="bf16", optimizer_states="fp32", ema=True, loss_chunk=64
    )
    assert (parts["weights"], parts["gradients"], parts["optimizer"], parts["ema"]) == (4 * n, 4 * n, 8 * n, 4 * n)


def test_memory_goes_where_it_should() -> None:
    assert total(optimizer_states="int8") < total() < total(ema=True)
    assert total(checkpointing="full") < total(checkpointing="attention") < total(checkpointing="full", checkpoint_every=2) < total()
    assert total(batch_size=1) < total(batch_size=2) < total(batch_size=2, precision="fp32")
    assert total(loss_chunk=256) < total(loss_chunk=8192)
    assert total(grad_accum=1) < total(grad_accum=2) == total(grad_accum=64)


MEASURED = json.loads((Path(__file__).parents[2] / "docs" / "data" / "speed.json").read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("row", [row for row in MEASURED if row.get("compile") and "peak_gib" in row], ids=lambda row: row["name"])
def test_predicted_memory_is_within_a_tenth_of_the_measured(row: dict[str, Any]) -> None:
    """The peaks that ``python -m benchmarks.speed`` measured on a GPU."""
    model = config.read_yaml(Path(__file__).parents[2] / "configs" / f"{row['config']}.yaml")["model"]
    parts = memory_bytes(
        config.build(config.ModelConfig, {**model, "checkpointing": row["checkpointing"]}, "test"),
        batch_size=row["batch_size"],
        seq_len=row["seq_len"],
        grad_accum=row["grad_accum"],
        precision=row["precision"],
        optimizer_states=row.get("optimizer_states", "fp32"),
        ema=False,
        loss_chunk=row["loss_chunk"],
    )
    assert sum(parts.values()) == pytest.approx(row["peak_gib"] * 2**30, rel=0.1)


def test_copies_are_of_the_matrices_that_multiply() -> None:
    """Counted in a model, tied and not: an embedding that only looks rows up has none."""
    for tie in (True, False):
        sizes = HALF_BILLION.model_copy(update={"n_layer": 1, "vocab_size": 1024, "tie_embeddings": tie})
        with torch.device("meta"):
            copies = sum(copy.nbytes for name, copy in Transformer(sizes, dtype=torch.bfloat16).named_buffers() if name.endswith("copy"))
        parts = memory_bytes(
            sizes, batch_size=1, seq_len=64, grad_accum=1, precision="bf16", optimizer_states="fp32", ema=False, loss_chunk=64
        )
        assert parts["weight_copies"] == copies


LONG = Path(__file__).parents[2] / "docs" / "data" / "long_context.json"
ROWS = json.loads(LONG.read_text(encoding="utf-8"))["results"].get("speed", {}) if LONG.exists() else {}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.get("mfu") and "peak_gib" in row])
def test_predicted_memory_of_long_rows_is_within_a_tenth_of_the_measured(name: str) -> None:
    """The peaks that ``python -m benchmarks.long_context speed`` measured on a GPU."""
    row = ROWS[name]
    file = Path(__file__).parents[2] / "configs" / f"{'model_1b' if row['model'] == '1B' else 'model_0p5b'}.yaml"
    parts = memory_bytes(
        config.build(config.ModelConfig, {**config.read_yaml(file)["model"], "checkpointing": row["checkpointing"]}, "test"),
        batch_size=1,
        seq_len=row["seq_len"],
        grad_accum=row["grad_accum"],
        precision=row["precision"],
        optimizer_states="fp32",
        ema=False,
        loss_chunk=8192,
    )
    assert sum(parts.values()) == pytest.approx(row["peak_gib"] * 2**30, rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 24}, {"tie_embeddings": False, "n_kv_head": 1, "vocab_size": 96}])
def test_the_parts_that_rows_can_be_divided_into_are_those_of_every_weight(changes: dict[str, Any]) -> None:
    small = {"vocab_size": 128, "d_model": 48, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "d_ff": 72, "original_seq_len": 16}
    model = config.ModelConfig.model_validate(small | changes)
    assert rows_divisor(model) == math.gcd(*(len(weight) for weight in Transformer(model).parameters()))


def test_selective_checkpointing_of_a_billion_at_64k_is_within_32_gib() -> None:
    settings = {"batch_size": 1, "grad_accum": 1, "precision": "bf16", "optimizer_states": "fp32", "ema": False, "loss_chunk": 8192}
    for seq_len in (32_768, 65_536):
        needed = {}
        for way in ("attention", "offload", "full", "none"):
            model = BILLION.model_copy(update={"checkpointing": way})
            needed[way] = sum(memory_bytes(model, seq_len=seq_len, **settings).values()) / 2**30  # type: ignore[arg-type]
        assert needed["offload"] < needed["attention"] < 32 and needed["attention"] < needed["none"] < 80
    table = (Path(__file__).parents[2] / "docs" / "long-context.md").read_text(encoding="utf-8")
    (line,) = (line for line in table.splitlines() if line.startswith("| all |"))
    shown = dict(zip(("none", "attention", "offload", "full"), line.split("|")[2:6], strict=True))
    assert {way: float(gib) for way, gib in shown.items()} == {way: round(gib, 1) for way, gib in needed.items()}


def test_the_table_of_rows_that_several_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "long-context.md").read_text(encoding="utf-8")
    lines = text.split("| tokens | none, 1 |")[1].split("\n\n")[0].splitlines()[2:]
    settings = {"batch_size": 1, "grad_accum": 1, "precision": "bf16", "optimizer_states": "fp32", "ema": False, "loss_chunk": 8192}
    assert len(lines) == 4
    for line in lines:
        tokens, *shown = (float(cell.replace(",", "")) for cell in line.strip("|").split("|"))
        found = [
            sum(memory_bytes(model, seq_len=int(tokens), context=size, optimizer_shards=size, **settings).values()) / 2**30  # type: ignore[arg-type]
            for model in (BILLION, BILLION.model_copy(update={"checkpointing": "attention"}))
            for size in (1, 2, 4, 8)
        ]
        assert shown == [round(gib, 1) for gib in found]


def measured(file: str) -> dict[str, dict[str, Any]]:
    """Return the rows of several GPUs that ``python -m benchmarks.scaling`` has measured."""
    results = json.loads((Path(__file__).parents[2] / "docs" / "data" / file).read_text(encoding="utf-8"))["results"]
    return {row["name"]: row for row in results if row["gpus"] > 1 and "peak_gib" in row}


SHARED = measured("scaling.json") | measured("scaling_four.json")


@pytest.mark.parametrize("name", SHARED)
def test_predicted_memory_of_several_gpus_is_within_a_twentieth_of_the_measured(name: str) -> None:
    """The peaks that ``python -m benchmarks.scaling`` measured."""
    row = SHARED[name]
    file = Path(__file__).parents[2] / "configs" / f"{'model_1b' if row['model'] == '1B' else 'model_0p5b'}.yaml"
    rows = row["batch_size"] * (1 if row["together"] else row["gpus"])
    sharded = row["parallel"] == "fsdp"
    parts = memory_bytes(
        config.build(config.ModelConfig, {**config.read_yaml(file)["model"], "checkpointing": row["checkpointing"]}, "test"),
        batch_size=row["batch_size"],
        seq_len=row["seq_len"],
        grad_accum=(row["tokens_per_step"] or rows * row["seq_len"]) // (rows * row["seq_len"]),
        precision=row["precision"],
        optimizer_states="fp32",
        ema=False,
        loss_chunk=8192,
        context=row["gpus"] if row["together"] else 1,
        shards=row["gpus"] if sharded else 1,
        optimizer_shards=row["gpus"],
        sent=2 if row["parallel"] == "ddp" and row["reduce"] == "bf16" else 0,
    )
    assert sum(parts.values()) == pytest.approx(row["peak_gib"] * 2**30, rel=0.05)
