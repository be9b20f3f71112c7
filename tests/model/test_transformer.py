from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from minifoundation.config import ModelConfig, RopeConfig
from minifoundation.export.verify import random_state
from minifoundation.export.weights import hf_config, to_hf
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer

SCALINGS = [
    RopeConfig(),
    RopeConfig(scaling="linear", factor=4),
    RopeConfig(scaling="ntk", factor=4),
    RopeConfig(scaling="yarn", factor=4),
    RopeConfig(scaling="theta", factor=4),
    RopeConfig(scaling="llama3", factor=8, low_freq_factor=0.5, high_freq_factor=3, max_seq_len=128),
]


def tiny(**changes: Any) -> ModelConfig:
    settings = {"vocab_size": 256, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 32}
    return ModelConfig.model_validate(settings | changes)


def logits_of_transformers(config: ModelConfig, state: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of Llama or Qwen3 with eager attention: no kernel is shared with ours."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(config)), attn_implementation="eager")
    model.load_state_dict(to_hf(config, state), strict=False)
    model.tie_weights()
    with torch.no_grad():
        logits: Tensor = model.to(dtype).eval()(tokens).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope.scaling)
def test_logits_are_those_of_transformers(rope: RopeConfig, qk_norm: bool, tie: bool, dtype: torch.dtype) -> None:
    """With large random weights, inside the original length and as far beyond it as the settings reach."""
    config = tiny(rope=rope, qk_norm=qk_norm, tie_embeddings=tie)
    model = Transformer(config, dtype=dtype)
    state = random_state(model.state_dict())
    model.load_state_dict(state)
    tokens = torch.randint(256, (2, config.max_seq_len))
    with torch.no_grad():
        logits = model.logits(tokens)
    expected = logits_of_transformers(config, state, tokens, dtype)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    "change", [{"rope": RopeConfig(theta=10_100.0)}, {"norm_eps": 1e-6}, {"rope": RopeConfig(scaling="yarn", factor=1.05)}]
)
def test_the_comparison_notices_small_changes(change: dict[str, Any]) -> None:
    """The weights above are such that each setting shows far above the tolerance."""
    config = tiny()
    model, other = Transformer(config), Transformer(tiny(**change))
    state = random_state(model.state_dict())
    model.load_state_dict(state)
    other.load_state_dict(state)
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        assert (model.logits(tokens) - other.logits(tokens)).abs().max() > 1e-3 * model.logits(tokens).std()


def test_a_later_token_changes_nothing_before_it() -> None:
    model = Transformer(tiny())
    model.load_state_dict(random_state(model.state_dict()))
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_initial_weights() -> None:
    config = tiny(d_model=256, n_layer=8, d_ff=512, qk_norm=True, tie_embeddings=False)
    model, again, other = Transformer(config), Transformer(config), Transformer(config)
    model.initialise(5)
    again.initialise(5)
    other.initialise(6)
    for (name, weight), same, different in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, same)
        if weight.ndim == 1:
            assert (weight == 1).all()
            continue
        assert not torch.equal(weight, different)
        residual = name.endswith(("out.weight", "down.weight"))
        std = config.weight_std / (math.sqrt(2 * 8) if residual else 1)
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(weight.mean().item()) < 0.02 * std, name


