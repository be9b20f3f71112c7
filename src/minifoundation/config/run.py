"""The settings of a run: model, tokenizer, data, training; each with its bounds, its default and where that comes from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from minifoundation.config.setting import Settings, may_be_path, setting


class RopeConfig(Settings):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling to longer contexts."""

    theta: float = setting(10_000.0, gt=1, help="base of the RoPE frequencies [RoFormer, Llama 2: 10,000]")
    scaling: Literal["none", "linear", "ntk", "yarn", "theta", "llama3"] = setting(
        "none",
        help="RoPE scaling for longer contexts (docs/long-context.md). linear: position interpolation (arXiv:2306.15595); ntk: "
        "static NTK-aware larger base; yarn: arXiv:2309.00071; theta: larger base, by the rule of arXiv:2310.05209; llama3: as "
        "in Llama 3.1 and 3.2",
    )
    factor: float = setting(
        1.0,
        ge=1,
        le=1_000_000,
        help="how many times longer the context becomes, relative to original_seq_len; with scaling none the frequencies do not change",
    )
    beta_fast: float = setting(32.0, gt=0, help="YaRN: frequencies with more rotations than this over the original length are not scaled")
    beta_slow: float = setting(1.0, gt=0, help="YaRN: frequencies with fewer rotations than this are fully interpolated")
    low_freq_factor: float = setting(
        1.0,
        gt=0,
        help="llama3: frequencies with fewer rotations than this over the original length are divided by the factor [Llama 3.1: 1]",
    )
    high_freq_factor: float = setting(4.0, gt=0, help="llama3: frequencies with more rotations than this are not scaled [Llama 3.1: 4]")
    max_seq_len: int | None = setting(
        None,
        ge=8,
        help="llama3: context length after scaling, if it is not original_seq_len x factor [Llama 3.1 and 3.2: 131,072 from 8,192, "
        "with factors of 8 and 32]",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} must be larger than beta_slow {self.beta_slow:g}")
        if self.high_freq_factor <= self.low_freq_factor:
            problem = f"high_freq_factor {self.high_freq_factor:g} must be larger than low_freq_factor {self.low_freq_factor:g}"
            raise ValueError(problem)
        if self.max_seq_len is not None and self.scaling != "llama3":
            raise ValueError(f"max_seq_len {self.max_seq_len} is a setting of scaling llama3, and scaling is {self.scaling}; leave it out")
        return self


WIDEST, DEEPEST = 2**24, 10_000
"""Of a model, beyond any that there is: a size with a slip in it is refused, and not tried for hours."""


