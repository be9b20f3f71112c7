"""Proof that an exported folder computes what was trained, strong enough to fail.

Weights as trained (standard deviation about 0.02) hardly notice a wrong RoPE base or gain: attention is nearly uniform. So everything is
compared twice, with the exported weights and with large random ones put through the same ``config.json`` and the same renaming.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.data.tokenizer import Special
from minifoundation.errors import UserError
from minifoundation.export import reading, weights
from minifoundation.model.size import n_matmul_parameters
from minifoundation.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of a logit, in units of the logits' own standard deviation (with exported weights: of 1 where that is smaller)."""
BUDGET = {"exported": 1e11, "random": 5e11}
"""Multiply-adds that the forward of the long row may take, a few seconds on two CPU cores; it bounds the row of a large model."""
SHORT = 24
COMPARED = 32
"""Positions at the end of a long row whose logits are compared."""
RANDOM_LAYERS = 2
"""Blocks of the model with random weights: enough for every path, few enough that float32 noise is not amplified beyond the tolerance."""
CONTINUATION = 12
SEED = 20_240
UNEQUAL = "the exported model is not the trained one"


@dataclass(frozen=True)
class Check:
    """One comparison of the two models."""

    weights: str
    """exported or random."""
    what: str
    tokens: int
    difference: float
    """Largest, in the units of ``TOLERANCE``; infinite when something that must be equal is not."""
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Parity:
    """What was compared and how far apart it was."""

    checks: tuple[Check, ...]
    faults: tuple[str, ...]
    """What must be equal and is not: tensors, token ids, text."""

    @property
    def failures(self) -> list[str]:
        far = [c for c in self.checks if not c.difference <= c.tolerance]
        return [*self.faults, *(f"{c.what} with {c.weights} weights differs by {c.difference:.1e}" for c in far)]


def verify(
    transformer: Transformer,
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    special: Special | None = None,
    unequal: str = UNEQUAL,
) -> Parity:
    """Return the comparison of ``transformer``, rounded to ``dtype``, with the model in ``folder``, both computing in float32 on the CPU.

    Args:
        special: ids that the folder's configuration must have.
        unequal: how to say that they differ.

    Raises:
        UserError: they differ.
    """
    state = {name: value.detach().to("cpu", dtype).float() for name, value in transformer.state_dict().items()}
    with quiet_transformers():
        faults = [*(_special_ids(folder, special) if special else ()), *_tensors(config, state, folder)]
        checks = [] if faults else [*_exported(config, state, folder), *_random(config, folder)]
    parity = Parity(tuple(checks), tuple(faults))
    refuse_unequal(parity.failures, unequal)
    return parity


def refuse_unequal(failures: list[str], unequal: str = UNEQUAL) -> None:
    """Raise a UserError when there is a failure; the first three are named."""
    if failures:
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        problem = f"{unequal}: {'; '.join(failures[:3])}{more}"
        raise UserError("parity check", problem, "nothing was written; please report this with the line you typed")


def in_words(parity: Parity) -> str:
    """Return a parity that has no failures for a person."""
    worst = max(check.difference for check in parity.checks)
    return f"{len(parity.checks)} comparisons of logits, largest difference {worst:.1e}"