@pytest.mark.parametrize(
    "config",
    [
        tiny(vocab_size=8192),
        tiny(vocab_size=8192, tie_embeddings=False, qk_norm=True),
        pytest.param(
            ModelConfig(d_model=1536, n_layer=2, n_head=24, n_kv_head=8, d_ff=4096), id="width of model_0p5b", marks=pytest.mark.slow
        ),
        pytest.param(
            ModelConfig(d_model=2048, n_layer=2, n_head=32, n_kv_head=8, d_ff=5504), id="width of model_1b", marks=pytest.mark.slow
        ),
    ],
)
def test_the_first_loss_is_that_of_a_uniform_guess(config: ModelConfig) -> None:
    model = Transformer(config)
    model.initialise(0)
    tokens = torch.randint(config.vocab_size, (32, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = TrainingModel(model, z_loss=0.0, chunk=256)(tokens[:, :-1], tokens[:, 1:])
    assert (losses.cross_entropy / losses.tokens).item() == pytest.approx(math.log(config.vocab_size), rel=0.01)


def gradients(
    *, compiled: bool = False, dtype: torch.dtype = torch.float32, training: bool = True, masked: bool = False, **changes: Any
) -> dict[str, Tensor]:
    torch.compiler.reset()
    transformer = Transformer(tiny(**changes), dtype=dtype)
    transformer.initialise(0)
    model = TrainingModel(transformer, z_loss=1e-4, chunk=16).train(training)
    if compiled:
        transformer.compile_blocks()
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    losses = model(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 5, 6, 32, 61, 64], dtype=torch.int32) if masked else None)
    (losses.total / losses.tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        {"checkpointing": "full"},
        {"checkpointing": "attention"},
        {"checkpointing": "full", "checkpoint_every": 2},
    ],
)
def test_checkpointing_changes_no_gradient(mode: dict[str, Any], masked: bool, dtype: torch.dtype, dropout: float) -> None:
    expected = gradients(dtype=dtype, dropout=dropout, masked=masked)
    found = gradients(dtype=dtype, dropout=dropout, masked=masked, **mode)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("mode", "attention", "silu", "products"), [("none", 2, 2, 0), ("attention", 2, 4, 6), ("full", 4, 4, 6)])
def test_checkpointing_recomputes_what_it_says(mode: str, attention: int, silu: int, products: int, masked: bool) -> None:
    """The kernels that run, in two blocks: of each, three products are made again, since nothing needs the last one."""
    plain, checkpointed = kernels_run(checkpointing="none", masked=masked), kernels_run(checkpointing=mode, masked=masked)
    assert (checkpointed["_scaled_dot_product_flash_attention_for_cpu"], checkpointed["silu"]) == (attention, silu)
    assert checkpointed["mm"] - plain["mm"] == products


def kernels_run(**mode: Any) -> Counter[str]:
    """Return how often each operator ran in a forward and backward of two blocks."""
    ran: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        gradients(**mode)
    return ran


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.parametrize(
    "mode",
    [
        {},
        pytest.param({"masked": True}, marks=pytest.mark.slow),
        pytest.param({"checkpointing": "attention", "dtype": torch.bfloat16}, marks=pytest.mark.slow),
        pytest.param({"checkpointing": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_same_gradients(mode: dict[str, Any]) -> None:
    expected, found = gradients(**mode), gradients(compiled=True, **mode)
    assert found.keys() == expected.keys(), "compiling renames nothing"
    tolerance = 0.02 if "dtype" in mode else 1e-5
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < tolerance * gradient.norm(), name


@pytest.mark.filterwarnings("default")
def test_blocks_of_equal_settings_share_one_graph() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    gradients(n_layer=4)
    torch.compiler.reset()
    transformer = Transformer(tiny(n_layer=4))
    transformer.initialise(0)
    for block in transformer.blocks:
        block.compile(dynamic=False, backend="eager", fullgraph=True)
    transformer(torch.zeros(1, 8, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1


def test_dropout_is_random_in_training_and_off_in_evaluation() -> None:
    plain = gradients()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(dropout=0.5, training=False).items())
    assert any(not torch.equal(gradient, plain[name]) for name, gradient in gradients(dropout=0.5).items())


def test_weights_stay_float32_under_low_precision_compute() -> None:
    model = Transformer(tiny(), dtype=torch.bfloat16)
    model.initialise(0)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert model(tokens).dtype == torch.bfloat16
    assert model.logits(tokens).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(gradient.dtype == torch.float32 for gradient in gradients(dtype=torch.bfloat16).values())


def test_names_of_the_weights() -> None:
    names = list(Transformer(tiny(n_layer=1, qk_norm=True, tie_embeddings=False)).state_dict())
    block = ("attention_norm", "qkv", "q_norm", "k_norm", "out", "mlp_norm", "gate_up", "down")
    assert names == ["embedding.weight", *(f"blocks.0.{name}.weight" for name in block), "norm.weight", "head.weight"]