class ModelConfig(Settings):
    """A dense decoder in the layout of Llama (or Qwen3 when ``qk_norm`` is on)."""

    vocab_size: int = setting(
        59_392, ge=8, le=WIDEST, multiple_of=8, help="rows of the embedding: the tokenizer's size, padded to a multiple of 128"
    )
    d_model: int = setting(help="width of the residual stream", ge=8, le=WIDEST)
    n_layer: int = setting(help="number of blocks", ge=1, le=DEEPEST)
    n_head: int = setting(help="query heads", ge=1, le=WIDEST)
    n_kv_head: int = setting(help="key/value heads; fewer than n_head means grouped-query attention (arXiv:2305.13245)", ge=1)
    head_dim: int | None = setting(
        None, ge=2, le=WIDEST, help="width of a head; none: d_model/n_head [Qwen3-0.6B: 16 heads of 128 at d_model 1024]"
    )
    d_ff: int = setting(
        help="inner width of SwiGLU (arXiv:2002.05202); 8/3 d_model has as many weights as an older MLP of 4 d_model", ge=8, le=WIDEST
    )
    original_seq_len: int = setting(4096, ge=8, help="context length before any RoPE scaling: that of pretraining")
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = setting(False, help="RMSNorm on queries and keys, per head (arXiv:2302.05442; Qwen3)")
    norm_eps: float = setting(1e-5, gt=0, help="epsilon of RMSNorm [Llama 2: 1e-5]")
    tie_embeddings: bool = setting(True, help="one matrix for the embedding and the output head (arXiv:1608.05859)")
    dropout: float = setting(0.0, ge=0, lt=1, help="dropout on the residual branches [Llama, PaLM: 0 in pretraining]")
    init_std: float | None = setting(
        None,
        gt=0,
        help="standard deviation of the initial weights; none: 0.3/sqrt(d_model), so that the loss of a tied head begins within 1% "
        "of ln V [DeepSeek LLM, arXiv:2401.02954: 0.006 at 4096 = 0.38/sqrt]; matrices that write to the residual stream are "
        "divided by sqrt(2 n_layer) [GPT-2]",
    )
    attention: Literal["auto", "flash4", "cudnn", "flash", "flex", "efficient", "math"] = setting(
        "auto",
        help="attention kernel; auto times those that can run, at the first start, and keeps the fastest; flash4 is FlashAttention 4"
        " (pip install flash-attn-4)",
    )
    swiglu: Literal["auto", "quack", "own"] = setting(
        "auto",
        help="how SwiGLU is computed in half precision. quack: inside the neighbouring matrix products (pip install quack-kernels); "
        "own: by a separate kernel; auto: quack where it is installed and works",
    )
    checkpointing: Literal["none", "attention", "offload", "full"] = setting(
        "none",
        help="activation checkpointing of a block. none: keep the outputs of products and attention (in half precision, cheap steps "
        "are recomputed even so); attention: keep the attention outputs, recompute the rest; offload: the same, kept in host "
        "memory; full: recompute everything",
    )
    checkpoint_every: int = setting(1, ge=1, help="apply checkpointing to every k-th block")

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_head

    @property
    def max_seq_len(self) -> int:
        """Tokens of context the RoPE settings reach."""
        stated = self.rope.max_seq_len
        return stated if stated is not None else math.floor(self.original_seq_len * self.rope.factor)

    @property
    def weight_std(self) -> float:
        return self.init_std if self.init_std is not None else 0.3 / math.sqrt(self.d_model)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_head:
            problem = f"d_model {self.d_model} is not divisible by n_head {self.n_head}"
            raise ValueError(f"{problem}; choose n_head among its divisors, or set head_dim")
        if self.head_width % 2:
            which = "d_model/n_head" if self.head_dim is None else "head_dim"
            raise ValueError(f"head width {which} = {self.head_width} is odd; RoPE needs an even width")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}; choose n_kv_head among its divisors")
        if self.max_seq_len < self.original_seq_len:
            problem = f"rope.max_seq_len {self.max_seq_len} is shorter than original_seq_len {self.original_seq_len}"
            raise ValueError(f"{problem}; leave it out, or correct one of them")
        return self


class TokenizerConfig(Settings):
    """The tokenizer: a given SentencePiece model, or one trained on a sample of the corpus."""

    path: Path | None = setting(
        None,
        flag="tokenizer",
        help="tokenizer to use: a SentencePiece .model, or a Hugging Face tokenizer.json; none: train one on the corpus",
    )
    kind: Literal["unigram", "bpe"] = setting(
        "unigram", help="kind of tokenizer to train: Unigram (arXiv:1804.10959) or BPE (arXiv:1508.07909), both with byte fallback"
    )
    vocab_size: int = setting(59_392, ge=512, le=1_000_000, help="pieces to train; reduced, with a warning, if the text has too few")
    sample_bytes: int = setting(100_000_000, ge=1_000, help="most bytes of text to train the tokenizer on")


QualityFilter = Literal["gopher-quality", "gopher-repetition", "c4", "fineweb"]


