"""Shared prefixes and branched caches against one plain forward for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from minifoundation.evaluate.likelihood import Span

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def network(kind: str, **changes: Any) -> Any:
    """Return a random model whose attention is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 / math.sqrt(weight.shape[1]))
    return model.eval()


def spans(tree: Sequence[tuple[int, Sequence[int]]], *, examples: int = 0, seed: int = 0) -> list[Span]:
    """Return sequences that all begin with the same ``examples`` tokens, then share contexts of given lengths, then end apart."""
    from minifoundation.evaluate.likelihood import Span

    random = np.random.default_rng(seed)
    first = random.integers(3, VOCABULARY, examples)
    found = []
    for context, endings in tree:
        shared = random.integers(3, VOCABULARY, context)
        for length in endings:
            found.append(Span(np.concatenate([first, shared, random.integers(3, VOCABULARY, length)]), examples + context))
    return found


def plain(model: Any, span: Span) -> tuple[float, bool]:
    import torch

    with torch.no_grad():
        table = model(torch.tensor(span.tokens[None])).logits[0].double().log_softmax(-1)
    targets = span.tokens[span.start :]
    places = np.arange(span.start - 1, len(span.tokens) - 1)
    return float(table[places, targets].sum()), bool((table[places].argmax(-1).numpy() == targets).all())


TREES = {
    "endings of questions": spans([(60, (5, 1, 9, 3)), (44, (7, 7, 2, 2)), (12, (1, 1, 1, 1)), (30, (4, 4))]),
    "questions after examples": spans([(9, (1, 1, 1, 1)), (14, (1, 1, 1, 1)), (5, (1, 1)), (21, (1, 1, 1))], examples=80),
    "both": spans([(40, (6, 3, 2, 8)), (50, (1, 4, 4, 4)), (33, (2, 2))], examples=40),
    "nothing in common": spans([(9, (3,)), (1, (1,)), (77, (20,)), (30, (30,))]),
}


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 130, 4096])
def test_every_log_likelihood_is_that_of_the_plain_forward(tree: str, batch_tokens: int) -> None:
    from minifoundation.evaluate.likelihood import Network, log_likelihoods

    model = network("llama")
    parts = Network(model)
    assert parts.branches and parts.body is not None, "a Llama takes the fast path, else this test looks at another one"
    counted: list[int] = []
    scores = log_likelihoods(parts, TREES[tree], batch_tokens=batch_tokens, done=counted.append)
    assert sum(counted) == len(scores) == len(TREES[tree])
    for score, span in zip(scores, TREES[tree], strict=True):
        expected, greedy = plain(model, span)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == greedy


def test_greedy_is_seen() -> None:
    import torch

    from minifoundation.evaluate.likelihood import Network, Span, log_likelihoods

    model = network("llama")
    prompt = np.arange(3, 40)
    written = model.generate(torch.tensor(prompt[None]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0].numpy()
    wrong = written.copy()
    wrong[-1] = 3 if written[-1] != 3 else 4
    scores = log_likelihoods(Network(model), [Span(written, len(prompt)), Span(wrong, len(prompt))], batch_tokens=512)
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize(
    ("kind", "changes", "branches", "head"),
    [
        ("gpt2", {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}, True, True),
        ("qwen3", {}, True, True),
        ("gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 16}, False, False),
        ("mistral", {"sliding_window": 16}, False, True),
    ],
)
def test_a_model_that_cannot_branch_or_changes_its_logits_is_read_as_it_is(
    kind: str, changes: dict[str, Any], branches: bool, head: bool
) -> None:
    from minifoundation.evaluate.likelihood import Network, log_likelihoods

    model = network(kind, **changes)
    parts = Network(model)
    assert (parts.branches, parts.head is not None) == (branches, head)
    for score, span in zip(log_likelihoods(parts, TREES["both"], batch_tokens=512), TREES["both"], strict=True):
        assert score.log_likelihood == pytest.approx(plain(model, span)[0], abs=1e-4)


def computed_tokens(tree: Sequence[Span]) -> tuple[int, int]:
    """Return the tokens that go through the model with groups and without."""
    from minifoundation.evaluate.likelihood import grouped

    inputs = list({span.tokens[:-1].tobytes(): span.tokens[:-1] for span in tree}.values())
    groups = grouped(inputs)
    assert sorted(number for group in groups for number in group.members) == list(range(len(inputs))), "each input once"
    for group in groups:
        beginnings = {inputs[number][: group.prefix].tobytes() for number in group.members}
        assert len(beginnings) == 1 and all(len(inputs[number]) >= group.prefix for number in group.members)
    return sum(group.prefix + sum(len(inputs[n]) - group.prefix for n in group.members) for group in groups), sum(map(len, inputs))


def test_what_is_shared_is_computed_once() -> None:
    endings = spans([(500, (10, 10, 10, 10))] * 30)
    once, each = computed_tokens(endings)
    assert once <= 30 * (500 + 4 * 9) and each == 30 * 4 * 509
    examples = spans([(50, (1, 1, 1, 1))] * 40, examples=600)
    once, each = computed_tokens(examples)
    assert once <= 600 + 40 * 50 + 200 and each == 40 * 650
    apart = spans([(100, (3,))] * 20)
    once, each = computed_tokens(apart)
    assert once == each, "nothing in common: no second pass"


def test_memory_that_does_not_suffice_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from minifoundation.evaluate.likelihood import Network, log_likelihoods

    model = network("llama")
    parts = Network(model)
    expected = [score.log_likelihood for score in log_likelihoods(parts, TREES["both"], batch_tokens=64)]
    states, sizes = parts.states, []

    def limited(ids: Any, *, cached: bool) -> Any:
        sizes.append(ids.numel())
        if ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(ids, cached=cached)

    monkeypatch.setattr(parts, "states", limited)
    found = [score.log_likelihood for score in log_likelihoods(parts, TREES["both"], batch_tokens=1000)]
    assert found == pytest.approx(expected, abs=1e-4) and max(sizes) > 100 >= min(sizes)
