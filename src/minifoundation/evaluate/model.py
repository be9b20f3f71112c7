"""The model under evaluation: lm-eval's interface over a model of transformers, a folder's or one in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from minifoundation.errors import UserError
from minifoundation.evaluate.encoding import Encoded, cache_folder, encoded_pairs
from minifoundation.evaluate.folder import check_folder, loaded
from minifoundation.evaluate.likelihood import BRANCHING, Network, Score, Span, log_likelihoods, parted
from minifoundation.evaluate.mirror import first_line, go_offline_unless_reachable, sha256

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")
REMEDY = "write one with export_hf, or give a checkpoint, or the hub name of a model as org/name"


class Evaluated(Protocol):
    """What the harness needs of a model beside lm-eval's interface.

    Attributes:
        truncated: requests that were longer than the context, since it was last set to 0.
        label: of the benchmark that is asked for, which progress bars begin with.
    """

    truncated: int
    label: str

    @property
    def silent(self) -> bool:
        """Whether another process shows the progress bars."""

    @property
    def max_length(self) -> int: ...

    @property
    def source(self) -> Source: ...

    def together(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns here, or raise on every process what it raised on one."""

    def facts(self) -> dict[str, Any]:
        """Return what ``results.json`` says of the model."""


TRAINED = ("trained_tokens", "imported_from", "tokens_since_import")
"""What ``parity.json`` says of a model's training."""


@dataclass(frozen=True)
class Source:
    """Where a model came from: a name to show, and the hashes of its files."""

    name: str
    folder: Path
    """Holds the tokenizer's files."""
    sha256: dict[str, str]
    trained: Mapping[str, Any] = field(default_factory=dict)
    """What is known of its training, as ``parity.json`` has it: the keys of ``TRAINED``."""

    def facts(self) -> dict[str, Any]:
        """Return what is known of any model, whatever computes it."""
        return {"path": self.name, "trained_tokens": None, **self.trained, "sha256": self.sha256}


@dataclass(frozen=True)
class Loaded:
    """A model of transformers with its tokenizer."""

    network: Any
    tokenizer: Any
    source: Source


