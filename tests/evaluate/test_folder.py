"""A model folder with a part missing is refused by its files; nothing is drawn at random in its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.folder import check_folder, is_checkpoint, loaded
from tests.evaluate.tiny import write_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "hf"))


def in_parts(folder: Path) -> None:
    """Store the weights in several files, as of a large model."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="40KB")


def test_whole_folders_load_as_transformers_loads_them(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for store in (lambda _: None, in_parts):
        store(folder)
        network, tokenizer = loaded(folder, "--model", dtype=torch.float32)
        ids = torch.tensor([tokenizer("Which of these")["input_ids"]])
        assert torch.equal(network(ids).logits, expected(ids).logits)


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    def fault() -> str:
        with pytest.raises(UserError) as raised:
            check_folder(folder, "--model")
        return str(raised.value)

    (folder / "tokenizer.json").unlink()
    assert fault().startswith(f"--model: {folder} holds no tokenizer (tokenizer.json, tokenizer.model)")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert fault().startswith(f"{weights}: is damaged (")
    (folder / "config.json").write_text("{}")
    assert fault().startswith(f"{folder}/config.json: is not a model configuration")
    (folder / "config.json").unlink()
    (folder / "step_00000010").mkdir()
    assert fault() == f"--model: {folder} holds no config.json; give {folder}/step_00000010, or the folder that export_hf wrote"


def test_weights_that_are_not_there_are_not_drawn_at_random(folder: Path) -> None:
    """transformers only warns, and goes on with random ones."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        del tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights in .*hf have no model\.layers\.1\.mlp\.down_proj\.weight and 1 more; copy"):
        loaded(folder, "--model", dtype=torch.float32)


def test_what_is_read_as_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    step = tmp_path / "step_00000010"
    step.mkdir()
    (tmp_path / "final.pth").touch()
    assert [is_checkpoint(path) for path in (tmp_path / "final.pth", step, tmp_path, folder)] == [True, True, False, False]
    exported = folder.rename(tmp_path / "step_00000020")  # an export may be called so
    assert not is_checkpoint(exported)
    with pytest.raises(UserError, match=rf"model.safetensors: is one file of a model, whose folder is needed; give {exported}$"):
        is_checkpoint(exported / "model.safetensors")
