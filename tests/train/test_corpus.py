"""Runs whose shards are made while they train, and whose text comes from several sources."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minifoundation import cli
from minifoundation.checkpoint import Checkpoint, load_checkpoint
from minifoundation.config import RunConfig
from minifoundation.data.ledger import Entry
from minifoundation.data.prepare import shards_folder
from minifoundation.data.shards import MANIFEST, Shards, read_manifest, write_manifest
from minifoundation.data.supply import Supply
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import World
from minifoundation.errors import Stopped, UserError
from minifoundation.train import corpus as train_corpus
from minifoundation.train import run as train_run
from minifoundation.train.plan import plan
from minifoundation.train.run import run
from minifoundation.train.state import Start
from tests.train.threads import threads

Make = Callable[..., RunConfig]
SHARDS = {"shard_tokens": 1024, "held_out": 0.2}
LONGER = {"tokens": 32 * 4 * 60, "eval_every": 20, "save_every": 20}


def trained(config: RunConfig, *, resume: str | None = None, start: Start | None = None) -> Checkpoint:
    path = run(config, resume=resume, dry_run=False, start=start)
    assert path is not None
    return load_checkpoint(path)


def steady(config: RunConfig) -> list[dict[str, str]]:
    """The columns of metrics.csv that do not depend on the clock or the allocator."""
    with (config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        kept = ("step", "tokens", "loss", "z_loss", "held_out_bits_per_byte", "lr", "grad_norm")
        return [{name: row[name] for name in kept} for row in csv.DictReader(file)]


def folder_of(config: RunConfig, source: str | None = None) -> Path:
    tokenizer = Tokenizer.load(config.out_dir / "tokenizer" / "tokenizer.model")
    return shards_folder(source or str(config.data.source), config.data, tokenizer)


def test_a_source_that_is_spelled_otherwise_is_the_same(settings: Make, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(settings("first", data=SHARDS))
    capsys.readouterr()
    again = settings("again", data={**SHARDS, "source": f"{corpus.parent}/./{corpus.name}"})
    trained(again, start=Start("longft", first))
    read = entries(first)[0]
    assert f"data: starting at shard {read.shards}, after the {read.tokens:,} tokens that the phase" in capsys.readouterr().err


def test_long_and_short_documents_of_a_phase_count_together() -> None:
    long = Entry("longft", "a", 1.0, "f", {}, "", 2, 1, "", samples=50, seq_len=64, epochs=None, part="long")
    short = replace(long, part="short", samples=20)
    before = replace(long, first_shard=0, part=None, samples=1000)
    assert train_corpus._tokens(short, [before, replace(long, source="b"), long, short]) == 70 * 64
    assert train_corpus._tokens(before, [replace(before, samples=500), before, long, short]) == 1000 * 64, "a phase that began there again"


def test_shards_of_another_tokenizer_are_not_used_without_a_word(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """They may have been filtered with much work, and given to a run without their tokenizer."""
    first, second = settings(), settings("second", tokenizer={"vocab_size": 520})
    trained(first)
    assert "are not used" not in capsys.readouterr().err
    trained(second)
    assert f"those in {folder_of(first)}, of a source of that name, are of another tokenizer" in capsys.readouterr().err
    trained(second, resume="auto")
    assert "are not used" not in capsys.readouterr().err


def entries(checkpoint: Checkpoint) -> list[Entry]:
    return [Entry(**kept) for kept in checkpoint.ledger]


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run begin as soon as there is a shard."""
    monkeypatch.setattr(train_corpus, "AT_ONCE", 1)


