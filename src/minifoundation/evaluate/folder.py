"""A model folder in Hugging Face's form: its model and tokenizer; a part that is missing is never made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minifoundation.errors import UserError
from minifoundation.evaluate.mirror import first_line
from minifoundation.hf_folder import AGAIN, CONFIG, read_config, weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is to be read as a checkpoint of ours: a file, or a folder that is none of Hugging Face's.

    Raises:
        UserError: it is a file within one of Hugging Face's.
    """
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".json") and (path.parent / CONFIG).is_file():
        raise UserError(str(path), "is one file of a model, whose folder is needed", f"give {path.parent}")
    return path.is_file() or (path.is_dir() and path.name.startswith("step_") and not (path / CONFIG).exists())


def check_folder(folder: Path, setting: str) -> None:
    """Raise a UserError unless the files of a model are in ``folder`` and whole.

    Args:
        setting: the one that named the folder.
    """
    if not (folder / CONFIG).is_file():
        # The folder of a run is what people give.
        inside = [one for one in (folder / "final.pth", *sorted(folder.glob("step_*"), reverse=True)) if one.exists()]
        remedy = (
            f"give {inside[0]}, or the folder that export_hf wrote" if inside else "give a folder written by export_hf or in the same form"
        )
        raise UserError(setting, f"{folder} holds no {CONFIG}", remedy)
    read_config(folder)
    weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(setting, f"{folder} holds no tokenizer ({', '.join(TOKENIZERS[:2])})", AGAIN)


def loaded(folder: Path, setting: str, *, dtype: Any) -> tuple[Any, Any]:
    """Return the model in ``folder``, on the CPU, and its tokenizer.

    Raises:
        UserError: transformers cannot load them, or would draw at random what the weights do not hold.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_folder(folder, setting)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a bad value raises is as varied as the libraries that read it
        problem = f"{folder} does not load ({first_line(error)})"
        raise UserError(setting, problem, "check that AutoModelForCausalLM and AutoTokenizer load it") from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(setting, f"the weights in {folder} have no {missing[0]}{more}", f"{AGAIN}; {CONFIG} may be that of another model")
    return network, tokenizer
