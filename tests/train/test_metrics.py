"""Counters against counts by hand."""

import csv
import math
from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.train.metrics import COLUMNS, MetricsLog, bits_per_byte, model_flops_utilisation


def test_bits_per_byte_of_a_fair_coin_a_byte() -> None:
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)
    assert bits_per_byte(4 * math.log(2), 4.0) == pytest.approx(1.0)
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)


def test_utilisation_by_hand() -> None:
    # 136,343 tokens/s of the 0.49B model at 4096: 3.567 GFLOP a token on 989.4 TFLOP/s
    assert model_flops_utilisation(136_343, 3.567e9, 989.4e12, 1) == pytest.approx(0.4915, abs=1e-3)
    assert model_flops_utilisation(8e5, 3.567e9, 989.4e12, 8) == pytest.approx(8e5 * 3.567e9 / (8 * 989.4e12))
    assert model_flops_utilisation(1.0, 1.0, None, 1) is None


def row(step: int) -> dict[str, float | int | None]:
    return {"step": step, "tokens": step * 10, "loss": 1.0 / 3, "held_out_bits_per_byte": None}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_after_the_resumed_step_are_replaced(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resumed_at=0, tensorboard=False) as log:
        for step in (1, 2, 3, 4):
            log.write(row(step))
    with MetricsLog(tmp_path, resumed_at=2, tensorboard=False) as log:
        log.write(row(3))
    assert [r["step"] for r in rows(tmp_path)] == ["1", "2", "3"]
    assert tuple(rows(tmp_path)[0]) == COLUMNS
    assert rows(tmp_path)[0]["loss"] == "0.333333" and rows(tmp_path)[0]["held_out_bits_per_byte"] == ""


def test_a_row_that_was_torn_is_dropped(tmp_path: Path) -> None:
    """The disk was full in the middle of step 103: what is there of it must not pass for step 10."""
    with MetricsLog(tmp_path, resumed_at=0, tensorboard=False) as log:
        log.write(row(100))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("10")
    with MetricsLog(tmp_path, resumed_at=100, tensorboard=False) as log:
        log.write(row(101))
    assert [r["step"] for r in rows(tmp_path)] == ["100", "101"]


def test_what_a_spreadsheet_has_written_is_gone_on_from_or_refused_in_one_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resumed_at=0, tensorboard=False) as log:
        log.write(row(1))
    path = tmp_path / "metrics.csv"
    plain = path.read_text()
    path.write_bytes(
        b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode() + b"2,\xff"
    )  # a byte order mark, Windows' line ends, a torn row
    with MetricsLog(tmp_path, resumed_at=1, tensorboard=False) as log:
        log.write(row(2))
    assert [r["step"] for r in rows(tmp_path)] == ["1", "2"] and rows(tmp_path)[0]["loss"] == "0.333333"
    for spoiled in (plain.replace(",", ";").encode(), b"\xff\xfe", b"x" * 200_000):
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match=r"metrics.csv: is no table of metrics; restore it, or move it away"):
            MetricsLog(tmp_path, resumed_at=1, tensorboard=False)
        assert path.read_bytes() == spoiled


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path, resumed_at=0, tensorboard=False) as log:
            log.write(row(1))
    assert len(rows(tmp_path)) == 1


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, resumed_at=0, tensorboard=True) as log:
        log.write(row(1))
        log.write(row(2))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 0.3333), (2, 0.3333)]


def test_processes_but_the_first_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(None, resumed_at=0, tensorboard=True) as log:
        log.write(row(1))
    assert not list(tmp_path.iterdir())