@pytest.fixture
def whole(settings: Make, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose shards were there when it began."""
    config = settings("whole", data={**SHARDS, "shards_dir": str(settings().data.shards_dir / "whole")}, train=LONGER)
    with monkeypatch.context() as patch:
        patch.setattr(train_corpus, "AT_ONCE", 10**9)
        patch.setattr(train_run, "Supply", None)
        trained(config)
    return config


@pytest.mark.usefixtures("in_background")
def test_training_while_shards_are_made_is_training_after_they_are_made(
    settings: Make, whole: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    growing = settings("growing", data=SHARDS, train=LONGER)
    ours, other = trained(growing), load_checkpoint(whole.out_dir / "final.pth")
    assert "more is made while training runs" in capsys.readouterr().err
    assert steady(growing) == steady(whole)
    assert all(torch.equal(value, ours.model[name]) for name, value in other.model.items())
    made, before = (Shards.open(folder_of(config)).manifest for config in (growing, whole))
    assert made.pairs == before.pairs and len(made.pairs) > 4


@pytest.mark.slow
@pytest.mark.usefixtures("in_background")
def test_when_no_more_can_be_made_the_run_is_saved_and_goes_on_later(
    settings: Make, whole: RunConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "text" / "verse.txt"
    source.parent.mkdir()
    source.write_bytes((corpus / "verse.txt").read_bytes())
    config = settings("broken", data={**SHARDS, "source": str(source.parent)}, train=LONGER)

    def started(*args: Any) -> Supply:
        source.rename(tmp_path / "elsewhere")
        return Supply(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "Supply", started)
        with pytest.raises(UserError, match="text") as caught:
            trained(config)
    assert "\n" not in str(caught.value)
    saved = [path.name for path in config.out_dir.glob("step_*")]
    step = int(saved[-1][5:])
    assert len(steady(config)) == step and 0 < step < 20
    (tmp_path / "elsewhere").rename(source)
    resumed = trained(config, resume="auto")
    assert steady(config) == steady(whole)
    assert all(torch.equal(value, resumed.model[name]) for name, value in load_checkpoint(whole.out_dir / "final.pth").model.items())


def test_a_run_does_without_the_text_where_its_shards_suffice(settings: Make, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text" / "verse.txt"
    text.parent.mkdir()
    text.write_bytes((corpus / "verse.txt").read_bytes())
    data = {**SHARDS, "source": str(text)}
    first = settings("first", data=data)
    trained(first)
    text.unlink()
    given = {"path": str(first.out_dir / "tokenizer" / "tokenizer.model")}
    trained(settings("again", data=data, tokenizer=given))
    assert steady(settings("again")) == steady(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_corpus, "AT_ONCE", 1)  # what is there is enough to begin
        with pytest.raises(
            UserError, match=r"verse\.txt is no longer there, and is needed for other shards than those of [\d,]+ tokens in"
        ):
            run(settings("longer", data=data, tokenizer=given, train=LONGER), resume=None, dry_run=False)


class Idle:
    """A background that makes nothing."""

    def __init__(self, *_args: Any) -> None:
        pass

    def fault(self) -> None:
        return None

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


@pytest.mark.usefixtures("in_background")
def test_a_run_that_waits_for_data_shows_it_and_can_be_stopped(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings("waiting", data=SHARDS, train=LONGER)
    metrics = config.out_dir / "metrics.csv"

    def interrupt() -> None:
        """Strike when no step has been made for a while."""
        while not metrics.exists() or time.time() - metrics.stat().st_mtime < 2.5:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    def watched(*_args: Any) -> Idle:
        threading.Thread(target=interrupt, daemon=True).start()
        return Idle()

    monkeypatch.setattr(train_run, "Supply", watched)
    with pytest.raises(Stopped, match=r"stopped at step \d+ of 60 and saved"):
        trained(config)
    assert "waiting for data" in capsys.readouterr().err
    (saved,) = (path for path in config.out_dir.glob("step_*"))
    assert load_checkpoint(saved).progress["step"] == len(steady(config)) > 0


def test_a_mixture_is_read_by_weight_and_its_ledger_says_so(
    settings: Make, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.txt"
    small.write_bytes((corpus / "verse.txt").read_bytes()[:3_500])
    mix = {str(corpus): 3, str(small): 1}
    data = {**SHARDS, "source": None, "mix": mix}
    first = trained(settings("first", data=data, train=LONGER))
    shown = capsys.readouterr().err
    large, little = entries(first)
    assert [large.source, little.source] == [str(corpus), str(small)]
    assert (large.samples, little.samples) == (180, 60) and (large.share, little.share) == (0.75, 0.25)
    made = Shards.open(folder_of(settings("first", data=data), str(small)))
    per_epoch = sum((shard.n_tokens - 1) // 32 for shard in made.train)
    assert made.complete and little.epochs == 60 / per_epoch and little.shards == len(made.train)
    assert large.epochs is None and large.shards < 15 and large.tokens == 180 * 32
    assert f"{small} 25%: {made.train_tokens:,} tokens in {len(made.train)} shards, read {60 / per_epoch:.1f} times" in shown

    again = settings("again", data=data, train=LONGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_corpus, "AT_ONCE", 1)
        second = trained(again)
    assert steady(again) == steady(settings("first"))
    assert [(entry.samples, entry.shards_sha256) for entry in entries(second)] == [(e.samples, e.shards_sha256) for e in (large, little)]

    assert cli.main(["inspect", "--checkpoint", str(again.out_dir / "final.pth")]) == 0
    table = capsys.readouterr().out
    assert re.search(rf"pretrain +25\.00% +{little.tokens:,} +{60 / per_epoch:.2f}  {small}$", table, re.MULTILINE)
    assert re.search(rf"pretrain +75\.00% +{large.tokens:,} +under 1  {corpus}$", table, re.MULTILINE)
    assert f"180 samples; shards of {large.folder}: {large.shards} from number 0 on, sha256 {large.shards_sha256[:12]}" in table

    longer = trained(settings("longer", data=data, train={"tokens": 32 * 4 * 4}), start=Start("longft", first))
    shown = capsys.readouterr().err
    assert f"{small}: the phase before has come to the end of the corpus; reading it again" in shown
    assert f"{corpus}: starting at shard {large.shards}, after the {large.tokens:,} tokens" in shown
    assert longer.progress["first_shards"] == {str(corpus): large.shards, str(small): 0}
    assert [entry.phase for entry in entries(longer)] == ["pretrain", "pretrain", "longft", "longft"]


def test_a_mixture_of_one_text_twice_is_refused(settings: Make, corpus: Path) -> None:
    mix = {str(corpus): 0.5, f"{corpus}/../{corpus.name}": 0.5}
    with pytest.raises(UserError, match=r"data\.mix: .* are the same text; name it once"):
        run(settings(data={**SHARDS, "source": None, "mix": mix}), resume=None, dry_run=False)


def test_shards_that_the_checkpoint_has_not_read_are_refused(settings: Make) -> None:
    config = settings(data=SHARDS)
    trained(config)
    (config.out_dir / "final.pth").unlink()
    folder = folder_of(config)
    manifest = read_manifest(folder)
    assert manifest is not None
    pair = manifest.pairs[0]
    assert pair.train is not None
    other = pair.model_copy(update={"train": pair.train.model_copy(update={"sha256": "0" * 64})})
    write_manifest(folder, manifest.model_copy(update={"pairs": (other, *manifest.pairs[1:])}))
    with pytest.raises(UserError, match=r"its shards are not those that the checkpoint has read; give the data\.shards_dir"):
        run(config, resume="auto", dry_run=False)


@pytest.mark.parametrize("changed", ["weights", "sources", "source", "seq_len"])
def test_rows_that_the_place_in_the_data_does_not_count_are_refused(settings: Make, corpus: Path, tmp_path: Path, changed: str) -> None:
    """Though the change is allowed: samples would be read again, and others never."""
    small, third = tmp_path / "small.txt", tmp_path / "third.txt"
    for path in (small, third):
        path.write_bytes((corpus / "verse.txt").read_bytes()[:9_000])
    data = {**SHARDS, "source": None, "mix": {str(corpus): 3, str(small): 1}}
    trained(settings(data=data))
    (settings().out_dir / "final.pth").unlink()
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "weights": ({"mix": {str(corpus): 1, str(small): 1}}, {}),
        "sources": ({"mix": {str(corpus): 3, str(small): 1, str(third): 1}}, {}),
        "source": ({"mix": None, "source": str(third)}, {}),
        "seq_len": ({}, {"seq_len": 16}),
    }
    other, train = changes[changed]
    config = settings(data={**data, **other}, train=train)
    with pytest.raises(UserError, match=r"^(data\.mix|data\.source|train\.seq_len): .* here, but .*, or start another run with --out_dir$"):
        run(config, resume="auto", dry_run=False, allowed=("data.mix", "data.source", "train.seq_len"))


def test_the_figure_on_held_out_text_does_not_depend_on_what_other_runs_have_made(settings: Make) -> None:
    """The same run again, when a longer one has made more shards in the same folder."""
    short = settings("short", data=SHARDS, train={"eval_tokens": 100_000})
    trained(short)
    few = json.loads((folder_of(short) / MANIFEST).read_text())["pairs"]
    trained(settings("long", data=SHARDS, train=LONGER))
    assert len(json.loads((folder_of(short) / MANIFEST).read_text())["pairs"]) > len(few)
    again = settings("again", data=SHARDS, train={"eval_tokens": 100_000})
    trained(again)
    assert steady(again) == steady(short)


@pytest.mark.parametrize("appears", [True, False])
def test_what_the_first_process_has_made_is_waited_for_and_made_by_no_other(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appears: bool
) -> None:
    """What one machine writes to a network file system may take seconds to be seen by another; without one it never is."""
    config, file = settings(), tmp_path / "tokenizer.model"
    seen: list[bool] = []

    def opened(*_: Any, **__: Any) -> Any:
        seen.append(file.exists())
        if len(seen) == 1 and appears:
            threading.Timer(0.5, file.touch).start()
        return SimpleNamespace(tokenizer=SimpleNamespace(path=file), loader=SimpleNamespace(sources={}))

    def of(world: World) -> str:
        try:
            train_corpus.training_data(config, plan(config, 2), world, print, resumed=None, start=None, stepped_over=[])
        except UserError as error:
            return str(error)
        return ""

    monkeypatch.setattr(train_corpus, "_opened", opened)
    monkeypatch.setattr(train_corpus, "VISIBLE_SECONDS", 10.0 if appears else 0.5)
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(of, threads(2)))
    if appears:
        assert seen == [False, True] and told == ["", ""]
    else:
        assert seen == [False] and told[0] == told[1]
        assert re.match(rf"{file}: was made by the first process, and .* does not see it; give --out_dir and data\.shards_dir", told[0])
