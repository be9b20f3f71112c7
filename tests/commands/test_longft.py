"""``longft``: what it refuses, what it carries over, and the proof that it leaves behind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minifoundation import cli
from minifoundation.checkpoint import load_checkpoint
from minifoundation.commands.longft import reaching
from minifoundation.config import ModelConfig, RopeConfig, RunConfig
from minifoundation.data.prepare import prepare_shards, shards_folder
from minifoundation.data.shards import Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.train import proof
from minifoundation.train.kernels import transformer_for
from minifoundation.train.proof import material
from minifoundation.train.reach import Ids
from tests.distributed.processes import started, torchrun

PRETRAIN = """
model: {vocab_size: 512, d_model: 32, n_layer: 2, n_head: 4, n_kv_head: 2, d_ff: 64, original_seq_len: 64}
tokenizer: {vocab_size: 512}
data: {held_out: 0.3, max_document_bytes: 2048, shard_tokens: 16384}
train: {tokens: 5120, seq_len: 64, batch_size: 4, lr: 1.0e-2, save_every: 5, eval_tokens: 1024}
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps at 64 tokens, with its corpus beside it."""
    folder = tmp_path_factory.mktemp("longft")
    example = Path(__file__).parents[2] / "examples" / "shakespeare.txt"
    (folder / "verse.txt").write_bytes(example.read_bytes()[:200_000])
    (folder / "run.yaml").write_text(PRETRAIN)
    line = f"pretrain --config {folder}/run.yaml --data {folder}/verse.txt --out_dir {folder}/run --data.shards_dir {folder}/shards"
    assert cli.main(line.split()) == 0
    return folder


def extend(folder: Path, out: str, *options: str, ckpt: str = "run/final.pth") -> int:
    given = f"longft --ckpt_in {folder}/{ckpt} --out_dir {folder}/{out} --seq_len 256 --batch_size 1 --tokens 1024 --eval_every 99".replace(
        "--eval_every", "--train.eval_every"
    )
    return cli.main([*given.split(), *options])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_proof_lies_beside_the_model(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extend(pretrained, "proved", "--proof_documents", "3", "--needles", "1") == 0
    said = capsys.readouterr()
    assert "100% of the rows begin with one of" in said.err  # all its documents are long
    assert re.search(r"0 to +15: (\d\.\d{3}) before, \1 in windows, \d\.\d{3} after \(3 held-out documents\)", said.out)
    assert "rows of the original length: " in said.out and "passkey at     256: " in said.out
    folder = pretrained / "proved"
    places = table(folder / "loss_by_position.csv")
    assert [int(row["last"]) + 1 for row in places] == [16, 32, 64, 96, 128, 192, 256]
    assert all(int(row["documents"]) == 3 for row in places)
    (summed,) = re.findall(r"  beyond 64: (\d\.\d{4}) before in windows, (\d\.\d{4}) after", said.out)
    for column, told in zip(("before_sliding", "after"), summed, strict=True):
        nats, tokens = zip(*((float(row[column]), int(row["tokens"])) for row in places if int(row["first"]) >= 64), strict=True)
        assert float(told) == pytest.approx(np.average(nats, weights=tokens), abs=1e-4)
    assert ("warning: a window of the old length that slides does better" in said.out) is (summed[0] < summed[1])
    needles = table(folder / "needles.csv")
    assert {int(row["length"]) for row in needles} >= {128, 256} and {row["task"] for row in needles} == {"single", "multi-key", "passkey"}
    assert (folder / "long_context.png").read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(folder / "final.pth").config.model.max_seq_len == 256


def test_the_shortest_context_is_proved_too(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 8 tokens to 9: no needle has room, and all that lies beyond is one token."""
    line = f"pretrain --config {pretrained}/run.yaml --data {pretrained}/verse.txt --data.shards_dir {pretrained}/shards --tokens 256"
    assert cli.main([*line.split(), *f"--out_dir {pretrained}/eight --model.original_seq_len 8 --seq_len 8".split()]) == 0
    options = "--seq_len 9 --tokens 72 --proof_documents 2 --needles 1"
    assert extend(pretrained, "nine", *options.split(), ckpt="eight/final.pth") == 0
    places = table(pretrained / "nine" / "loss_by_position.csv")
    assert [int(row["last"]) + 1 for row in places] == [2, 4, 8, 9] and [int(row["tokens"]) for row in places] == [4, 4, 8, 2]
    assert "  beyond 8: " in capsys.readouterr().out and table(pretrained / "nine" / "needles.csv") == []


