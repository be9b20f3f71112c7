"""``inspect`` against counts made another way, and files that were tampered with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from minifoundation import cli
from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data import survey
from minifoundation.data.encode import is_held_out
from minifoundation.data.prepare import prepare_shards, rebuilt_files, shards_folder, tokenizer_for
from minifoundation.data.rows import all_documents
from minifoundation.data.shards import Shards, write_manifest
from minifoundation.data.tokenizer import EOS, Tokenizer
from minifoundation.errors import UserError

VERSE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Tokenizer, Shards]:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "verse.txt").write_bytes(VERSE.read_bytes()[:60_000])
    (folder / "zzz.txt").write_bytes(b"\xff")
    config = DataConfig(source=str(folder), shards_dir=folder / "shards", max_document_bytes=700, shard_tokens=4096, held_out=0.2)
    tokenizer = tokenizer_for(TokenizerConfig(vocab_size=600), config, folder / "tokenizer")
    return config, tokenizer, prepare_shards(str(folder), config, tokenizer, tokens=None)


def test_counts_are_those_of_the_documents(made: tuple[DataConfig, Tokenizer, Shards], capsys: pytest.CaptureFixture[str]) -> None:
    config, tokenizer, shards = made
    texts = [text for text in all_documents(str(config.source), config) if not is_held_out(text.encode(), config.held_out)]
    found = survey.split(shards.train, EOS)
    assert found.lengths.tolist() == [len(tokenizer.encode(text)) + 2 for text in texts]
    assert found.text_bytes == sum(len(text.encode()) for text in texts)

    assert cli.main(["inspect", "--shards", str(shards.folder), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert f"{found.tokens:,} tokens in {len(texts):,} documents" in shown
    assert "skipped   1 not UTF-8" in shown and "verified  every file" in shown


def test_samples_are_the_text(made: tuple[DataConfig, Tokenizer, Shards], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, tokenizer, shards = made
    texts = set(all_documents(str(config.source), config))
    for _, text in survey.samples(shards, tokenizer, 5):
        assert text.startswith("<s>") and text.endswith("</s>") and text[3:-4] in texts
    documents = sum(shard.documents for shard in shards.train)
    everywhere = [place for place, _ in survey.samples(shards, tokenizer, 1000 * documents)]
    assert len(everywhere) == len(set(everywhere)) == documents
    assert len(list(survey.samples(shards, tokenizer, len(shards.train) - 1))) == len(shards.train) - 1
    plot = tmp_path / "lengths.png"
    above = str(shards.folder.parent)  # data.shards_dir of one source
    line = ["inspect", "--shards", above, "--tokenizer", str(tokenizer.path), "--samples", "2", "--plot", str(plot)]
    assert cli.main(line) == 0
    assert len(re.findall(r"^--- train-\d+\.bin, document \d+, \d+ tokens$", capsys.readouterr().out, re.MULTILINE)) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["inspect", "--shards", str(shards.folder), "--plot", str(tmp_path / "lengths.txt")]) == 2
    assert capsys.readouterr().err.endswith("lengths.txt is not a .png; give the histogram a name that ends in .png\n")


def test_several_folders_are_shown_with_their_shares(
    made: tuple[DataConfig, Tokenizer, Shards], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, tokenizer, shards = made
    text = tmp_path / "first.txt"
    text.write_bytes(VERSE.read_bytes()[:20_000])
    other = prepare_shards(str(text), config, tokenizer, tokens=None)
    assert cli.main(["inspect", "--shards", str(config.shards_dir), "--plot", str(tmp_path / "lengths.png")]) == 0
    shown = capsys.readouterr().out
    total = shards.train_tokens + other.train_tokens
    assert f"{total:,} training tokens in all" in shown
    for one in (shards, other):
        assert f"{one.folder}: " in shown and (tmp_path / f"lengths-{one.folder.name}.png").is_file()
        assert re.search(rf"^ +{one.train_tokens / total:.2%}  {one.folder.name}$", shown, re.MULTILINE)


def test_a_folder_without_a_shard_yet_holds_nothing(
    made: tuple[DataConfig, Tokenizer, Shards], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As ``prepare`` leaves it when it is stopped before the first shard is full."""
    config, tokenizer, shards = made
    write_manifest(tmp_path, shards.manifest.model_copy(update={"pairs": (), "complete": False}))
    line = ["inspect", "--shards", str(tmp_path), "--tokenizer", str(tokenizer.path), "--plot", str(tmp_path / "lengths.png"), "--verify"]
    assert cli.main(line) == 0
    assert "train     nothing" in capsys.readouterr().out and not (tmp_path / "lengths.png").exists()

    begun = shards_folder(str(tmp_path), config, tokenizer)
    begun.mkdir(parents=True)
    write_manifest(begun, shards.manifest.model_copy(update={"pairs": (), "complete": False}))
    with pytest.raises(UserError, match="holds no token shards yet; make them with minifoundation prepare"):
        rebuilt_files(str(tmp_path), config, tokenizer)
    shutil.rmtree(begun)


def test_faults_are_one_line(made: tuple[DataConfig, Tokenizer, Shards], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, _, shards = made
    other = tmp_path / "other.model"
    other.write_bytes(b"x")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shards.folder.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((copy / "train-00000.bin").read_bytes())
    damaged[100] ^= 1
    (copy / "train-00000.bin").write_bytes(damaged)
    for line, message in (
        (["inspect"], "nothing to look at; give --shards or --checkpoint"),
        (["inspect", "--shards", str(copy / "nowhere")], "holds no token shards"),
        (["inspect", "--shards", str(copy), "--verify"], "train-00000.bin: is not what was written (sha256)"),
        (["inspect", "--shards", str(shards.folder), "--tokenizer", str(other)], "not a SentencePiece model"),
        (["inspect", "--checkpoint", str(other)], "not a checkpoint"),
        (["inspect", "--checkpoint", str(other), "--verify"], "--verify: there are no shards to look into; give --shards too"),
        (["inspect", "--checkpoint", str(other), "--plot", "a.png"], "--plot: there are no shards to look into; give --shards too"),
    ):
        assert cli.main(line) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
