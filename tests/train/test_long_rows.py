"""Runs that read long documents more often than these occur."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from minifoundation.config import RunConfig
from minifoundation.data.shards import Shards
from minifoundation.errors import UserError
from minifoundation.train.run import run
from minifoundation.train.state import Start
from tests.train.test_corpus import Make, entries, steady, trained

LONG = {"shard_tokens": 1024, "held_out": 0.2, "max_document_bytes": 8192, "min_tokens": 100, "mask_documents": True}


def longer(settings: Make, tmp_path: Path, name: str = "run", **data: Any) -> RunConfig:
    """Return a run on many short documents and a few that are longer than a row of 32."""
    source = tmp_path / "lengths.jsonl"
    if not source.exists():
        text = " ".join(f"word{number % 97} of {number}" for number in range(4000))
        lines = [text[60 * number : 60 * number + (4000 if number % 100 == 7 else 60)] for number in range(400)]
        source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return settings(name, data={"source": str(source), **LONG, **data})


def test_long_documents_are_read_more_often_and_it_is_said(settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = longer(settings, tmp_path, long_share=0.8, search_tokens=40_000)
    checkpoint = trained(config)
    said = capsys.readouterr().err
    assert "80% of the rows begin with one of" in said and "documents of 100 tokens and more" in said
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tokens there", said)]
    mix = [float(share) for share in re.findall(r"([\d.]+)% of those trained on", said)]
    assert sum(shares) == pytest.approx(100, abs=0.3) and sum(mix) == pytest.approx(100, abs=0.3)
    long, short = entries(checkpoint)
    assert (long.part, short.part) == ("long", "short") and long.source == short.source == config.data.source
    assert (long.samples, short.samples) == (38, 10)  # of 12 steps of 4 rows
    # A stop and a start in between change nothing, also where the rest of the corpus has been made since.
    halfway = longer(settings, tmp_path, "other", long_share=0.8, search_tokens=40_000)
    trained(halfway)
    (halfway.out_dir / "final.pth").unlink()
    for folder in sorted(halfway.out_dir.glob("step_*"))[1:]:
        shutil.rmtree(folder)
    again = trained(halfway, resume="auto")
    assert steady(halfway) == steady(config) and entries(again) == entries(checkpoint)

    (halfway.out_dir / "final.pth").unlink()
    fewer = longer(settings, tmp_path, "other", long_share=0.8, search_tokens=10_000)
    with pytest.raises(UserError, match=r"^data\.search_tokens: .* here, but .*, or start another run"):  # fewer documents are known
        run(fewer, resume="auto", dry_run=False, allowed=("data.search_tokens",))


def test_a_later_phase_begins_after_what_was_searched_though_no_short_document_was_read(settings: Make, tmp_path: Path) -> None:
    first = trained(longer(settings, tmp_path, long_share=0.99, long_repeats=100, search_tokens=4000))
    long, short = entries(first)
    assert (long.samples, short.samples) == (48, 0) and long.shards == short.shards > 1
    second = trained(longer(settings, tmp_path, "second", min_tokens=None), start=Start("longft", first))
    assert second.progress["first_shards"] == {long.source: long.shards}


@pytest.mark.parametrize(("repeats", "share", "read"), [(0.01, 0.9, "as often as all"), (0.1, 0.9, "0.1"), (100, 0.5, "0.5 of the rows")])
def test_long_documents_are_read_no_more_and_no_less_than_they_should(
    settings: Make, tmp_path: Path, repeats: float, share: float, read: str
) -> None:
    """By the entry of the ledger: 48 rows of 32 tokens in all."""
    config = longer(settings, tmp_path, long_repeats=repeats, long_share=share, search_tokens=40_000)
    long, short = entries(trained(config))
    assert long.epochs is not None and long.samples + short.samples == 48
    tokens = Shards.open(Path(long.folder)).train_tokens
    expected = {"as often as all": 48 * 32 / tokens, "0.1": 0.1, "0.5 of the rows": 24 / (long.samples / long.epochs)}
    assert long.epochs == pytest.approx(expected[read], abs=1.1 * long.epochs / long.samples)


def test_without_a_long_document(settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"data\.min_tokens: no document of .*lengths\.jsonl has 9,000 tokens: the longest of .*; lower it"):
        trained(longer(settings, tmp_path, min_tokens=9000))
    rows = {"model": {"original_seq_len": 512}, "train": {"seq_len": 512, "tokens": 5000}}
    trained(settings("windows", data={"min_tokens": "auto", "max_document_bytes": 256}, **rows))
    said = capsys.readouterr().err
    assert re.search(
        r"warning: no document of .* has 256 tokens: the longest of [\d,]+ tokens searched has \d+; rows are windows of 512", said
    )


def test_a_source_without_a_long_document_leaves_the_others_theirs(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where more is read than was searched: its windows go on into shards that are made while the run trains."""
    long, short = str(longer(settings, tmp_path).data.source), tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"{number} and {number % 7} is {number + number % 7}"}) + "\n" for number in range(2000)))
    config = settings(
        data={**LONG, "source": None, "mix": {long: 0.5, str(short): 0.5}, "min_tokens": "auto", "search_tokens": 4000},
        model={"original_seq_len": 128},
        train={"seq_len": 128, "tokens": 128 * 4 * 40, "batch_size": 1, "grad_accum": 4, "eval_every": 20},
    )
    found = entries(trained(config))
    assert f"warning: no document of {short} has 64 tokens" in capsys.readouterr().err
    assert [(entry.source, entry.part) for entry in found] == [(long, "long"), (long, "short"), (str(short), None)]
    assert found[0].samples + found[1].samples == found[2].samples == 80
    assert found[2].tokens > 2 * 4000 and found[2].shards > 4
