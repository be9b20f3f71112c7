"""What each command takes beside the settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator

from minifoundation.config.reading import dotted_names, nearest
from minifoundation.config.run import DataConfig, RunConfig, TokenizerConfig
from minifoundation.config.setting import Settings, from_home, may_be_path, setting

REPOSITORY = Path(__file__).resolve().parents[3]
"""The clone this package is installed from; ``configs/`` lies here."""


def _folders(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = [value] if Path(from_home(value)).exists() else value.split(",")
    return [from_home(part.strip()) for part in parts if part.strip()]


Folders = Annotated[tuple[Path, ...], BeforeValidator(_folders)]
"""``a,b`` on a command line, where a shell reads only the first ``~``; a path that is there can hold a comma."""


def _encodable(text: str | None) -> str | None:
    """Return ``text`` that is read or shown; the bytes of a terminal in another encoding come as half surrogate pairs."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ValueError("is not text in UTF-8; set the terminal to UTF-8 (its locale, or PYTHONUTF8=1) and type it again") from None
    return text


class RunOptions(Settings):
    """What every command that takes the settings of a run takes beside them."""

    config: Path | None = setting(None, flag="config", help="YAML file with settings")
    amp: bool = setting(False, flag="amp", help="mixed precision: fp16 with loss scaling, or bf16 with --bf16")
    bf16: bool = setting(False, flag="bf16", help="bf16 compute with fp32 weights; the same as --amp --bf16")


