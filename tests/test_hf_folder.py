"""Which files of a model folder are read: those that transformers reads; what is missing or damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minifoundation.errors import UserError
from minifoundation.hf_folder import read_config, weight_files

INDEX = "model.safetensors.index.json"


def fault_of_weights(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        weight_files(folder)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def index(folder: Path, *names: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}}), encoding="utf-8")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two files of weights, and an index that names them, one of them twice."""
    files = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file in files:
        save_file({"weight": torch.ones(50)}, file)
    index(tmp_path, files[1].name, files[0].name, files[1].name)
    return files


def test_the_files_of_an_index_are_found(parts: list[Path]) -> None:
    assert weight_files(parts[0].parent) == parts


def test_one_file_is_read_before_an_index_and_safetensors_before_pickles(parts: list[Path], tmp_path: Path) -> None:
    """As by transformers, so that what is checked here is what it loads."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == parts
    (tmp_path / INDEX).unlink()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"], "the content of a pickle is left to those who load it"


def test_weights_that_are_missing_or_damaged_are_named(parts: list[Path], tmp_path: Path) -> None:
    content = parts[1].read_bytes()
    parts[1].unlink()
    assert fault_of_weights(tmp_path).startswith(f"{parts[1]}: no such file, and the model needs it; copy the folder again")
    for kept in (content[:9], content[:-100]):
        parts[1].write_bytes(kept)
        assert fault_of_weights(tmp_path).startswith(f"{parts[1]}: is damaged (")
    parts[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert fault_of_weights(tmp_path) == f"{parts[1]}: is a pointer of Git LFS, not the weights; run git lfs pull in {tmp_path}"
    (tmp_path / INDEX).unlink()
    assert fault_of_weights(tmp_path).startswith(f"{tmp_path}: holds no weights (model.safetensors, pytorch_model.bin, or an index")


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(text: str, parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert fault_of_weights(tmp_path).startswith(f"{tmp_path / INDEX}: ")


@pytest.mark.parametrize("up", ["../", "sub/../../", None])
def test_an_index_names_nothing_outside_its_folder(up: str | None, parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    name = f"{tmp_path}/{parts[0].name}" if up is None else up + parts[0].name
    index(folder, name)
    assert fault_of_weights(folder) == (
        f"{folder / INDEX}: names {name}, which is outside the folder; copy the folder again, or write it again with export_hf"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is damaged: not a JSON object"),
        ("[]", "is damaged: not a JSON object"),
        ('{"hidden_size": 3}', "is not a model configuration (no model_type)"),
        ('{"model_type": 3}', "is not a model configuration (no model_type)"),
    ],
)
def test_a_configuration_that_is_none_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as raised:
        read_config(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/config.json: {problem}; copy the folder again")
