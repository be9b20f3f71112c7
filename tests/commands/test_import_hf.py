"""A folder from elsewhere becomes a checkpoint that is trained on, extended and given back; what does not belong together is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minifoundation import cli
from minifoundation.checkpoint import load_checkpoint
from minifoundation.commands import import_hf as command
from minifoundation.commands.export_hf import trained
from minifoundation.config import ImportOptions
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from minifoundation.export import reading
from tests.data.byte_level import EXAMPLE, write_byte_level
from tests.export.test_reading import written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    # As Qwen3-0.6B's, its heads are together wider than the model.
    written(folder, "qwen3", vocab_size=504, head_dim=32, eos_token_id=0, pad_token_id=1, bos_token_id=None, tie_word_embeddings=True)
    return write_byte_level(folder)


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "imported"
    assert cli.main(["import_hf", "--model_path", str(folder), "--out_dir", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def short_play(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole play is compared once, in ``imported``."""
    monkeypatch.setattr(command, "plays", lambda: [EXAMPLE.read_text(encoding="utf-8")[:10_000]])


def training(tmp_path: Path, *more: str) -> list[str]:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text(EXAMPLE.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    data = [
        "--data",
        str(text),
        "--data.shards_dir",
        str(tmp_path / "shards"),
        "--data.max_document_bytes",
        "1000",
        "--data.held_out",
        "0.4",
    ]
    return [
        *data,
        "--tokens",
        "4096",
        "--batch_size",
        "4",
        "--lr",
        "1e-3",
        "--data.shard_tokens",
        "4096",
        "--train.eval_tokens",
        "256",
        *more,
    ]


def test_the_checkpoint_is_the_model_and_the_proof_lies_beside_it(folder: Path, imported: Path) -> None:
    assert {path.name for path in imported.iterdir()} == {"final.pth", "final.json", "parity.json"}
    parity = json.loads((imported / "parity.json").read_text())
    assert parity["equal"] is True and parity["text_bytes"] > 1_000_000
    assert all(check["difference"] <= check["tolerance"] for check in parity["checks"])
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(load_checkpoint(imported / "final.pth").model["embedding.weight"], stored["model.embed_tokens.weight"])


def test_doctor_takes_it_for_what_it_is(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no run whose settings are lost."""
    shutil.copytree(imported, tmp_path / "in")
    assert cli.main(["doctor", "--no_network", "--run", str(tmp_path / "in")]) == 0
    shown = capsys.readouterr().out
    assert "ok     a model that import_hf wrote" in shown and "final.pth: whole" in shown and "not there yet" not in shown
    (tmp_path / "in" / "final.pth").write_bytes(b"cut")
    assert cli.main(["doctor", "--no_network", "--run", str(tmp_path / "in")]) == 2
    assert "wrong  final.pth: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("model.safetensors", r"not a checkpoint \(.*\); did you mean the folder, {folder}\?$"),
        ("org/name", "no such checkpoint; give final.pth or a step_ folder of a run, or a folder of Hugging Face on this machine$"),
    ],
)
@pytest.mark.parametrize("option", ["pretrain --init_from", "longft --ckpt_in"])
def test_what_to_begin_from_is_said(folder: Path, option: str, path: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*option.split(), str(folder / path), "--data", "x"]) == 2
    assert re.search(remedy.format(folder=re.escape(str(folder))), capsys.readouterr().err.strip())


def test_one_of_several_processes_says_that_it_is_imported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        command.beginning(folder)
        said.append(capsys.readouterr().out)
    assert "imported and equal" in said[0] and not said[1]


def test_exported_again_it_is_the_same_folder(folder: Path, imported: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert cli.main(["export_hf", "--ckpt", str(imported / "final.pth"), "--out_dir", str(out), "--dtype", "fp32"]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() - {"lm_head.weight"} == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    vocabularies = [json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"] for place in (folder, out)]
    assert vocabularies[0] == vocabularies[1]
    ids = {name: json.loads((out / "config.json").read_text())[f"{name}_token_id"] for name in ("pad", "bos", "eos")}
    assert ids == {"pad": 1, "bos": None, "eos": 0}


def test_pretraining_begins_from_a_folder_as_from_its_checkpoint(
    folder: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for name, path in (("folder", folder), ("checkpoint", imported / "final.pth")):
        line = ["pretrain", "--init_from", str(path), "--out_dir", str(tmp_path / name), "--seq_len", "64", "--data.mask_documents"]
        assert cli.main([*line, *training(tmp_path)]) == 0
        ends.append(load_checkpoint(tmp_path / name / "final.pth"))
    assert all(torch.equal(ends[0].model[name], value) for name, value in ends[1].model.items())
    begun = load_checkpoint(imported / "final.pth")
    assert ends[0].tokenizer_model == begun.tokenizer_model
    assert not torch.equal(ends[0].model["norm.weight"], begun.model["norm.weight"])
    losses = [float(line.split(",")[2]) for line in (tmp_path / "folder" / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]
    assert cli.main(["export_hf", "--ckpt", str(tmp_path / "folder" / "final.pth"), "--out_dir", str(tmp_path / "hf")]) == 0
    parity = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert parity["trained_tokens"] is None and (parity["imported_from"], parity["tokens_since_import"]) == (str(folder), 4096)
    for path, tokens in ((tmp_path / "folder", 4096), (imported, 0)):
        evaluated = trained(load_checkpoint(path / "final.pth"))
        assert evaluated == {"trained_tokens": None, "imported_from": str(folder), "tokens_since_import": tokens}
        assert cli.main(["inspect", "--checkpoint", str(path / "final.pth")]) == 0
        assert f"from the weights of {folder}, imported: what those had read is not known" in capsys.readouterr().out
    assert parity["texts_with_equal_token_ids"] > 11, "held-out text of the run was compared"


@pytest.mark.slow
def test_a_run_that_began_from_a_folder_goes_on(folder: Path, tmp_path: Path) -> None:
    line = ["pretrain", "--init_from", str(folder), "--seq_len", "64", *training(tmp_path, "--train.save_every", "8")]
    assert cli.main([*line, "--out_dir", str(tmp_path / "whole")]) == 0
    assert cli.main([*line, "--out_dir", str(tmp_path / "part")]) == 0
    for name in ("final.pth", "final.json"):
        (tmp_path / "part" / name).unlink()
    assert [path.name for path in sorted((tmp_path / "part").glob("step_*"))][-1] == "step_00000008"
    assert cli.main([*line, "--out_dir", str(tmp_path / "part"), "--resume", "auto"]) == 0
    whole, part = (load_checkpoint(tmp_path / name / "final.pth") for name in ("whole", "part"))
    assert all(torch.equal(part.model[name], value) for name, value in whole.model.items())


@pytest.mark.slow
def test_an_empty_prompt_of_a_model_without_bos_is_one_line(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(imported / "final.pth"), "--prompt", ""]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --prompt: is empty, and this model's texts begin with no token")


def test_its_context_is_extended(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["longft", "--ckpt_in", str(folder), "--out_dir", str(tmp_path / "long"), "--seq_len", "128"]
    assert cli.main(line) == 2
    assert "data" in capsys.readouterr().err.splitlines()[-1], "an imported model has no corpus to go on with"
    assert cli.main([*line, *training(tmp_path, "--grad_accum", "1")]) == 0
    model = load_checkpoint(tmp_path / "long" / "final.pth").config.model
    assert (model.max_seq_len, model.rope.scaling, model.original_seq_len) == (128, "yarn", 64)


@pytest.fixture(scope="module")
def llama_3_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of Llama 3.2, whose context is 16 times the original by a factor of 32, at 1/128 of its lengths."""
    folder = tmp_path_factory.mktemp("llama")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes: dict[str, Any] = {"vocab_size": 504, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    written(folder, "llama", **sizes, rope_parameters=rope, eos_token_id=0, pad_token_id=1, bos_token_id=2)
    return write_byte_level(folder, bos=True)


def test_llama_3_2_comes_in_and_goes_out_as_it_was(llama_3_2: Path, tmp_path: Path) -> None:
    assert cli.main(["import_hf", "--model_path", str(llama_3_2), "--out_dir", str(tmp_path / "in")]) == 0
    rows = {check["what"]: check["tokens"] for check in json.loads((tmp_path / "in" / "parity.json").read_text())["checks"]}
    assert rows["row beyond the original length"] == 1024
    assert cli.main(["export_hf", "--ckpt", str(tmp_path / "in" / "final.pth"), "--out_dir", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llama_3_2, tmp_path / "out"))
    assert after["rope_parameters"] == before["rope_parameters"] and after["max_position_embeddings"] == 1024


@pytest.mark.slow
def test_llama_3_2_is_extended_by_its_own_scaling(llama_3_2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What configs/longft.yaml says of another one is for models that were not scaled yet."""
    line = ["longft", "--ckpt_in", str(llama_3_2), "--out_dir", str(tmp_path / "long"), "--seq_len", "1536", *training(tmp_path)]
    assert cli.main([*line, "--model.rope.scaling", "yarn"]) == 2
    message = (
        r"model.rope.scaling: yarn here, but .* was trained with llama3, and no other scaling can continue from its frequencies; set it to"
    )
    assert re.search(message, capsys.readouterr().err)
    short = ["--batch_size", "1", "--tokens", "1536", "--data.max_document_bytes", "8000", "--proof_documents", "0", "--needles", "0"]
    assert cli.main([*line, *short]) == 0
    model = load_checkpoint(tmp_path / "long" / "final.pth").config.model
    assert (model.rope.scaling, model.rope.factor, model.max_seq_len, model.original_seq_len) == ("llama3", 48.0, 1536, 64)


@pytest.mark.slow
def test_settings_that_are_not_the_models_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["pretrain", "--init_from", str(folder), "--out_dir", str(tmp_path / "run"), "--seq_len", "64", *training(tmp_path)]
    assert cli.main([*line, "--model.n_layer", "3"]) == 2
    assert f"model.n_layer: 3 here, but 2 in {folder}; leave it out" in capsys.readouterr().err
    assert cli.main([*line, "--tokenizer", str(write_byte_level(tmp_path / "other", eos_token="<pad>"))]) == 2
    assert "is not the tokenizer the weights were trained with" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final.pth").exists()


def refused(folder: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.import_hf(ImportOptions(model_path=folder, out_dir=tmp_path / "deep" / "out"))
    assert not (tmp_path / "deep").exists() and not list(tmp_path.glob("*.part")), "nothing is left"


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_tokenizer_that_does_not_belong_is_refused(folder: Path, tmp_path: Path) -> None:
    write_byte_level(copied(folder, tmp_path), eos_token="<pad>")
    refused(tmp_path / "copy", tmp_path, r"the tokenizer's eos_token <pad> is 1, and eos_token_id in config.json 0; copy the tokenizer of")
    written(tmp_path / "small", vocab_size=128)
    refused(write_byte_level(tmp_path / "small"), tmp_path, r"the tokenizer has 501 pieces, and the model 128 rows for them")
    written(tmp_path / "large", vocab_size=2048)
    refused(write_byte_level(tmp_path / "large"), tmp_path, r"the tokenizer has 501 pieces, and the model 2,048 rows for them")


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its class in transformers cuts text in a way of its own."""
    right = Tokenizer.load

    def other(path: Path) -> Any:
        tokenizer: Any = right(path)
        tokenizer.library.pre_tokenizer = None
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", other)
    refused(folder, tmp_path, "the imported model is not that of the folder: text 0: from token")


@pytest.mark.slow
def test_weights_that_would_compute_otherwise_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reading.model_config

    def other(path: Path) -> Any:
        config = right(path)
        return config.model_copy(update={"rope": config.rope.model_copy(update={"theta": config.rope.theta * 1.01})})

    monkeypatch.setattr(reading, "model_config", other)
    refused(folder, tmp_path, "the imported model is not that of the folder: .* weights differs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not empty"):
        command.import_hf(ImportOptions(model_path=folder, out_dir=tmp_path / "full"))
