from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minifoundation.checkpoint import load_checkpoint
from minifoundation.cli import main
from minifoundation.commands.export_hf import export_hf
from minifoundation.config import ExportOptions
from minifoundation.errors import UserError
from minifoundation.export import tokenizer as hf_tokenizer
from minifoundation.export import weights
from tests.test_cli import struck

FILES = {"config.json", "generation_config.json", "model.safetensors", "parity.json", "tokenizer.json"}
FILES |= {"tokenizer_config.json", "special_tokens_map.json"}
YARN = {"rope": {"scaling": "yarn", "factor": 4}}


def test_a_folder_that_transformers_reads_with_the_proof_in_it(final: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "deep" / "hf"
    export_hf(ExportOptions(ckpt=final(**YARN), out_dir=out))
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["hf"], "no temporary folder is left"
    parity = json.loads((out / "parity.json").read_text())
    assert parity["equal"] is True
    assert {check["tokens"] for check in parity["checks"]} == {24, 256}
    assert all(check["difference"] <= parity["tolerance"] for check in parity["checks"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 640 > len(tokenizer)
    assert tokenizer("To be, or not to be").input_ids[0] == model.config.bos_token_id == 1


def test_dtype_and_averaged_weights(final: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = final(with_ema=True, qk_norm=True, tie_embeddings=False)
    export_hf(ExportOptions(ckpt=path, out_dir=tmp_path / "hf", dtype="fp32", ema=True))
    checkpoint = load_checkpoint(path)
    assert checkpoint.ema is not None
    expected = weights.to_hf(checkpoint.config.model, checkpoint.ema)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "hf" / "parity.json").read_text())["weights"] == "ema"


def test_a_full_disk_is_one_line_and_leaves_nothing(
    final: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    assert main(["export_hf", "--ckpt", str(final()), "--out_dir", str(tmp_path / "new" / "hf")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "the disk is full; free some space and run the same command again" in said
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.part"))


Config = dict[str, Any]
State = dict[str, Tensor]


def in_config(**changes: Any) -> Callable[[Config], Config]:
    def plant(config: Config) -> Config:
        rope = {name: value for name, value in changes.items() if name in ("rope_theta", "attention_factor")}
        scaling = None if config["rope_scaling"] is None else config["rope_scaling"] | rope
        return config | changes | {"rope_parameters": config["rope_parameters"] | rope, "rope_scaling": scaling}

    return plant


def swap_keys_and_values(hf: State) -> State:
    swap = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return {next((name.replace(a, b) for a, b in swap.items() if a in name), name): value for name, value in hf.items()}


def reverse_query_heads(hf: State) -> State:
    return {name: value.unflatten(0, (4, -1)).flip(0).flatten(0, 1) if "q_proj" in name else value for name, value in hf.items()}


PAIRED = torch.arange(16).view(2, 8).T.flatten()
"""Channels of a head in the order of Meta's checkpoints, where neighbours rotate together."""


def pair_neighbours(hf: State, order: Tensor = PAIRED) -> State:
    rotated = ("q_proj", "k_proj")
    return {
        name: value.unflatten(0, (-1, 16))[:, order].flatten(0, 1) if any(part in name for part in rotated) else value
        for name, value in hf.items()
    }


def unpair_neighbours(hf: State) -> State:
    return pair_neighbours(hf, PAIRED.argsort())


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(in_config(rope_theta=10_100.0), id="theta off by 1%"),
        pytest.param(in_config(attention_factor=1.0), id="YaRN gain forgotten"),
        pytest.param(in_config(rms_norm_eps=1e-6), id="epsilon of the norms"),
        pytest.param(in_config(tie_word_embeddings=False), id="tie broken"),
        pytest.param(in_config(bos_token_id=3), id="wrong BOS"),
    ],
)
def test_a_fault_in_the_config_is_refused(
    plant: Callable[[Config], Config], final: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights.hf_config
    monkeypatch.setattr(weights, "hf_config", lambda config, special: plant(right(config, special)))
    refused(final(**YARN), tmp_path)


@pytest.mark.parametrize("consistent", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize(
    ("plant", "undo"),
    [
        pytest.param(swap_keys_and_values, swap_keys_and_values, id="keys and values swapped"),
        pytest.param(reverse_query_heads, reverse_query_heads, id="heads permuted"),
        pytest.param(pair_neighbours, unpair_neighbours, id="rotary layout of another library"),
    ],
)
def test_a_fault_in_the_renaming_is_refused(
    plant: Callable[[State], State],
    undo: Callable[[State], State],
    consistent: bool,
    final: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the way back has the same fault, so that the tensors look right."""
    there, back = weights.to_hf, weights.from_hf
    monkeypatch.setattr(weights, "to_hf", lambda config, state: plant(there(config, state)))
    if consistent:
        monkeypatch.setattr(weights, "from_hf", lambda config, hf: back(config, undo(hf)))
    refused(final(), tmp_path)


def test_a_tokenizer_without_its_bos_is_refused(final: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hf_tokenizer.write_tokenizer

    def without_bos(tokenizer: Any, folder: Path, *, max_seq_len: int) -> None:
        right(tokenizer, folder, max_seq_len=max_seq_len)
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))

    monkeypatch.setattr(hf_tokenizer, "write_tokenizer", without_bos)
    refused(final(), tmp_path)


def refused(ckpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    with pytest.raises(UserError, match="the exported model is not the trained one"):
        export_hf(ExportOptions(ckpt=ckpt, out_dir=out))
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left"


def test_bad_input(final: Callable[..., Path], tmp_path: Path) -> None:
    ckpt = final()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"full exists and is not empty; give another folder, or remove it first"):
        export_hf(ExportOptions(ckpt=ckpt, out_dir=full))
    assert (full / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="holds no averaged weights"):
        export_hf(ExportOptions(ckpt=ckpt, out_dir=tmp_path / "hf", ema=True))
    with pytest.raises(UserError, match="no such checkpoint"):
        export_hf(ExportOptions(ckpt=tmp_path / "none.pth", out_dir=tmp_path / "hf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


def test_an_empty_folder_is_filled(final: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    export_hf(ExportOptions(ckpt=final(), out_dir=tmp_path / "hf"))
    assert {path.name for path in (tmp_path / "hf").iterdir()} == FILES


def test_two_exports_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    from minifoundation.commands.export_hf import folder_written_whole

    out = tmp_path / "hf"
    (tmp_path / "hf.part" / "old").mkdir(parents=True)  # left by one that was killed
    (tmp_path / "hf.part" / "old.json").touch()
    with folder_written_whole(out) as first:
        (first / "config.json").touch()
        with pytest.raises(UserError, match=r"hf.part: is being written by another process \(pid"), folder_written_whole(out):
            pytest.fail("both write")
    assert [path.name for path in out.iterdir()] == ["config.json"] and [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(KeyError), folder_written_whole(tmp_path / "deep" / "er"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.usefixtures("signals")
def test_a_signal_while_a_package_is_imported_leaves_nothing(final: Callable[..., Path], tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-c",
        struck("transformers", signal.SIGINT),
        "export_hf",
        "--ckpt",
        str(final()),
        "--out_dir",
        str(tmp_path / "hf"),
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "") and done.stderr.endswith("stopped\n")
    assert list(tmp_path.glob("hf*")) == []
