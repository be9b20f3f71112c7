"""A model folder in Hugging Face's form: what has to lie in it, and its model and tokenizer; a part that is missing is never made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minifoundation.errors import UserError
from minifoundation.evaluate.mirror import first_line

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
AGAIN = "copy the folder again, or write it again with export_hf"


def is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is to be read as a checkpoint of ours: a file, or a folder that is none of Hugging Face's."""
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
    if not isinstance(_json(folder / CONFIG).get("model_type"), str):
        raise UserError(str(folder / CONFIG), "is not a model configuration (no model_type)", AGAIN)
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UserError(setting, f"{folder} holds no weights ({', '.join(WEIGHTS[::2])}, or an index of several files)", AGAIN)
    for file in _weights(folder, first):
        _check_weights(file)
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
        network, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what a bad value raises is as varied as the libraries that read it
        problem = f"{folder} does not load ({first_line(error)})"
        raise UserError(setting, problem, "check that AutoModelForCausalLM and AutoTokenizer load it") from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(setting, f"the weights in {folder} have no {missing[0]}{more}", f"{AGAIN}; {CONFIG} may be that of another model")
    return network, tokenizer


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(str(path), "is damaged: not a JSON object", AGAIN)
    return content


def _weights(folder: Path, first: str) -> list[Path]:
    """Return the files with weights: ``first``, or those that it names."""
    if not first.endswith(".json"):
        return [folder / first]
    names = _json(folder / first).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(str(folder / first), "names no files of weights", AGAIN)
    return [folder / name for name in sorted(set(names.values()))]


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(str(file), "no such file, and the model needs it", AGAIN)
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt"):  # reads the header, and compares it with the length
            pass
    except SafetensorError as error:
        raise UserError(str(file), f"is damaged ({error})", AGAIN) from None
