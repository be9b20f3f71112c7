"""A few hundred cases of ``benchmarks.fuzz``: settings, YAML files, checkpoints and shards are taken or refused in one line."""

from __future__ import annotations

from pathlib import Path

from benchmarks import fuzz


def test_settings() -> None:
    outcomes = fuzz.fuzzed_settings(250)
    assert outcomes["accepted"] > 3 and outcomes["refused"] > 50


def test_yaml_files(tmp_path: Path) -> None:
    outcomes = fuzz.fuzzed_yaml(60, tmp_path)
    assert outcomes["refused"] > 10


def test_checkpoints_and_shards(tmp_path: Path) -> None:
    outcomes = fuzz.fuzzed_files(80, tmp_path)
    assert outcomes["refused"] > 5 and outcomes["shards refused"] > 2 and outcomes["resealed refused"] > 2
