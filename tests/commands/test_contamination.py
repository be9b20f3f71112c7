"""Planted leaks, found in token shards and nothing else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minifoundation.cli import main
from tests.evaluate.tiny import BUNDLED, write_items, write_tiny_model

WORDS = (Path(__file__).parents[2] / "examples" / "shakespeare.txt").read_text(encoding="utf-8")[200_000:]


def questions(count: int) -> list[dict[str, Any]]:
    """Return questions of 20 words that nobody else asks."""
    chance = random.Random(0)
    syllables = ["ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we", "xi", "yo", "zu"]
    found = []
    for i in range(count):
        words = ["".join(chance.choices(syllables, k=3)) for _ in range(20)]
        choices = {"text": ["red", "green", "blue", "white"], "label": list("ABCD")}
        found.append({"id": str(i), "question": " ".join(words).capitalize() + "?", "choices": choices, "answerKey": "ABCD"[i % 4]})
    return found


def shards(folder: Path, tokenizer_model: bytes, documents: list[str]) -> Path:
    """Write token shards of ``documents``, two files, and their tokenizer beside them."""
    from minifoundation.data.shards import Manifest, Pair, Place, ShardWriter, write_manifest
    from minifoundation.data.tokenizer import Tokenizer

    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    pairs = []
    for number, part in enumerate((documents[::2], documents[1::2])):
        writer = ShardWriter(folder / f"train_{number:05d}.bin", "uint16")
        for text, ids in zip(part, tokenizer.encode_documents(part), strict=True):
            writer.add(ids, len(text.encode()))
        pairs.append(Pair(start=Place(), train=writer.finish(), held_out=None))
    made = Manifest(dtype="uint16", tokenizer_sha256=tokenizer.sha256, source={}, settings={}, pairs=tuple(pairs), complete=True)
    write_manifest(folder, made)
    return folder


def leaked(item: dict[str, Any], kind: str, chance: random.Random) -> str:
    words = item["question"].split()
    match kind:
        case "verbatim":
            return str(item["question"])
        case "shouted":
            return "  ".join(words).upper().replace("?", "!!")
        case _:  # every seventh word replaced
            return " ".join("other" if i % 7 == 3 else word for i, word in enumerate(words))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_planted_leaks_are_found_and_nothing_else(
    tmp_path: Path, tokenizer_model: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr("minifoundation.commands.contamination.WORTH_A_PROCESS", 1000)
    items = questions(300)
    write_items(tmp_path / "mirror/allenai/ai2_arc/ARC-Easy", "test", items)
    chance = random.Random(1)
    kinds = {0: "verbatim", 1: "shouted", 2: "paraphrase"}
    planted = {i: kinds[i % 3] for i in range(90)}
    documents = [WORDS[place : place + 700] for place in range(0, 90 * 700, 700)]
    documents = [f"{text[:300]} {leaked(items[i], planted[i], chance)} {text[300:]}" for i, text in enumerate(documents)]
    folder = shards(tmp_path / "shards", tokenizer_model, documents)
    line = ["contamination", "--shards", str(folder), "--tokenizer", str(folder / "tokenizer.model"), "--workers", workers]
    line += ["--tasks", "arc_easy,winogrande", "--data_dir", str(tmp_path / "mirror")]
    assert main(line) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "contamination.json").read_text())
    (row,) = found["benchmarks"]
    numbers = hashes(items)
    for n in ("13", "8"):
        dirty = {numbers[doc_hash] for doc_hash in row["dirty"][n]}
        copied = {i for i, kind in planted.items() if kind != "paraphrase"}
        assert copied <= dirty, "every copy is found, whatever its case and punctuation"
        assert not dirty - copied, "no other item is, and of these paraphrases not one: no 8 words in a row are left"
    assert row["items"] == 300 and row["short"] == {"13": 0, "8": 0} and found["text"]["tokens"] > 10_000
    assert "arc_easy: 300 items, 20.00% by 13-grams (0 too short), 20.00% by 8-grams" in printed
    assert "winogrande not read: " in printed and len(found["not_read"]) == 1


def hashes(items: list[dict[str, Any]]) -> dict[str, int]:
    from lm_eval.utils import hash_string

    return {hash_string(json.dumps(item, indent=2, ensure_ascii=False)): number for number, item in enumerate(items)}


def test_scores_on_clean_and_dirty_items_apart(
    tmp_path: Path, tokenizer_model: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundled = [json.loads(line) for line in (BUNDLED / "allenai/ai2_arc/ARC-Easy/test.jsonl").read_text().splitlines()]
    long = [i for i, item in enumerate(bundled) if len(item["question"].split()) > 13]
    folder = shards(tmp_path / "shards", tokenizer_model, [WORDS[:500], *(bundled[i]["question"] for i in long[:10])])
    model = write_tiny_model(tmp_path / "model")
    assert main(["eval", "--model_path", str(model), "--tasks", "arc_easy", "--data_dir", str(BUNDLED)]) == 0
    line = ["contamination", "--shards", str(folder), "--tokenizer", str(folder / "tokenizer.model"), "--tasks", "arc_easy"]
    assert main([*line, "--data_dir", str(BUNDLED), "--evals", str(model / "eval"), "--out", str(tmp_path / "found.json")]) == 0
    items = [json.loads(row) for row in (model / "eval/items/arc_easy.jsonl").read_text().splitlines()]
    dirty = [item["score"] for item in items if item["doc_id"] in long[:10]]
    clean = [item["score"] for item in items if item["doc_id"] not in long[:10]]
    shown = f"arc_easy by 13-grams: clean {100 * np.mean(clean):.1f} ({len(clean)}), dirty {100 * np.mean(dirty):.1f} (10)"
    assert shown in capsys.readouterr().out and (tmp_path / "found.json").exists()


def test_a_mean_over_subjects_stays_one_without_the_dirty_items() -> None:
    from minifoundation.evaluate.contamination import Split, separated

    subjects = {"small": [1.0, 1.0], "large": [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
    items = [
        {"task": task, "doc_hash": f"{task}{i}", "score": score} for task, scores in subjects.items() for i, score in enumerate(scores)
    ]
    row = {"dirty": {"13": ["large4"]}, "short": {"13": 0}}
    assert separated(items, row, 13, aggregate="macro").clean == Split(0.5, 0.0, 7)
    assert separated(items, row, 13, aggregate="micro").clean.score == pytest.approx(2 / 7)
    everything = separated(items, {"dirty": {"13": []}, "short": {"13": 0}}, 13, aggregate="macro").clean
    assert everything.score == pytest.approx((1 + 1 / 6) / 2) and everything.stderr == pytest.approx(
        np.std(subjects["large"], ddof=1) / 6**0.5 / 2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "contamination: no text to look in; give --ckpt, or --shards with --tokenizer"),
        (["--shards", "a"], "--tokenizer: not given, and a are ids; give the tokenizer that the shards were made with"),
        (["--ckpt", "none.pth"], "none.pth: no such checkpoint"),
        (["--ckpt", "none.pth", "--shards", "nowhere"], "--shards: nowhere is given, and --ckpt none.pth too; give one of them"),
        (["--shards", "nowhere", "--tokenizer", "nowhere.model"], "nowhere.model"),
    ],
)
def test_what_is_missing_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["contamination", "--tasks", "arc_easy", "--data_dir", str(BUNDLED), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "HERE"], "--out: HERE is a folder; give a file, such as HERE/contamination.json"),
        (["--out", "HERE/file/found.json"], "--out: HERE/file/found.json cannot be written: HERE/file is not a folder; give"),
        (["--data_dir", "HERE/none"], "--data_dir: HERE/none: no such folder; give a mirror folder"),
        (["--evals", "HERE"], "HERE: holds no results.json; give a folder that eval wrote"),
    ],
)
def test_a_mistake_shows_before_the_search(
    options: list[str],
    message: str,
    tmp_path: Path,
    tokenizer_model: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def searched(*_: Any) -> Any:
        raise AssertionError("hours of work for nothing")

    monkeypatch.setattr("minifoundation.commands.contamination.scanned", searched)
    folder = shards(tmp_path / "shards", tokenizer_model, [WORDS[:500]])
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    (tmp_path / "file").touch()
    line = ["contamination", "--shards", str(folder), "--tokenizer", str(tmp_path / "tokenizer.model"), "--tasks", "arc_easy"]
    assert main([*line, "--data_dir", str(BUNDLED), *(option.replace("HERE", str(tmp_path)) for option in options)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: {message.replace('HERE', str(tmp_path))}")


def test_a_folder_without_permission_is_told_as_what_it_is(
    tmp_path: Path, tokenizer_model: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "shards", tokenizer_model, [WORDS[:500]])
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    line = ["contamination", "--shards", str(folder), "--tokenizer", str(tmp_path / "tokenizer.model"), "--tasks", "arc_easy"]
    assert main([*line, "--data_dir", str(BUNDLED), "--out", str(tmp_path / "found.json")]) == 2
    assert f"{tmp_path}/found.json cannot be written: {tmp_path} may not be written to; give" in capsys.readouterr().err


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer_model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """Their ids would be read as other words, of which no item has any."""
    from minifoundation.config import TokenizerConfig
    from minifoundation.data.tokenizer import train_tokenizer

    folder = shards(tmp_path / "shards", tokenizer_model, [WORDS[:500], WORDS[500:900]])
    other = train_tokenizer([WORDS[:40_000]], TokenizerConfig(vocab_size=600), tmp_path / "other.model").path
    line = ["contamination", "--shards", str(folder), "--tokenizer", str(other), "--tasks", "arc_easy", "--data_dir", str(BUNDLED)]
    assert main(line) == 2
    assert capsys.readouterr().err.endswith(f"error: --tokenizer: {other} is not the one {folder} was made with; give that one\n")


def test_a_checkpoint_names_the_shards_that_it_has_read(tmp_path: Path, tokenizer_model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    from minifoundation.checkpoint import Checkpoint, save_final
    from minifoundation.config import DataConfig, ModelConfig, RunConfig, TrainConfig
    from minifoundation.data.samples import Order
    from minifoundation.data.shards import Shards, manifest_of, write_manifest

    bundled = [json.loads(line) for line in (BUNDLED / "allenai/ai2_arc/ARC-Easy/test.jsonl").read_text().split("\n") if line]
    leak = next(item for item in bundled if len(item["question"].split()) > 20)
    folder = shards(tmp_path / "shards", tokenizer_model, [WORDS[:500], str(leak["question"])])  # the leak is all of the second shard
    sizes = {"vocab_size": 512, "d_model": 32, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_ff": 32, "original_seq_len": 8}
    settings = RunConfig(model=ModelConfig.model_validate(sizes), data=DataConfig(source="text"), train=TrainConfig(tokens=8, seq_len=8))
    opened = Shards.open(folder)
    entry = {"phase": "pretrain", "source": "text", "share": 1.0, "folder": str(folder), "corpus": {}, "samples": 1, "seq_len": 8}
    entry |= {"tokenizer_sha256": opened.manifest.tokenizer_sha256, "shards": 1, "epochs": None}

    def found(first_shard: int) -> tuple[int, int]:
        read = entry | {"first_shard": first_shard, "shards_sha256": Order(opened, 8, first_shard).sha256(1)}
        save_final(Checkpoint(settings, {}, tokenizer_model, {"phase": "pretrain", "step": 1}, [read]), tmp_path)
        line = ["contamination", "--ckpt", str(tmp_path / "final.pth"), "--tasks", "arc_easy", "--data_dir", str(BUNDLED)]
        code = main([*line, "--out", str(tmp_path / "found.json")])
        row = json.loads((tmp_path / "found.json").read_text())["benchmarks"][0]
        return code, len(row["dirty"]["13"])

    assert found(0) == (0, 0) and found(1) == (0, 1)
    manifest = manifest_of(folder)
    write_manifest(folder, manifest.model_copy(update={"pairs": manifest.pairs[::-1]}))
    assert found(1)[0] == 2
    assert f"{folder}: its shards are not those that {tmp_path / 'final.pth'} has read" in capsys.readouterr().err