class DataConfig(Settings):
    """Where the text comes from and how it becomes token shards."""

    source: str | None = setting(
        None,
        help="corpus: fineweb, fineweb-edu, slimpajama, org/name[:subset] of the Hugging Face Hub, or a path, glob or URL (hf://, "
        "s3://, https://) of .txt, .jsonl, .parquet, plain or .gz/.zst/.xz",
        flag="data",
    )
    mix: dict[str, float] | None = setting(
        None,
        help="several corpora by weight, instead of one. In YAML {fineweb-edu: 0.8, path/to/code: 0.2}, here "
        "fineweb-edu=0.8,path/to/code=0.2",
    )
    text_column: str = setting(
        "text",
        help="column or JSON key of the text; several with commas, as text,content, where sources call it differently: the first there is",
    )
    filters: tuple[QualityFilter, ...] = setting(
        (),
        help="quality filters for raw English text, applied in the order given: Gopher (arXiv:2112.11446), C4 (arXiv:1910.10683), FineWeb"
        " (arXiv:2406.17557)",
    )
    dedup: Literal["none", "exact", "minhash"] = setting(
        "none",
        help="drop documents that equal an earlier one (exact), or nearly equal one (minhash, arXiv:2107.06499); reads the whole "
        "corpus first",
    )
    mask_documents: bool = setting(False, help="keep attention within each document, and restart positions there")
    min_tokens: int | Literal["auto"] | None = setting(
        None,
        help="documents with at least this many tokens are long: rows begin with them, they are read more often, and short documents"
        " are packed. auto: half a row; none: cut rows from the stream of all documents",
    )
    long_share: float = setting(
        0.6,
        gt=0,
        le=1,
        help="share of the rows that begin with a long document [arXiv:2410.02660: 60%]; higher if the text has more of them",
    )
    long_repeats: float = setting(
        4.0,
        gt=0,
        help="how many times long documents are read at most to reach that share [arXiv:2305.16264: four are nearly as good as new text]",
    )
    search_tokens: int | None = setting(
        None, ge=1, help="tokens of the corpus to search for long documents before training; none: as many as are trained on"
    )
    shards_dir: Path = setting(Path("outputs/shards"), help="folder of the token shards, with one subfolder per corpus and tokenizer")
    shard_tokens: int = setting(16_777_216, ge=1_024, help="tokens in a shard; samples are shuffled within a shard")
    held_out: float = setting(0.002, ge=0, le=0.5, help="share of the documents, chosen by hash, that is never trained on")
    held_out_tokens: int = setting(2_000_000, ge=1_024, help="most tokens to keep of the held-out split")
    max_document_bytes: int = setting(4_194_304, ge=256, help="longer documents are cut at line ends into documents of this size")
    workers: int | None = setting(None, ge=1, help="processes that make shards; none: one per core")

    @field_validator("mix", mode="before")
    @classmethod
    def _mix_in_words(cls, value: Any) -> Any:
        """``a=0.8,b=0.2`` of a command line is YAML's ``{a: 0.8, b: 0.2}``."""
        if not isinstance(value, str):
            return value
        parts = [part.rpartition("=") for part in value.split(",")]
        if not all(name and weight for name, _, weight in parts):
            raise ValueError(f"{value!r} is not a mixture; write source=weight,source=weight")
        mix = {name.strip(): weight for name, _, weight in parts}
        if len(mix) < len(parts):
            raise ValueError(f"{value!r} names a source twice; give each its weight once")
        return mix

    @field_validator("source")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; give a corpus, a path or an address")
        return value

    @field_validator("text_column")
    @classmethod
    def _names_columns(cls, value: str) -> str:
        if not all(part.strip() for part in value.split(",")):
            raise ValueError(f"is {value!r}; give the name of a column, or several with commas between them")
        return value

    @field_validator("min_tokens")
    @classmethod
    def _at_least_two(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 2:
            raise ValueError("must be at least 2, auto or none")
        return value

    @field_validator("filters", mode="before")
    @classmethod
    def _filters_in_words(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_corpus(self) -> Self:
        if self.source is None and self.mix is None:
            raise ValueError("neither data.source nor data.mix is set; give --data, or a mixture in the YAML")
        if self.source is not None and self.mix is not None:
            raise ValueError(f"data.source is {self.source}, and data.mix is set too; give one of them, and none for the other")
        for name, weight in (self.mix or {}).items():
            if weight <= 0:
                raise ValueError(f"the weight of {name} in data.mix is {weight:g}; give a number above 0, or leave it out")
        if self.mix == {}:
            raise ValueError("data.mix is empty; name a source and its weight")
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns to look for the text in, the first there is counts: ``text_column`` itself, which may have a comma, then its parts."""
        return tuple(dict.fromkeys((self.text_column, *(part.strip() for part in self.text_column.split(",")))))

    @property
    def weights(self) -> dict[str, float]:
        """The share of each source in the training tokens, summing to 1; one source has all."""
        if self.source is not None:
            return {self.source: 1.0}
        assert self.mix is not None
        total = sum(self.mix.values())
        return {name: weight / total for name, weight in self.mix.items()}


class TrainConfig(Settings):
    """One phase of training: pretraining or context extension."""

    tokens: int = setting(help="training tokens in total", flag="tokens", ge=1, le=10**15)
    seq_len: int = setting(4096, ge=8, flag="seq_len", help="tokens in a row (one training sequence)")
    batch_size: int | Literal["auto"] = setting(1, flag="batch_size", help="rows in a micro-batch on each device; auto: the most that fit")
    grad_accum: int = setting(
        1,
        ge=1,
        flag="grad_accum",
        help="micro-batches in a step on each device; with --batch_size auto: rows in a step, split as they fit",
    )
    tokens_per_step: int | None = setting(
        None,
        ge=1,
        help="tokens in a step over all processes. It replaces grad_accum, so that the run is the same on any number of processes",
    )
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = setting(
        "auto",
        help="how the processes of torchrun share the model. ddp: a copy on each, and a part of the optimizer (ZeRO-1, arXiv:1910.02054); "
        "fsdp: sharded over all (FSDP2, arXiv:2304.11277); "
        "hsdp: sharded within each node; auto: ddp if a copy fits in memory, else hsdp or fsdp",
    )
    context_parallel: int = setting(
        1,
        ge=1,
        help="processes that share each row, for rows that one device cannot hold, or is too slow with (arXiv:2407.21783, section 3.3.2)",
    )
    reduce_precision: Literal["fp32", "bf16"] = setting("fp32", help="dtype of the gradients that processes exchange")
    rank_timeout: float = setting(
        45.0,
        gt=0,
        help="seconds in a step after which a process that hangs is named and all stop; at least five steps",
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = setting(
        "fp32",
        help="dtype of compute; weights, gradients and optimizer stay fp32. --amp --bf16 means bf16; --amp alone fp16 with loss "
        "scaling; fp8 is bf16 with all matrix products but one in 8 bits (experimental, docs/speed.md)",
    )
    compile: bool = setting(False, flag="compile", help="torch.compile for each block")
    lr: float = setting(
        6e-4, gt=0, flag="lr", help="peak learning rate [GPT-3 125M-350M, arXiv:2005.14165: 6e-4 to 3e-4; see docs/numerics.md]"
    )
    schedule: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", help="learning rate schedule: cosine [Llama 2], constant, or warm-up-stable-decay (arXiv:2404.06395)"
    )
    warmup: float = setting(
        0.05, ge=0, lt=1, help="share of the steps in which the rate rises linearly [arXiv:2309.14322: 5%, for stability]"
    )
    decay: float = setting(0.1, gt=0, le=1, help="wsd: share of the steps, at the end, in which the rate falls [MiniCPM: 10%]")
    min_lr: float = setting(0.1, ge=0, le=1, help="final rate as a share of the peak [Llama 2, arXiv:2307.09288: 10%]")
    weight_decay: float = setting(
        0.1, ge=0, help="AdamW weight decay of matrices; embeddings, norms and biases have none [Llama 2: 0.1; OLMo 2: none on embeddings]"
    )
    beta1: float = setting(0.9, ge=0, lt=1, help="AdamW beta1 (arXiv:1711.05101) [GPT-3, Llama 2: 0.9]")
    beta2: float = setting(0.95, ge=0, lt=1, help="AdamW beta2 [GPT-3, Llama 2: 0.95]")
    eps: float = setting(1e-8, gt=0, help="AdamW epsilon [GPT-3, Pythia: 1e-8]")
    optimizer_states: Literal["fp32", "int8"] = setting("fp32", help="dtype of AdamW's moments; int8 (arXiv:2110.02861) needs torchao")
    grad_clip: float | None = setting(1.0, gt=0, help="largest gradient norm; none: no clipping [GPT-3, Llama 2: 1.0]")
    z_loss: float = setting(1e-4, ge=0, help="weight of log(Z)^2 in the loss; 0: off [PaLM, arXiv:2204.02311: 1e-4]")
    loss_chunk: int = setting(8192, ge=1, help="tokens whose logits the loss holds at once")
    ema: float | None = setting(None, gt=0, lt=1, help="decay of an exponential moving average of the weights; none: off")
    seed: int = setting(1234, ge=0, lt=2**63, flag="seed", help="seed of the weights, the order of samples and dropout")
    log_every: int = setting(1, ge=1, help="steps between lines of metrics.csv")
    eval_every: int = setting(250, ge=1, help="steps between evaluations on the held-out split")
    eval_tokens: int = setting(262_144, ge=1, help="held-out tokens read in each evaluation")
    save_every: int = setting(500, ge=1, help="steps between checkpoints")
    keep: int = setting(2, ge=1, help="how many step checkpoints to keep; older ones are removed")
    keep_every: int | None = setting(None, ge=1, help="also keep each checkpoint whose step is a multiple of this; none: no others")
    async_save: bool = setting(True, help="write checkpoints in the background, from a copy in host memory")
    if_save_fails: Literal["stop", "continue"] = setting(
        "stop", help="what to do if a checkpoint cannot be written, for example on a full disk"
    )
    max_hours: float | None = setting(None, gt=0, help="save and stop after this many hours; none: no limit")
    spike_z: float | None = setting(
        10.0,
        gt=0,
        help="skip a step if its loss or gradient norm is this many robust standard deviations above the median of earlier steps; "
        "none: skip only non-finite ones [OLMo 2, arXiv:2501.00656, takes 6 plain ones; see docs/reliability.md]",
    )
    spike_window: int = setting(128, ge=16, help="number of earlier good steps that spikes are compared with [OLMo 2: 128]")
    max_skips: int = setting(8, ge=1, help="skipped steps in a row after which the run goes back to the last good checkpoint")
    max_rollbacks: int = setting(3, ge=0, help="how many times a run may go back, each time skipping the bad samples, before it stops")
    deterministic: bool = setting(False, help="use kernels that give the same bits in every run; slower on a GPU (docs/reliability.md)")
    tensorboard: bool = setting(False, help="also write TensorBoard events to <out_dir>/tensorboard")

    @model_validator(mode="after")
    def _one_size_of_step(self) -> Self:
        if self.tokens_per_step is not None and self.grad_accum != 1:
            raise ValueError(
                f"tokens_per_step is {self.tokens_per_step:,}, and grad_accum {self.grad_accum} too; leave grad_accum out: it follows"
            )
        return self

    @model_validator(mode="after")
    def _rises_before_it_falls(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than all steps together; lower one of them")
        return self

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value


class EvalConfig(Settings):
    """Benchmarks on the weights as they are, during training."""

    every_steps: int | None = setting(None, ge=1, help="steps between runs of eval.tasks, whose scores go to metrics.csv; none: never")
    tasks: str = setting("quick", help="a suite (quick, paper), names separated by commas, or a file with one task per line, as for eval")
    limit: int = setting(0, ge=0, help="documents of each task; 0: all, or as many as its line says")
    data_dir: Path | None = setting(None, help="mirror folder to read benchmarks from instead of the hub (eval-data pull writes one)")
    ema: bool = setting(False, help="evaluate the averaged weights instead of the current ones")

    _tasks = field_validator("tasks")(may_be_path)


class RunConfig(Settings):
    """Everything a run is made of; written to ``<out_dir>/config.yaml`` and stored in each checkpoint."""

    out_dir: Path = setting(Path("outputs/pretrain"), flag="out_dir", help="folder of the run")
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    def replaced(self, **sections: dict[str, Any]) -> Self:
        """Return a copy with some settings of its sections replaced, ``replaced(train={"grad_accum": 2})``; none is checked again."""
        return self.model_copy(update={name: getattr(self, name).model_copy(update=values) for name, values in sections.items()})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train.precision == "fp8":
            self._fits_8_bits()
        if self.train.context_parallel > 1:
            self._shares_rows()
        if self.eval.every_steps is not None and self.eval.ema and self.train.ema is None:
            raise ValueError("eval.ema is on, but train.ema is none; leave eval.ema out, or average weights with --train.ema 0.999")
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len {self.train.seq_len} is longer than the model's {self.model.max_seq_len} "
                f"({self._reach}); shorten it, or extend the model with longft"
            )
        return self

    @property
    def _reach(self) -> str:
        return "model.original_seq_len x model.rope.factor" if self.model.rope.max_seq_len is None else "model.rope.max_seq_len"

    def _shares_rows(self) -> None:
        processes, seq_len = self.train.context_parallel, self.train.seq_len
        chunks = 2 * processes * (8 if self.train.precision == "fp8" else 1)
        if seq_len % chunks:
            raise ValueError(
                f"train.seq_len {seq_len} is not a multiple of {chunks}, as train.context_parallel {processes} needs "
                f"(two chunks of a row for each process); set it to {max(1, round(seq_len / chunks)) * chunks}"
            )
        if self.model.attention == "cudnn":
            raise ValueError(
                f"model.attention cudnn cannot read a row in chunks, as train.context_parallel {processes} does; take auto, flash4 or flash"
            )

    def _fits_8_bits(self) -> None:
        model, train = self.model, self.train
        widths = {
            "model.d_model": model.d_model,
            "model.n_head x head width": model.n_head * model.head_width,
            "(model.n_head + 2 n_kv_head) x head width": (model.n_head + 2 * model.n_kv_head) * model.head_width,
            "model.d_ff": model.d_ff,
            "model.vocab_size": model.vocab_size,
            "train.seq_len": train.seq_len,
            "train.loss_chunk": train.loss_chunk,
        }
        for name, width in widths.items():
            if width % 16:
                raise ValueError(f"{name} {width} is not a multiple of 16, which train.precision fp8 needs; choose one, or take bf16")
        if model.dropout:
            raise ValueError(f"model.dropout {model.dropout:g} does not work with train.precision fp8; set it to 0, or take bf16")