class Share(NamedTuple):
    """Which part of the requests is this process's, and how it comes by what the others have."""

    rank: int = 0
    size: int = 1
    of_all: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the value that each process calls it with, by rank."""


ALONE = Share()


class Model(HFLM):
    """lm-eval's Hugging Face model, its log-likelihoods by ``likelihood``, with a count of truncated requests.

    Several processes each have the whole model and answer a part of every call's requests; all return all answers, so that each goes
    through lm-eval as one alone would.

    Args:
        rows: rows in a batch; None fits them to the free memory.
    """

    def __init__(self, loaded: Loaded, *, rows: int | None, share: Share = ALONE) -> None:
        loaded.network.eval()
        super().__init__(pretrained=loaded.network, tokenizer=loaded.tokenizer, batch_size="auto", softmax_dtype="float32")
        self.source = loaded.source
        self.parts = Network(loaded.network)
        self.fixed_rows = rows
        self.share = share
        self.batch_tokens = _batch_tokens(self.parts)
        self.truncated = 0
        self.label = ""
        self._rows_to_generate = 1
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        described = backend.to_str() if backend is not None else json.dumps(loaded.tokenizer.get_vocab(), sort_keys=True)
        self._identity = hashlib.sha256(f"{described} {self.add_bos_token} {self.prefix_token_id}".encode()).hexdigest()

    @property
    def silent(self) -> bool:
        """Whether another process shows the progress bars."""
        return self.share.rank > 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of lm-eval's requests."""
        pairs = [request.args for request in requests]
        contexts = [place for place, (context, _) in enumerate(pairs) if context.strip()]
        found: dict[int, Encoded] = dict(
            zip(
                contexts,
                encoded_pairs([pairs[i] for i in contexts], self._encode, identity=self._identity, folder=cache_folder()),
                strict=True,
            )
        )
        spans: list[tuple[tuple[str, str], Any, Any]] = []
        for place, (context, continuation) in enumerate(pairs):
            if place in found:
                spans.append((("", ""), found[place].context, found[place].continuation))
            else:  # nothing but space before it: after the beginning-of-text token
                ids = self.tok_encode(context + continuation, add_special_tokens=False)
                first = [self.prefix_token_id] if ids[0] != self.prefix_token_id else []
                spans.append((("", ""), [*first, *ids][:1], [*first, *ids][1:]))
        return self._loglikelihood_tokens(spans, disable_tqdm=disable_tqdm)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same ids as ``tok_encode`` for each of ``texts``."""
        first = self.tokenizer.decode(self.prefix_token_id)
        if any(text.startswith(first) for text in texts):  # then lm-eval adds no second one
            return [self.tok_encode(text) for text in texts]
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids: list[list[int]] = self.tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, **options)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        spans = []
        for _, context, continuation in requests:
            tokens = np.concatenate([np.asarray(context, dtype=np.int64), np.asarray(continuation, dtype=np.int64)])
            kept = tokens[-(self.max_length + 1) :]  # a prompt too long loses its beginning
            self.truncated += len(kept) < len(tokens)
            spans.append(Span(kept, max(1, len(kept) - len(continuation))))
        places = parted([span.tokens for span in spans], self.share.size)
        mine = [spans[place] for place in places[self.share.rank]]

        def scored() -> list[Score]:
            silent = disable_tqdm or self.silent
            with tqdm(total=len(mine), desc=f"{self.label}: log-likelihoods", unit="request", leave=False, disable=silent) as bar:
                return log_likelihoods(self.parts, mine, batch_tokens=self.batch_tokens, rows=self.fixed_rows, done=bar.update)

        found: dict[int, Score] = {}
        for numbers, scores in zip(places, self._of_all(scored), strict=True):
            found.update(zip(numbers, scores, strict=True))
        return [(found[place].log_likelihood, found[place].is_greedy) for place in range(len(spans))]

    def _of_all(self, work: Callable[[], list[Any]]) -> list[list[Any]]:
        """Return what ``work`` gives each process, or raise on all of them what it raised on one."""
        if self.share.size == 1:
            return [work()]
        mine: Any
        try:
            mine = work()
        except UserError as error:
            mine = error
        except Exception as error:  # whatever it is: the others have to hear of it, or they would wait
            mine = RuntimeError(first_line(error))
        found = self.share.of_all(mine)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found

    def together(self, work: Callable[[], T]) -> T:
        """As ``Evaluated.together``: a process that went on alone would answer other requests than those that wait for it."""
        done: list[T] = []

        def mine() -> list[Any]:
            done.append(work())
            return []

        self._of_all(mine)
        return done[0]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        return self._rows_to_generate

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        prompts = [len(ids) for ids in self._encode([request.args[0] for request in requests])]
        room = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
        self.truncated += cut_prompts(prompts, room, self.max_length)
        longest = min(self.max_length, max(map(sum, zip(prompts, room, strict=True))))
        fitting = min(2 * self.batch_tokens // max(prompts), BRANCHING * self.batch_tokens // longest)  # reading prompts; holding caches
        self._rows_to_generate = self.fixed_rows or max(1, fitting)
        size = self.share.size
        shares = self._of_all(lambda: self._written(requests[self.share.rank :: size], disable_tqdm=disable_tqdm or self.silent))
        return [shares[place % size][place // size] for place in range(len(requests))]

    def _written(self, requests: Any, *, disable_tqdm: bool) -> list[str]:
        while requests:
            try:
                written: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
                return written
            except torch.OutOfMemoryError:
                if self._rows_to_generate == 1:
                    raise
                torch.cuda.empty_cache()
                self._rows_to_generate //= 2
        return []

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model: sizes, dtype, and the hash of every file that decides its answers."""
        return self.source.facts() | {
            "engine": f"transformers {transformers.__version__}",
            "architecture": self.model.config.architectures,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "max_length": self.max_length,
            "bos": self.tok_encode("a")[:1] == [self.tokenizer.bos_token_id],
            "batch_tokens": self.batch_tokens,
            "batch_rows": self.fixed_rows,
            "shares_prefixes": self.parts.branches,
        }


