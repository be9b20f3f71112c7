"""Data sets of the Hub through its real client, in processes of their own: it takes its endpoint from the environment when imported."""

import json
import os
import random
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.hub_server import Fault, Hub, hub

READER = """
import json, sys
from collections import Counter
from minifoundation.config import DataConfig
from minifoundation.data import pieces, remote, rows, sources
from minifoundation.errors import UserError

remote.FIRST_WAIT_SECONDS = 0.02
results = []
for job in json.load(sys.stdin):
    remote.PATIENCE_SECONDS = job.get("patience", 60)
    pieces.PIECE_BYTES = job.get("piece_bytes", 40_000)
    config = DataConfig(source=job["source"], **job.get("settings", {}))
    result, skipped = {"pieces": []}, Counter()
    results.append(result)
    try:
        corpus = sources.find_corpus(job["source"], config, known=job.get("known"))
        result["id"] = corpus.id
        for piece in pieces.pieces(corpus, config, file=job.get("file", 0)):
            result["pieces"].append([])
            result["pieces"][-1].extend(rows.documents(piece, config, skipped))
    except UserError as error:
        result["error"] = str(error)
    result["skipped"] = skipped
json.dump(results, sys.stdout)
"""


def read(server: Hub, *jobs: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What a process reads whose Hub is ``server``, and its stderr."""
    environment = {**os.environ, **server.environment}
    done = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(jobs), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def texts(seed: int, count: int = 200) -> list[str]:
    letters = random.Random(seed)
    return [f"{seed} {n} " + "".join(letters.choices("abcdefgh ij\n", k=300)) for n in range(count)]


def write_parquet(path: Path, rows: list[str], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path, row_group_size=50, **options)


def write_version(root: Path, repository: str, version: str = "1", seed: int = 0) -> list[str]:
    """A data set of two files of four row groups each, and one of another split; returns the texts of ``train``."""
    folder = root / repository / version
    parts = [texts(seed), texts(seed + 1)]
    for number, rows in enumerate(parts):
        write_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet", rows)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ["never read"])
    (folder / "README.md").write_text("A data set.\n")
    return parts[0] + parts[1]


def joined(result: dict[str, Any]) -> list[str]:
    assert "error" not in result, result["error"]
    return [text for piece in result["pieces"] for text in piece]


def test_a_data_set_is_read_in_pieces_at_one_revision_and_goes_on_without_reading_again(tmp_path: Path) -> None:
    written = write_version(tmp_path, "org/text")
    job = {"source": "org/text"}
    with hub(tmp_path) as server:
        [whole], _ = read(server, job)
        write_version(tmp_path, "org/text", "2", seed=7)
        del server.requests[:]
        [resumed, newest], _ = read(server, {**job, "file": 1, "known": whole["id"]}, job)
        first_file = [
            (path, span) for _, path, span in server.requests if whole["id"]["revision"] in path and "train-00000" in path and span
        ]
    assert joined(whole) == written
    assert [len(piece) for piece in whole["pieces"]] == [100, 100, 100, 100]
    assert whole["id"] == {"hub": "org/text", "subset": None, "revision": whole["id"]["revision"], "column": "text"}
    assert resumed == {**whole, "pieces": whole["pieces"][2:]}
    assert joined(newest) == texts(7) + texts(8)
    assert newest["id"]["revision"] != whole["id"]["revision"]
    assert first_file == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl.zst", "parquet"])
def test_subsets_and_other_forms_are_those_of_the_card(tmp_path: Path, form: str) -> None:
    for subset in ("en", "de"):
        path = tmp_path / "org" / "cards" / "1" / subset / f"part.{form}"
        if form == "parquet":
            write_parquet(path, [f"one {subset}", f"two {subset}"])
        else:
            path.parent.mkdir(parents=True)
            with pa.CompressedOutputStream(str(path), "zstd") as out:
                out.write("".join(json.dumps({"text": text}) + "\n" for text in (f"one {subset}", f"two {subset}")).encode())
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n" for name in ("en", "de")
    )
    (tmp_path / "org" / "cards" / "1" / "README.md").write_text(card + "---\nA data set.\n")
    with hub(tmp_path) as server:
        jobs = [{"source": source} for source in ("org/cards:de", "org/cards:en", "org/cards", "org/cards:fr")]
        [german, english, unnamed, french], _ = read(server, *jobs)
    assert joined(german) == ["one de", "two de"]
    assert joined(english) == ["one en", "two en"]
    assert "Config name is missing" in unnamed["error"] and unnamed["error"].endswith("; name a subset: org/cards:subset")
    assert "'fr' not found" in french["error"] and "'en', 'de'" in french["error"]


@pytest.mark.slow
def test_addresses_of_the_hub_mean_files_folders_and_patterns_at_one_revision(tmp_path: Path) -> None:
    written = write_version(tmp_path, "org/text")
    root = "hf://datasets/org/text"
    with hub(tmp_path) as server:
        names = ("data", "data/train-*.parquet", "data/train-00001-of-00002.parquet", "data/none.parquet")
        [folder, pattern, file, missing], _ = read(server, *({"source": f"{root}/{name}"} for name in names))
        write_version(tmp_path, "org/text", "2", seed=7)
        [kept], _ = read(server, {"source": f"{root}/data/train-*.parquet", "known": pattern["id"]})
    assert joined(folder) == ["never read", *written]
    assert joined(pattern) == joined(kept) == written
    assert joined(file) == written[200:]
    assert missing["error"].startswith(f"data.source: {root}/data/none.parquet is not there")


FAULTS = {
    "drop": Fault("drop", everywhere=True),
    "truncate": Fault("truncate"),
    "503": Fault("503", times=2, everywhere=True),
    "429": Fault("429", everywhere=True),
    "stall": Fault("stall"),
}


@pytest.mark.slow
def test_documents_are_the_same_with_and_without_faults(tmp_path: Path) -> None:
    names = ["calm", *FAULTS]
    [written] = {tuple(write_version(tmp_path, f"{name}/text")) for name in names}
    with hub(tmp_path, {f"{name}/text": fault for name, fault in FAULTS.items()}) as server:
        results, told = read(server, *({"source": f"{name}/text"} for name in names))
    for name, result in zip(names, results, strict=True):
        assert tuple(joined(result)) == written, name
        assert result["pieces"] == results[0]["pieces"]
        assert (server.failed[f"{name}/text"] >= 5) == (name != "calm"), server.failed
    assert 1 <= len(told.splitlines()) < sum(server.failed.values())  # told, but not each of them
    assert all("; trying again in " in line for line in told.splitlines())


def test_giving_up_is_one_line_and_what_came_before_is_whole(tmp_path: Path) -> None:
    written = write_version(tmp_path, "down/text")
    with hub(tmp_path, {"down/text": Fault("503", times=inf, after=4)}) as server:
        [result], _ = read(server, {"source": "down/text", "patience": 0.5})
    assert result["error"].endswith("cannot be read (HTTP 503 Service Unavailable); run the same command again; complete shards are kept")
    assert result["error"].startswith(f"hf://datasets/down/text@{result['id']['revision']}/data/train-00000-of-00002.parquet: ")
    got = [text for piece in result["pieces"] for text in piece]
    assert got == written[:100]


UNREADABLE: list[tuple[str, dict[str, str], str]] = [
    ("org/none", {}, "org/none on the Hugging Face Hub is not there; check the name, org/name or org/name:subset, or give --data a path"),
    ("org/gated", {"a.jsonl": "{}"}, "org/gated is gated: the Hugging Face Hub asks who you are; accept its terms at https://"),
    ("org/program", {"program.py": "1"}, "org/program is a program, which is not run; give its files as hf://datasets/"),
    ("org/tables", {"train.csv": "a,b"}, "org/tables holds no .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz), only .csv; give"),
    ("org/split", {"test.jsonl": "{}"}, "org/split has no split train; its splits: test; give its files as hf://datasets/"),
    ("org/empty", {"README.md": "nothing"}, "org/empty holds no data files that can be read; check the name"),
]


def test_a_data_set_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for repository, files, _ in UNREADABLE:
        for name, content in files.items():
            path = tmp_path / repository / "1" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    with hub(tmp_path, {"org/gated": Fault("gated")}) as server:
        results, told = read(server, *({"source": repository} for repository, _, _ in UNREADABLE))
    for result, (_, _, message) in zip(results, UNREADABLE, strict=True):
        assert result["error"].startswith(f"data.source: {message}")
        assert "\n" not in result["error"]
    assert told == ""


@pytest.mark.slow
def test_a_column_that_is_missing_ends_the_reading_at_the_first_piece(tmp_path: Path) -> None:
    write_version(tmp_path, "org/text")
    with hub(tmp_path) as server:
        [result], _ = read(server, {"source": "org/text", "settings": {"text_column": "body"}})
    assert result["pieces"] == [[]]
    assert result["error"].endswith("set data.text_column to one of: id, text")


@pytest.mark.slow
def test_without_a_network_it_is_one_line(tmp_path: Path) -> None:
    with hub(tmp_path) as server:
        pass
    [name, address], _ = read(server, {"source": "fineweb-edu"}, {"source": "hf://datasets/org/text/a.jsonl"})
    assert "fineweb-edu (HuggingFaceFW/fineweb-edu on the Hugging Face Hub) cannot be reached (" in name["error"]
    assert name["error"].endswith("; connect to the network, or give --data a path")
    assert address["error"].startswith("data.source: hf://datasets/org/text/a.jsonl cannot be read (")
    assert address["error"].endswith("; check the address, your network and credentials")
