"""``eval-data pull`` through the real clients of the hub, from a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.hub_server import hub
from tests.evaluate.tiny import ROOT

QUESTION = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


def run(server: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **server.environment, "HF_HUB_OFFLINE": "0"}  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "src.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_what_is_pulled_serves_an_evaluation_and_is_checked(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "hub/allenai/ai2_arc/1/ARC-Easy"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("validation", 2), ("test", 4)):
        rows = [QUESTION | {"id": f"{split}-{i}", "question": f"Which of {split} {i}?"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    splits = [{"split": split, "path": f"ARC-Easy/{split}-*"} for split in ("train", "validation", "test")]
    card = "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n"
    card += "".join(f"  - split: {one['split']}\n    path: {one['path']}\n" for one in splits) + "---\n"
    (folder.parent / "README.md").write_text(card)
    mirror = tmp_path / "mirror"
    with hub(tmp_path / "hub") as server:
        done = run(server, "eval-data", "pull", "--tasks", "arc_easy,piqa", "--data_dir", str(mirror))
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: eval-data pull: 1 task without data: piqa: data set baber/piqa: not cached and not reachable")
    written = sorted(str(path.relative_to(mirror)) for path in mirror.rglob("*.parquet"))
    assert written == [f"allenai/ai2_arc/ARC-Easy/{split}.parquet" for split in ("test", "train", "validation")]
    assert [row["id"] for row in pq.read_table(mirror / written[0]).to_pylist()] == [f"test-{i}" for i in range(4)]
    assert sorted(json.loads((mirror / "manifest.json").read_text())["sha256"]) == written
    with hub(tmp_path / "empty") as server:
        assert run(server, "eval-data", "check", "--tasks", "arc_easy", "--data_dir", str(mirror)).returncode == 0
        refused = run(server, "eval-data", "check", "--data_dir", str(tmp_path / "nowhere"))
    assert refused.returncode == 2 and "nowhere: no such folder; make one with eval-data pull" in refused.stderr