def cut_prompts(prompts: Sequence[int], room: Sequence[int], context: int) -> int:
    """Return how many prompts lose their beginning for what is generated after them to fit.

    Args:
        prompts: their lengths.
        room: tokens generated at most after each.

    Raises:
        UserError: the context is too short for what is generated alone.
    """
    if max(room) >= context:
        raise UserError("context", f"{max(room)} tokens are generated, the model reads {context}", "extend it with longft")
    return sum(prompt > context - new for prompt, new in zip(prompts, room, strict=True))


def _batch_tokens(network: Network) -> int:
    """Return how many tokens a batch may have, so that half of the free memory holds its activations, caches and branches of them."""
    config, width = network.model.config.get_text_config(), network.model.dtype.itemsize
    attention: int = getattr(config, "num_attention_heads", None) or 1  # a recurrent model has none
    heads: int = getattr(config, "num_key_value_heads", None) or attention
    head: int = getattr(config, "head_dim", None) or config.hidden_size // attention
    a_cached_token = 2 * config.num_hidden_layers * heads * head * width
    activations = 4 * width * (config.hidden_size + (getattr(config, "intermediate_size", None) or 4 * config.hidden_size))
    states = 12 * network.vocab_size if network.body is None else 0  # then every position has its logits
    if network.model.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(network.model.device)[0], 65_536
    else:
        free, most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), 4_096
    fitting: int = free // 2 // ((1 + BRANCHING) * a_cached_token + activations + states)
    return max(1, min(most, fitting))


def default_device(asked: str | None) -> str:
    """Return the device to compute on: the one asked for, else the GPU where there is one."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def source_of(path: str) -> Source:
    """Return the folder ``path``, or that of the model of the hub under that name, as where a model comes from.

    Raises:
        UserError: no model there.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _downloaded(path)
    check_folder(folder, "--model_path")
    files = [one for one in sorted(folder.iterdir()) if one.suffix in (".safetensors", ".bin", ".json", ".model") and one.is_file()]
    try:
        proof = dict(json.loads((folder / "parity.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or another's file of that name: nothing is known then
        proof = {}
    return Source(path, folder, {one.name: sha256(one) for one in files}, {name: proof[name] for name in TRAINED if name in proof})


def from_folder(path: str, *, dtype: str, device: str | None) -> Loaded:
    """Return the model in folder ``path``, or on the hub under that name.

    Args:
        dtype: fp32, bf16, fp16, or auto: as stored, and fp32 on a CPU, where bf16 takes five times as long.

    Raises:
        UserError: no model there, or one that transformers cannot load.
    """
    source = source_of(path)
    where = default_device(device)
    stored: Any = "auto" if where != "cpu" else torch.float32
    network, tokenizer = loaded(source.folder, "--model_path", dtype=DTYPES.get(dtype, stored))
    return Loaded(placed(network, where), tokenizer, source)


def placed(network: Any, device: str) -> Any:
    """Return the model on ``device``; raises a UserError when it does not fit, or there is none."""
    try:
        return network.to(device)
    except torch.OutOfMemoryError:
        raise UserError("--device", f"the model does not fit the memory of {device}", "give --dtype bf16, or --device cpu") from None
    except (RuntimeError, AssertionError) as error:
        raise UserError("--device", f"{device} does not work here ({first_line(error)})", "give cuda or cpu") from None


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    checkpoint = name.endswith(".pth") or Path(name).name.startswith("step_")
    if checkpoint or name.count("/") != 1 or name.startswith((".", "/", "outputs/")):
        raise UserError("--model_path", f"{name}: no such {'checkpoint' if checkpoint else 'folder'}", REMEDY)
    go_offline_unless_reachable()
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError):
        raise UserError("--model_path", f"{name}: no such folder, and not to be had from the hub", REMEDY) from None