def test_a_proof_that_does_not_fit_leaves_the_model(
    pretrained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("minifoundation.train.proof.found", too_much)
    assert extend(pretrained, "unproved", "--proof_documents", "1") == 0
    final = pretrained / "unproved" / "final.pth"
    assert "warning: rows of 256 tokens do not fit CPU" in (said := capsys.readouterr().err) and f"{final} is whole" in said
    assert load_checkpoint(final).config.model.max_seq_len == 256


def test_the_proof_is_held_out_or_what_was_given(pretrained: Path, tmp_path: Path) -> None:
    config = load_checkpoint(pretrained / "run" / "final.pth").config
    tokenizer = Tokenizer.load(pretrained / "run" / "tokenizer" / "tokenizer.model")
    (source,) = config.data.weights
    shards = Shards.open(shards_folder(source, config.data, tokenizer))
    train, held_out = ([bytes(shard.tokens()) for shard in split] for split in (shards.train, shards.held_out))
    width = shards.train[0].dtype

    def within(ids: Ids, split: list[bytes]) -> bool:
        return any(ids.astype(width).tobytes() in shard for shard in split)

    on = material(config, tokenizer, documents=3, tries=1)
    for ids in (*on.documents, on.needles.text[1:40]):
        assert within(ids, held_out) and not within(ids, train)

    texts = [f"{word} " * 200 for word in ("never", "told", "before")]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    on = material(config, tokenizer, documents=3, tries=1, source=str(tmp_path / "given.jsonl"))
    assert [ids.tolist() for ids in on.documents] == [ids[:65].tolist() for ids in tokenizer.encode_documents(texts)]
    assert not within(on.needles.text[:40], train)


@pytest.mark.parametrize(("words", "limit"), [(20, 20_000), (400, 10**9)])
def test_of_a_source_without_an_end_as_much_is_read_as_is_needed(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, words: int, limit: int
) -> None:
    """Documents that are never long enough are read up to the limit, others until there are as many as asked for."""
    config = load_checkpoint(pretrained / "run" / "final.pth").config
    tokenizer = Tokenizer.load(pretrained / "run" / "tokenizer" / "tokenizer.model")
    config = config.replaced(data={"search_tokens": limit}, train={"seq_len": 256})
    read: list[str] = []

    def endless(*_: Any) -> Iterator[str]:
        while True:
            read.append(f"{len(read)} is read " + "and so on " * (words + len(read) % 3))
            yield read[-1]

    monkeypatch.setattr(proof, "all_documents", endless)
    monkeypatch.setattr(proof, "TEXT_TOKENS", 8_000)
    on = material(config, tokenizer, documents=3, tries=1, source="fineweb")
    ids = tokenizer.encode_documents(read)
    ends = np.cumsum([len(one) for one in ids])
    length = config.train.seq_len
    cut = [one[: length + 1] for one in ids]
    if max(len(one) for one in ids) <= length:  # 64 are encoded at once
        used = int(np.searchsorted(ends, limit)) + 1
        assert used <= len(read) <= used + 64
        expected = sorted((one for one in cut[:used] if len(one) > config.model.original_seq_len), key=len, reverse=True)[:3]
    else:
        assert len(read) == 64
        expected = cut[:3]
    assert [one.tolist() for one in on.documents] == [one.tolist() for one in expected] and len(on.documents) == 3
    assert 7_000 < len(on.needles.text) <= 8_000


def test_scaling_by_name_counts_from_the_original_length(pretrained: Path) -> None:
    quick = ("--proof_documents", "0", "--needles", "0")
    assert extend(pretrained, "first", "--model.rope.scaling", "theta", *quick) == 0
    assert not (pretrained / "first" / "needles.csv").exists()
    again = f"longft --ckpt_in {pretrained}/first/final.pth --out_dir {pretrained}/second --seq_len 512 --batch_size 1 --tokens 1024"
    assert cli.main([*again.split(), *quick]) == 0
    rope = load_checkpoint(pretrained / "second" / "final.pth").config.model.rope
    assert (rope.scaling, rope.factor, rope.theta) == ("theta", 8.0, 10_000.0), "not the YaRN of configs/longft.yaml"


def test_a_base_of_its_own_stays_one(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--proof_documents", "0", "--needles", "0")
    own = "--model.rope.scaling none --model.rope.theta 1000000 --model.rope.factor 4"
    assert extend(pretrained, "base", *own.split(), *quick) == 0
    assert "context  256 tokens, pretrained at 64: RoPE without scaling, theta 1,000,000, factor 4" in capsys.readouterr().err
    assert extend(pretrained, "base_again", "--seq_len", "512", *quick, ckpt="base/final.pth") == 0
    rope = load_checkpoint(pretrained / "base_again" / "final.pth").config.model.rope
    assert (rope.scaling, rope.factor, rope.theta) == ("none", 8.0, 1e6), "not YaRN over the raised base"


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        (
            "--data.held_out 0 --data.shards_dir {}/none",
            ["no document is longer than 64 tokens", "no text to hide needles", "less than a row of 64"],
        ),
        ("--proof_data {}/short.jsonl", ["no document is longer than 64 tokens, so there is no loss by position; give --proof_data"]),
    ],
)
def test_what_could_not_be_proved_is_told(
    pretrained: Path, capsys: pytest.CaptureFixture[str], options: str, warnings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "two words"}\n' * 6)
    given = options.format(tmp_path).split()
    assert extend(pretrained, tmp_path.name, "--proof_documents", "2", "--needles", "1", *given) == 0
    said = capsys.readouterr().out
    for warning in warnings:
        assert f"warning: {warning}" in said or f"warning: there is {warning}" in said