class PhaseOptions(RunOptions):
    """``pretrain`` and ``longft``: the same, and whether to go on or only to plan."""

    resume: str | None = setting(
        None,
        flag="resume",
        help="auto: continue from the latest good checkpoint in out_dir; PATH: continue from that one; none: begin, in an unused folder",
    )
    allow_change: tuple[str, ...] = setting(
        (),
        flag="allow_change",
        help="settings that may differ from those of the checkpoint although they change the result: train.lr,train.warmup",
    )
    dry_run: bool = setting(False, flag="dry_run", help="print the plan (steps, parameters, FLOPs, memory, time) and stop")

    _checkpoint = field_validator("resume")(may_be_path)

    @field_validator("allow_change", mode="before")
    @classmethod
    def _names_in_words(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("allow_change")
    @classmethod
    def _names_of_settings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = dotted_names(RunConfig)
        for name in value:
            if name not in known:
                near = nearest(name, known)
                raise ValueError(f"{name!r} is not a setting of a run; " + (f"did you mean {near}?" if near else "--help lists them"))
        return value


class PretrainOptions(PhaseOptions):
    """``pretrain``: the same, and what to begin from when it is not random weights."""

    init_from: Path | None = setting(
        None,
        flag="init_from",
        help="begin from these weights, with their tokenizer: final.pth, a step folder, or a Llama or Qwen3 folder of Hugging Face",
    )


class LongftOptions(PhaseOptions):
    """``longft``: the same, and the model to begin from."""

    ckpt_in: Path = setting(
        help="the model to extend: final.pth, a step folder, or a Llama or Qwen3 folder of Hugging Face", flag="ckpt_in"
    )
    carry_optimizer: bool = setting(
        False,
        flag="carry_optimizer",
        help="keep the optimizer's moments of ckpt_in, which must be a step folder; by default they start fresh",
    )
    proof_documents: int = setting(
        200, ge=0, flag="proof_documents", help="long held-out documents on which loss by position is compared before and after; 0: none"
    )
    proof_data: str | None = setting(
        None,
        flag="proof_data",
        help="text that was not trained on, as for --data, for these documents and for hiding needles. Reads as many tokens as are "
        "trained on, or data.search_tokens, at least two million; none: the held-out split",
    )
    needles: int = setting(2, ge=0, flag="needles", help="needle prompts of each task, length and depth; 0: none")


class BenchOptions(RunOptions):
    """``bench``: what this machine does with the settings of a run."""

    steps: int = setting(10, ge=2, flag="steps", help="measured steps, after three warm-up steps")
    json_out: Path | None = setting(None, flag="json", help="also write the figures to this file")
    fit: tuple[float, ...] = setting((), flag="fit", help="only predict what fits on GPUs of these sizes in GiB: --fit 24,40,80")

    @field_validator("fit", mode="before")
    @classmethod
    def _sizes_in_words(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("fit")
    @classmethod
    def _sizes_above_nothing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if none := [size for size in value if size <= 0]:
            raise ValueError(f"{none[0]:g} GiB is not a memory size; give numbers above 0")
        return value


class PrepareOptions(Settings):
    """``prepare``: corpus to token shards, by hand."""

    config: Path | None = setting(None, flag="config", help="YAML file with settings (data, tokenizer)")
    tokens: int | None = setting(None, ge=1, flag="tokens", help="stop after this many training tokens; none: read the whole corpus")
    tokenizer_out: Path = setting(
        Path("outputs/tokenizer"), flag="tokenizer_out", help="folder for a trained tokenizer; one that is already there is used"
    )
    engine: Literal["local", "ray", "slurm"] = setting(
        "local",
        flag="engine",
        help="where to work. local: processes of this machine (under torchrun: of all its machines); ray: a Ray cluster; slurm: Slurm jobs",
    )
    slurm: str | None = setting(None, flag="slurm", help="for --engine slurm: any long options of sbatch, as partition=cpu,time=04:00:00")
    rebuild: bool = setting(False, flag="rebuild", help="first check every shard by its sha256, and make damaged or missing ones again")


class PrepareConfig(Settings):
    """The part of a run that ``prepare`` needs."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig


class InspectOptions(Settings):
    """``inspect``: what is in token shards, and what a checkpoint has read."""

    shards: Path | None = setting(None, flag="shards", help="a folder of token shards (prepare prints it)")
    checkpoint: Path | None = setting(
        None, flag="checkpoint", help="final.pth or a step folder: print how far it is and what data it has read"
    )
    tokenizer: Path | None = setting(None, flag="tokenizer", help="the tokenizer of the shards: print decoded samples")
    samples: int = setting(3, ge=1, flag="samples", help="number of samples to print")
    plot: Path | None = setting(None, flag="plot", help="write a histogram of document lengths to this .png")
    verify: bool = setting(False, flag="verify", help="read every file and compare its sha256")


class ExportOptions(Settings):
    """``export_hf``: checkpoint to Hugging Face folder, with proof of parity."""

    ckpt: Path = setting(help="final.pth or a step folder", flag="ckpt")
    out_dir: Path = setting(Path("outputs/hf_export"), flag="out_dir", help="folder to write")
    dtype: Literal["fp32", "bf16", "fp16"] = setting("bf16", flag="dtype", help="dtype of the exported weights")
    ema: bool = setting(False, flag="ema", help="export the averaged weights instead")
    max_shard_bytes: int = setting(
        5_000_000_000,
        ge=1_000,
        flag="max_shard_bytes",
        help="largest weights file; larger weights become several files with an index [huggingface_hub: 5 GB]",
    )
    gguf: tuple[Literal["f16", "q8_0"], ...] = setting(
        (),
        flag="gguf",
        help="also write llama.cpp files, for example f16,q8_0, and compare what llama.cpp computes (pip install -e '.[gguf]')",
    )

    @field_validator("gguf", mode="before")
    @classmethod
    def _types_in_words(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class ImportOptions(Settings):
    """``import_hf``: Hugging Face folder to checkpoint, with proof of parity."""

    model_path: Path = setting(help="folder of a LlamaForCausalLM or Qwen3ForCausalLM in safetensors", flag="model_path")
    out_dir: Path = setting(Path("outputs/import"), flag="out_dir", help="folder to write final.pth into")


class EvalOptions(Settings):
    """``eval``: benchmarks of a model through lm-eval."""

    model_path: str = setting(
        help="a Hugging Face folder, ours or any other; final.pth or a step folder; or org/name of the hub", flag="model_path"
    )
    tasks: str = setting(
        str(REPOSITORY / "configs" / "tasks.txt"),
        flag="tasks",
        help="a suite (quick, paper, code, long), names separated by commas, or a file with one task per line",
    )
    limit: int = setting(0, ge=0, flag="limit", help="documents of each task; 0: all")
    batch_size: int | None = setting(None, ge=1, flag="batch_size", help="rows in a batch; none: as many as fit in memory")
    data_dir: Path | None = setting(
        None, flag="data_dir", help="mirror folder <org>/<name>/<config>/<split>.parquet to read benchmarks from instead of the hub"
    )
    out_dir: Path | None = setting(
        None,
        flag="out_dir",
        help="folder of results.json and report.md; none: <model_path>/eval, beside a checkpoint, or outputs/eval/<name>",
    )
    beside: Folders = setting((), flag="beside", help="result folders of other models: their scores become columns")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", flag="dtype", help="dtype of the weights in memory; auto: as stored (a checkpoint: bf16), fp32 on a CPU"
    )
    engine: Literal["transformers", "vllm"] = setting(
        "transformers", flag="engine", help="transformers, or vLLM, which takes folders and names of the hub"
    )
    ema: bool = setting(False, flag="ema", help="evaluate the averaged weights of a checkpoint")
    device: str | None = setting(None, flag="device", help="cuda or cpu; none: cuda if there is one")
    allow_code_exec: bool = setting(
        False, flag="allow_code_exec", help="run programs written by the model (HumanEval, MBPP) in a sandboxed process"
    )

    _paths = field_validator("model_path", "tasks")(may_be_path)


class PullOptions(Settings):
    """``eval-data pull``: benchmark data from the hub to a mirror folder."""

    data_dir: Path = setting(help="mirror folder to write: <org>/<name>/<config>/<split>.parquet and manifest.json", flag="data_dir")
    tasks: str = setting("paper", flag="tasks", help="tasks whose data to pull: a suite, names separated by commas, or a file, as for eval")

    _tasks = field_validator("tasks")(may_be_path)


class CheckOptions(Settings):
    """``eval-data check``: whether a mirror folder is whole."""

    data_dir: Path = setting(help="mirror folder to read", flag="data_dir")
    tasks: str = setting("paper", flag="tasks", help="tasks whose data must be there: a suite, names separated by commas, or a file")
    seal: bool = setting(False, flag="seal", help="rewrite the manifest from the files as they are")

    _tasks = field_validator("tasks")(may_be_path)


class ContaminationOptions(Settings):
    """``contamination``: test items in the training text."""

    ckpt: Path | None = setting(None, flag="ckpt", help="final.pth or a step folder; takes its tokenizer and the shards in its ledger")
    shards: Path | None = setting(None, flag="shards", help="instead of a checkpoint: a folder of token shards, with --tokenizer")
    tokenizer: Path | None = setting(None, flag="tokenizer", help="the tokenizer of --shards")
    tasks: str = setting(
        "paper", flag="tasks", help="tasks whose items to look for: a suite, names separated by commas, or a file, as for eval"
    )
    data_dir: Path | None = setting(None, flag="data_dir", help="mirror folder to read benchmarks from instead of the hub")
    evals: Folders = setting((), flag="evals", help="result folders of eval: print their scores on clean and dirty items")
    workers: int | None = setting(None, ge=1, flag="workers", help="processes that read shards; none: one per core")
    out: Path | None = setting(None, flag="out", help="file to write; none: contamination.json beside the checkpoint or the shards")

    _tasks = field_validator("tasks")(may_be_path)


class ReportOptions(Settings):
    """``report``: one HTML page and a model card."""

    runs: Folders = setting((), flag="runs", help="run folders of pretrain and longft, in training order")
    evals: Folders = setting(
        (), flag="evals", help="result folders of eval; the first gives the table, all of them the scores over training tokens"
    )
    out_dir: Path = setting(Path("outputs/report"), flag="out_dir", help="folder for report.html and README.md (the model card)")
    name: str | None = setting(None, flag="name", help="name of the model; none: that of the evaluated or trained folder")
    vendors: str | None = setting(
        None,
        flag="vendors",
        help="models of configs/baselines.yaml to compare with, separated by commas; none: those listed there under beside",
    )
    beside: Folders = setting((), flag="beside", help="result folders of other models: their scores become columns")
    contamination: Path | None = setting(None, flag="contamination", help="contamination.json to use; none: the one beside the last run")
    license: str | None = setting(
        None, flag="license", help="license of the weights, as the hub spells it (apache-2.0); none: the card states none"
    )
    price_per_hour: float | None = setting(
        None, ge=0, flag="price_per_hour", help="price of the machine, in any currency: adds the cost of training"
    )
    watts: float | None = setting(None, ge=0, flag="watts", help="power draw of the machine: adds the energy of training")

    _text = field_validator("name", "license")(_encodable)


class GenerateOptions(Settings):
    """``generate``: a prompt in, text out."""

    model: Path = setting(help="a checkpoint (final.pth, step folder) or an exported folder", flag="model")
    prompt: str = setting(help="the text to continue", flag="prompt")
    max_new_tokens: int = setting(128, ge=1, flag="max_new_tokens", help="most tokens to generate")
    temperature: float = setting(0.8, ge=0, flag="temperature", help="sampling temperature; 0: greedy")
    top_p: float = setting(0.95, gt=0, le=1, flag="top_p", help="nucleus sampling (arXiv:1904.09751)")
    seed: int = setting(1234, ge=0, lt=2**63, flag="seed", help="seed of the sampling")

    _prompt = field_validator("prompt")(_encodable)


class ServeOptions(Settings):
    """``serve``: a model behind an address."""

    model: Path = setting(help="a checkpoint (final.pth, step folder) or an exported folder", flag="model")
    host: str = setting(
        "127.0.0.1", flag="host", help="address to listen on; 0.0.0.0: all addresses of this machine, open to everyone who can reach it"
    )
    port: int = setting(8000, ge=1, le=65535, flag="port", help="port to listen on")
    engine: Literal["auto", "vllm", "transformers"] = setting(
        "auto", flag="engine", help="vllm, or transformers' own server; auto: vLLM if it is installed"
    )


class DoctorOptions(Settings):
    """``doctor``: whether this machine is fit to train, and a run's folder whole."""

    run: Path | None = setting(None, flag="run", help="run folder: also verify its checkpoints, metrics.csv and token shards")
    network: bool = setting(True, flag="network", help="also check whether the Hugging Face Hub answers")