def report(parity: Parity, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of ``parity.json``."""
    import transformers

    return {
        "equal": not parity.failures,
        "compared": f"float32 on the CPU, both sides rounded to {str(dtype).removeprefix('torch.')}",
        "tolerance": TOLERANCE,
        "unit": "standard deviation of the logits; with exported weights 1 where that is smaller",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checks": [asdict(check) for check in parity.checks],
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing warnings and progress bars; its own settings are put back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _special_ids(folder: Path, special: Special) -> Iterator[str]:
    expected = weights.token_ids(special)
    for file in ("config.json", "generation_config.json"):
        found = json.loads((folder / file).read_text(encoding="utf-8"))
        for name, value in expected.items():
            if found.get(name) != value:
                yield f"{file} has {name} {found.get(name)} instead of {value}"


def _tensors(config: ModelConfig, state: Mapping[str, Tensor], folder: Path) -> Iterator[str]:
    """Yield the names of weights that the files do not hold bit for bit."""
    try:
        stored = weights.from_hf(config, reading.tensors(folder))
    except KeyError as missing:
        yield f"the folder has no {missing.args[0]}"
        return
    for name, value in state.items():
        if stored[name].shape != value.shape or not torch.equal(stored[name].float(), value):
            yield f"{name} in the folder is another"


def _exported(config: ModelConfig, state: Mapping[str, Tensor], folder: Path) -> list[Check]:
    from transformers import AutoModelForCausalLM

    native = Transformer(config)
    native.load_state_dict(dict(state))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return _compare("exported", native, hf, smallest_unit=1.0)


def _random(config: ModelConfig, folder: Path) -> list[Check]:
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.from_pretrained(folder)
    shallow = config.model_copy(update={"n_layer": min(config.n_layer, RANDOM_LAYERS)})
    hf_config.num_hidden_layers = shallow.n_layer
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[: shallow.n_layer]
    native = Transformer(shallow)
    native.load_state_dict(random_state(native.state_dict()))
    hf = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    hf.load_state_dict(weights.to_hf(shallow, native.state_dict()), strict=False)
    return _compare("random", native, hf, smallest_unit=0.0)


def random_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return random weights of the same shapes under which every setting shows in the logits.

    Matrices have standard deviation 1.6 / sqrt(inputs), 0.2 at a width of 64: attention scores are of order 1, neither uniform nor
    saturated. The embedding is small, so that the epsilon of the first norms matters. Norms differ from each other and from 1.
    """
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            made[name] = 1.3 + 0.2 * noise
        else:
            made[name] = noise * (0.01 if name == "embedding.weight" else 1.6 / math.sqrt(value.shape[1]))
    return made


@torch.no_grad()
def _compare(name: str, native: Transformer, hf: Any, *, smallest_unit: float) -> list[Check]:
    from transformers import GenerationConfig

    native.eval()
    hf.eval()
    hf.generation_config = GenerationConfig()  # greedy, and the end-of-text token is one like others
    generator = torch.Generator().manual_seed(SEED)
    context = native.config.max_seq_len

    def tokens(length: int) -> Tensor:
        return torch.randint(native.config.vocab_size, (1, length), generator=generator)

    def difference(ours: Tensor, theirs: Tensor) -> float:
        unit = max(ours.std().item(), smallest_unit)
        far = (ours - theirs).abs().max().item()
        return far / unit if math.isfinite(far) and unit > 0 else math.inf

    def row(length: int) -> float:
        ids, kept = tokens(length), min(length, COMPARED)
        return difference(_last_logits(native, ids, kept), hf(ids, logits_to_keep=kept).logits)

    short, long = min(SHORT, context), _longest(native.config, BUDGET[name])
    reach = "beyond the original length" if long > native.config.original_seq_len else "full length" if long == context else "long"
    checks = [Check(name, "short row", short, row(short)), Check(name, f"row {reach}", long, row(long))]
    for what, measure in (("left-padded batch", _padded), ("key-value cache, token by token", _cached), ("greedy continuation", _greedy)):
        checks.append(Check(name, what, short, measure(native, hf, tokens(short), difference)))
    return checks


def _last_logits(native: Transformer, ids: Tensor, kept: int) -> Tensor:
    logits: Tensor = native(ids)[:, -kept:] @ native.head_weight.T
    return logits


def _longest(config: ModelConfig, budget: float) -> int:
    """Return the longest row, at most the context, whose forward through the blocks takes ``budget`` multiply-adds."""
    a_token = n_matmul_parameters(config) - config.vocab_size * config.d_model
    a_pair = config.n_layer * config.n_head * config.head_width  # two products over half of the square
    return min(config.max_seq_len, int((math.sqrt(a_token**2 + 4 * a_pair * budget) - a_token) / (2 * a_pair)))


Difference = Callable[[Tensor, Tensor], float]


def _padded(native: Transformer, hf: Any, ids: Tensor, difference: Difference) -> float:
    """Return the largest difference over rows of three lengths, padded on the left into one batch."""
    width = ids.shape[1]
    lengths = sorted({width, max(width // 2, 1), max(width // 5, 1)})
    batch = torch.zeros((len(lengths), width), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for i, length in enumerate(lengths):
        batch[i, -length:] = ids[0, :length]
        mask[i, -length:] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = hf(batch, attention_mask=mask, position_ids=positions).logits
    return max(difference(native.logits(ids[:, :length])[0], theirs[i, -length:]) for i, length in enumerate(lengths))


def _cached(native: Transformer, hf: Any, ids: Tensor, difference: Difference) -> float:
    """Return the difference of logits computed from half a row and then one token at a time."""
    half = ids.shape[1] // 2
    out = hf(ids[:, :half], use_cache=True)
    steps = [out.logits]
    for place in range(half, ids.shape[1]):
        out = hf(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    return difference(native.logits(ids), torch.cat(steps, dim=1))


def _greedy(native: Transformer, hf: Any, ids: Tensor, difference: Difference) -> float:
    """Return how far below our best token the one that ``generate`` chose lies, at worst; 0 when all are the same."""
    start = ids[:, : max(ids.shape[1] - CONTINUATION, 1)]
    with_continuation = hf.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=CONTINUATION)
    n_new = with_continuation.shape[1] - start.shape[1]
    if n_new < CONTINUATION:
        return math.inf
    logits = native.logits(with_continuation)[:, start.shape[1] - 1 : -1]
    chosen = logits.gather(-1, with_continuation[:, -n_new:, None])
    return difference(logits, logits.minimum(chosen))