def test_both_models_are_tried_in_the_precision_of_the_extension(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model before was trained in float32: its dtype is not what is compared."""
    computed: list[str] = []
    real = transformer_for

    def seen(config: RunConfig, *arguments: Any) -> Any:
        computed.append(config.train.precision)
        return real(config, *arguments)

    monkeypatch.setattr(proof, "transformer_for", seen)
    assert extend(pretrained, "half", "--bf16", "--proof_documents", "1", "--needles", "0") == 0
    assert computed == ["bf16", "bf16"]


def test_auto_is_the_most_rows_that_fit_whatever_was_added_up_before(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, rows in (((), "64 rows x 1 micro-batch"), (("--grad_accum", "8"), "8 rows x 1 micro-batch")):
        assert extend(pretrained, "auto", "--batch_size", "auto", "--tokens", "1_000_000", "--dry_run", *options) == 0
        assert rows in capsys.readouterr().out


def test_short_rows_of_the_proof_are_from_every_source(pretrained: Path) -> None:
    config = load_checkpoint(pretrained / "run" / "final.pth").config
    tokenizer = Tokenizer.load(pretrained / "run" / "tokenizer" / "tokenizer.model")
    other = pretrained / "other.txt"
    other.write_text("".join(f"{number} bottles of beer on the wall\n" for number in range(2000)))
    mix = dict.fromkeys(config.data.weights, 0.75) | {str(other): 0.25}
    config = config.replaced(data={"source": None, "mix": mix})
    prepare_shards(str(other), config.data, tokenizer, tokens=None, show_progress=False)
    short = material(config, tokenizer, documents=1, tries=1).short
    counted = ["bottles" in tokenizer.decode(row.tolist()) for row in short]
    assert len(counted) == 1024 // 64 and sum(counted) == 4


def test_a_factor_that_is_no_ratio_of_lengths_grows_as_the_length_does() -> None:
    sizes = {"d_model": 64, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 8192}
    llama = ModelConfig.model_validate(sizes | {"rope": RopeConfig(scaling="llama3", factor=32, max_seq_len=131_072)})
    assert reaching(262_144, llama) == {"factor": 64.0, "max_seq_len": 262_144}
    assert reaching(131_072, llama) == {"factor": 32.0, "max_seq_len": 131_072}
    ours = ModelConfig.model_validate(sizes | {"rope": RopeConfig(scaling="llama3", factor=4)})
    assert reaching(65_536, ours) == {"factor": 8}


def test_moments_begin_anew_or_go_on(pretrained: Path) -> None:
    quick = ("--proof_documents", "0", "--needles", "0", "--train.save_every", "1", "--train.keep", "9")
    before = load_checkpoint(pretrained / "run" / "step_00000015").optimizer
    for out, options, steps in (("anew", (), 0), ("carried", ("--carry_optimizer",), 15)):
        assert extend(pretrained, out, *options, *quick, ckpt="run/step_00000015") == 0
        after = load_checkpoint(pretrained / out / "step_00000001").optimizer
        assert after.keys() == before.keys()
        assert all(int(after[name]) == steps + 1 for name in after if name.startswith("step/"))
        name = "exp_avg_sq/blocks.0.qkv.weight"
        # Of the second moments 95% are kept by the first step.
        kept = torch.all(after[name] >= 0.95 * before[name] * (1 - 1e-5))
        assert bool(kept) == bool(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--seq_len", "32"),
            r"train.seq_len: 32 is shorter than the 64 tokens that .*final\.pth reaches; give --seq_len above 64, or continue",
        ),
        (
            ("--carry_optimizer",),
            r"--carry_optimizer: .*final\.pth holds no optimizer state; give a step_ folder of the run, or leave it out",
        ),
        (("--data.min_tokens", "100_000"), r"data\.min_tokens: no document of .* has 100,000 tokens: the longest of .* searched has \d"),
        (("--model.rope.scaling", "yarm"), r"model\.rope\.scaling: 'yarm' is not valid; .*'theta'"),
        (("--model.d_ff", "128"), r"model\.d_ff: 128 here, but 64 in .*final\.pth; leave it out: longft extends this model"),
        (
            ("--model.n_head", "8", "--model.n_kv_head", "4"),
            r"model\.n_head: 8 here, but 4 in .*final\.pth",
        ),  # whose weights have the same shapes
        (("--model.original_seq_len", "256", "--dry_run"), r"model\.original_seq_len: 256 here, but 64 in .*final\.pth"),
    ],
)
def test_a_mistake_is_one_line(pretrained: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    assert extend(pretrained, "wrong", *options) == 2
    assert re.match(rf"error: {message}", capsys.readouterr().err.splitlines()[-1])
    assert not (pretrained / "wrong" / "final.pth").exists()


@pytest.mark.slow
def test_rows_that_two_processes_read_together_extend_as_one(pretrained: Path) -> None:
    """The same rows of long and packed documents, the same losses, and the proof by the first process."""
    given = f"--ckpt_in {pretrained}/run/final.pth --seq_len 256 --batch_size 1 --tokens 2048 --proof_documents 3 --needles 1"
    for out, launcher, sharing in (("alone", [], []), ("together", torchrun(2), ["--train.context_parallel", "2"])):
        process = started(launcher, [*given.split(), "--out_dir", f"{pretrained}/{out}", *sharing], "longft")
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed[-3000:]
        assert printed.count("proof of ") == 1 and "rows begin with one of" in printed
        assert ("2 read a row together, 128 tokens each" in printed) is (out == "together")
    one, two = (table(pretrained / out / "metrics.csv") for out in ("alone", "together"))
    assert len(one) == 8
    for column in ("loss", "z_loss", "grad_norm"):
        assert [float(row[column]) for row in two] == pytest.approx([float(row[column]) for row in one], rel=1e-4, abs=1e-6)
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    places = [[float(row["after"]) for row in table(pretrained / out / "loss_by_position.csv")] for out in ("alone", "together")]
    assert places[1] == pytest.approx(places[0], abs=1e-4)
