"""Runs that are stopped, poisoned, robbed of their folder or started twice, against the run that nothing happened to."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from minifoundation import runtime
from minifoundation.checkpoint import TENSORS, Checkpoint, load_checkpoint, saver, set_aside, step_folders, step_of
from minifoundation.cli import main
from minifoundation.config import RunConfig
from minifoundation.data.loader import Loader
from minifoundation.distributed import World
from minifoundation.errors import Interrupted, Stopped, UserError
from minifoundation.lock import held
from minifoundation.train import loop, rollback, step
from minifoundation.train import run as running
from minifoundation.train import stop as stopping
from minifoundation.train.feed import NoData
from minifoundation.train.metrics import MetricsLog, Row
from minifoundation.train.plan import plan
from minifoundation.train.resume import checkpoint_to_resume
from minifoundation.train.rollback import Bad
from minifoundation.train.run import run
from minifoundation.train.state import Phase, Progress, beyond
from minifoundation.train.stop import Stop, stop_on_signals
from tests.checkpoint.made import same
from tests.train.test_run import at_step, rows, steady, trained
from tests.train.threads import threads

Make = Callable[..., RunConfig]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("first", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_and_resumed_again_and_again_is_the_uninterrupted_run(settings: Make, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """At 2, 4, 6 ... or 3, 5, 7 ...: each process does two steps."""
    sections: dict[str, Any] = {"train": {"ema": 0.9, "save_every": 3}}
    whole, broken = settings("whole", **sections), settings("broken", **sections)
    expected = trained(whole)
    for number in range(first, 12, 2):
        at_step(monkeypatch, first if number == first else 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stopped, match=rf"SIGUSR1: stopped at step {number} of 12 and saved .*; continue with: .* --resume auto"):
            trained(broken, resume=None if number == first else "auto")
        monkeypatch.undo()
    assert same(trained(broken, resume="auto"), Checkpoint(**{**vars(expected), "config": broken}))
    assert [steady(row) for row in rows(broken)] == [steady(row) for row in rows(whole)]
    of = [config.out_dir / "step_00000009" / "tensors.safetensors" for config in (whole, broken)]
    assert of[0].read_bytes() == of[1].read_bytes(), "optimizer, spike window and all"


def test_from_an_earlier_step_the_later_checkpoints_are_set_aside(settings: Make, capsys: Capture) -> None:
    config = settings()
    expected = trained(config)
    (config.out_dir / "final.pth").unlink()
    again = trained(config, resume=str(config.out_dir / "step_00000004"))
    assert same(again, expected)
    assert "step_00000008: is after the step to continue from; kept as step_00000008.aside" in capsys.readouterr().err
    assert [found.name for found in step_folders(config.out_dir)] == ["step_00000004", "step_00000008"]


def test_a_longer_course_that_is_stopped_goes_on_by_itself(settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The final.pth of the shorter one is not taken for its end."""
    short, long = settings(), settings(train={"tokens": 32 * 4 * 20})
    trained(short)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"stopped at step 10 of 20 .* --resume auto"):
        run(long, resume=str(short.out_dir / "step_00000008"), dry_run=False, allowed=("train.tokens",))
    assert "final.pth: is after the step to continue from; kept as final.pth.aside" in capsys.readouterr().err
    monkeypatch.undo()
    assert trained(long, resume="auto").progress["step"] == 20
    assert load_checkpoint(short.out_dir / "final.pth").progress["step"] == 20


def test_what_goes_on_from_another_folder_goes_back_to_it(settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    sections: dict[str, Any] = {"train": {"tokens": 32 * 4 * 20, "max_skips": 3, "save_every": 8}}
    trained(settings("before", **sections))
    begun = settings("before").out_dir / "step_00000008"
    poisoned(monkeypatch, lambda sample: 40 <= sample < 52)  # steps 11 to 13
    config = settings("after", **sections)
    final = trained(config, resume=str(begun))
    assert f"going back to {begun}, and over what was skipped" in capsys.readouterr().err
    assert final.progress["step"] == 20 and final.progress["stepped_over"] == [[40, 52]]
    assert [int(row["step"]) for row in rows(config)] == list(range(9, 21)), "the rows of the other folder stay there"


def test_the_path_that_was_typed_stays_until_something_is_saved(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(settings("before"))
    begun = settings("before").out_dir / "step_00000004"
    line = ["minifoundation", "pretrain", "--resume", str(begun)]
    monkeypatch.setattr("sys.argv", line)
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=rf"stopped \(no step was done yet\); continue with: .* --resume {begun}$"):
        trained(settings("after"), resume=str(begun))
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", line)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"stopped at step 6 of 12 .* --resume auto$"):
        trained(settings("after"), resume=str(begun))


def test_a_time_limit_is_a_stop(settings: Make) -> None:
    whole, short = settings("whole"), settings("short", train={"max_hours": 1e-9})
    expected = trained(whole)
    with pytest.raises(Stopped, match=r"train\.max_hours: stopped at step 1 of 12"):
        trained(short)
    assert same(trained(settings("short"), resume="auto"), Checkpoint(**{**vars(expected), "config": settings("short")}))


def test_a_signal_before_the_first_step_leaves_at_once(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()

    def tokenizing(*_arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("minifoundation.train.corpus.run_tokenizer", tokenizing)
    with pytest.raises(Interrupted, match=r"stopped \(no step was done yet\); continue with: .* --resume auto"):
        trained(config)
    monkeypatch.undo()
    assert trained(config, resume="auto").progress["step"] == 12


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_whole(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 7, twice)
    with pytest.raises(KeyboardInterrupt):
        trained(config)
    monkeypatch.undo()
    assert [found.name for found in step_folders(config.out_dir)] == ["step_00000004"]
    assert same(trained(config, resume="auto"), Checkpoint(**{**vars(trained(settings("whole"))), "config": config}))


@pytest.mark.parametrize("again", [0, 2], ids=["once", "again while it is made up for"])
@pytest.mark.parametrize("number", [5, 12], ids=["in the middle", "at the end"])
def test_an_evaluation_that_a_stop_cuts_short_is_made_up_for(
    settings: Make, monkeypatch: pytest.MonkeyPatch, number: int, again: int
) -> None:
    whole, broken = settings("whole"), settings("broken")
    expected = trained(whole)

    def stopped(*arguments: Any) -> float | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return step.held_out_loss(*arguments)

    calls = iter(range(100))
    which = {5: 0, 12: 2}[number]
    monkeypatch.setattr(loop, "held_out_loss", lambda *a: stopped(*a) if next(calls) == which else step.held_out_loss(*a))
    with pytest.raises(Stopped, match=f"stopped at step {number} of 12"):
        trained(broken)
    assert [int(row["step"]) for row in rows(broken)] == list(range(1, number))
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: None)  # as when train.max_hours are over
    for _ in range(again):
        with pytest.raises(Stopped, match=f"stopped at step {number} of 12"):
            trained(broken, resume="auto")
    monkeypatch.undo()
    assert not list(broken.out_dir.glob("*.aside*")), "it is saved already"
    assert same(trained(broken, resume="auto"), Checkpoint(**{**vars(expected), "config": broken}))
    assert [steady(row) for row in rows(broken)] == [steady(row) for row in rows(whole)]


def test_what_changes_the_result_is_refused_unless_allowed_and_the_rest_is_told(settings: Make, capsys: Capture) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").unlink()
    with pytest.raises(UserError, match=r"train\.lr: 0\.005 here, but 0\.01 in .*; set it to .* --allow_change train\.lr"):
        run(settings(train={"lr": 5e-3}), resume="auto", dry_run=False)
    capsys.readouterr()
    run(settings(train={"lr": 5e-3, "eval_every": 6}), resume="auto", dry_run=False, allowed=("train.lr",))
    assert "changed since" in (said := capsys.readouterr().err)
    assert "train.lr 0.005 instead of 0.01" in said and "train.eval_every 6 instead of 5" in said


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "source", "other.txt"),
        ("data", "mix", {"other.txt": 0.5, "verse.txt": 0.5}),
        ("data", "min_tokens", 16),
        ("train", "seq_len", 16),
        ("train", "seed", 8),
        ("model", "d_ff", 128),
        ("model", "n_layer", 3),
        ("train", "optimizer_states", "int8"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_refused_even_when_allowed(settings: Make, section: str, name: str, value: Any) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").unlink()
    changed = settings(**{section: {name: value}})
    named = "data.source" if name == "mix" else f"{section}.{name}"
    with pytest.raises(UserError, match=rf"^{named}: .* here, but .* in .*; set it to [^,]+, or start another run with --out_dir$"):
        run(changed, resume="auto", dry_run=False, allowed=("data.source", f"{section}.{name}"))


def test_one_run_a_folder(settings: Make) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").unlink()
    with held(config.out_dir), pytest.raises(UserError, match=rf"is being written by another process \(pid {os.getpid()} on "):
        run(config, resume="auto", dry_run=False)
    trained(config, resume="auto")  # the file of the lock is still there, and of no account


def test_run_json_tells_of_every_start(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    monkeypatch.setattr("sys.argv", ["minifoundation", "pretrain", "--data", "https://user:secret@host/x", "--resume", "auto"])
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        trained(config)
    assert str(stopped.value).endswith("pretrain --data 'https://***@host/x' --resume auto")
    trained(config, resume="auto")
    starts = json.loads((config.out_dir / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]
    assert "secret" not in json.dumps(starts)
    assert starts[0]["versions"]["torch"] == torch.__version__ and len(starts[0]["code"]["commit"]) == 40
    assert starts[0]["hardware"]["processes"] == 1 and starts[0]["hardware"]["device"].startswith("CPU")


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], value: float = math.nan) -> list[int]:
    """Have the losses of steps that read a ``bad`` sample come out as ``value`` times what they are; return the samples read."""
    read: list[int] = []
    real_rows, real_step = Loader.rows, step.train_step

    def seen(self: Loader, samples: Any) -> Any:
        found = real_rows(self, samples)
        found[:, 0] = [sample if bad(int(sample)) else -1 for sample in samples]  # tells the model's stand-in below
        return found

    class Poison(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor, cu_seqlens: Any) -> Any:
            marks = tokens[:, 0].tolist()
            tokens = tokens.clone()
            tokens[:, 0] = 1
            sums = self.model(tokens, targets, cu_seqlens)
            if max(marks) >= 0:
                sums = sums._replace(total=sums.total * value, cross_entropy=sums.cross_entropy * value)
            return sums

    def struck(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        return real_step(Poison(model), *arguments, **options)

    monkeypatch.setattr(Loader, "rows", seen)
    monkeypatch.setattr(loop, "train_step", struck)
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: 1.0)
    return read


def test_a_skipped_step_has_a_row_however_seldom_there_are_others(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"tokens": 32 * 4 * 20, "spike_window": 16, "lr": 1e-3, "log_every": 10, "eval_every": 99})
    poisoned(monkeypatch, lambda sample: sample == 41, math.nan)
    trained(config)
    assert [(row["step"], row["skipped"]) for row in rows(config)] == [("10", ""), ("11", "loss not finite"), ("20", "")]


@pytest.mark.parametrize(("value", "reason"), [(math.nan, "loss not finite"), (math.inf, "loss not finite"), (100.0, "loss spike")])
def test_a_bad_step_is_skipped_and_told_with_its_samples(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture, value: float, reason: str
) -> None:
    config = settings(train={"tokens": 32 * 4 * 20, "spike_window": 16, "lr": 1e-3})
    poisoned(monkeypatch, lambda sample: sample == 41, value)
    final = trained(config)
    assert f"step 11 skipped: {reason} (loss " in (said := capsys.readouterr().err) and "samples 40 to 43" in said
    assert [row["skipped"] for row in rows(config)] == [reason if number == 11 else "" for number in range(1, 21)]
    assert final.progress["skipped"] == [{"step": 11, "first_sample": 40, "end": 44, "reason": reason}]
    assert final.progress["stepped_over"] == [] and final.progress["step"] == 20
    assert all(value.isfinite().all() for value in final.model.values())


def test_after_a_row_of_them_the_run_goes_back_and_steps_over(settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Against a run of the same weights that never had these samples."""
    sections: dict[str, Any] = {"train": {"tokens": 32 * 4 * 20, "max_skips": 3, "save_every": 4, "ema": 0.9}}
    config = settings(**sections)
    poisoned(monkeypatch, lambda sample: 40 <= sample < 60)  # steps 11 to 15
    final = trained(config)
    said = capsys.readouterr().err
    assert "going back to" in said and "step_00000008" in said and "steps 11 to 13 (samples 40 to 51): loss not finite" in said
    assert final.progress["stepped_over"] == [[40, 52]] and final.progress["step"] == 20
    assert [one["first_sample"] for one in final.progress["skipped"]] == [52, 56], "the rest of them were skipped one by one"
    assert final.progress["sample"] == 4 * 20 + 12
    assert [int(row["step"]) for row in rows(config)] == list(range(1, 21))
    kept = json.loads((config.out_dir / "rollbacks.json").read_text())
    assert [(one["to"], one["first_sample"], one["end"]) for one in kept] == [(8, 40, 52)]
    assert main(["inspect", "--checkpoint", str(config.out_dir / "final.pth")]) == 0
    shown = capsys.readouterr().out
    assert "skipped   2 steps, the last 12: loss not finite" in shown and "left out  samples 40 to 51, at which" in shown

    monkeypatch.undo()
    other = settings("without", **sections)
    poisoned(monkeypatch, lambda sample: 52 <= sample < 60)
    (other.out_dir).mkdir()
    (other.out_dir / "rollbacks.json").write_text(json.dumps(kept))
    clean = trained(other)
    assert all(torch.equal(value, final.model[name]) for name, value in clean.model.items())
    assert clean.ema is not None and final.ema is not None and all(torch.equal(v, final.ema[n]) for n, v in clean.ema.items())


@pytest.mark.slow
def test_a_run_killed_after_going_back_steps_over_the_same_samples(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"train": {"tokens": 32 * 4 * 20, "max_skips": 3, "save_every": 4}}
    whole, killed = settings("whole", **sections), settings("killed", **sections)
    poisoned(monkeypatch, lambda sample: 40 <= sample < 60)
    expected = trained(whole)
    monkeypatch.undo()
    poisoned(monkeypatch, lambda sample: 40 <= sample < 60)
    real, calls = getattr(loop, "train_step"), iter(range(100))  # noqa: B009

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 14:  # 13 steps, back to 8, and one more
            raise MemoryError("as if killed")
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(MemoryError):
        trained(killed)
    assert [found.name for found in step_folders(killed.out_dir)] == ["step_00000004", "step_00000008"]
    monkeypatch.setattr(loop, "train_step", real)
    assert same(trained(killed, resume="auto"), Checkpoint(**{**vars(expected), "config": killed}))
    assert [steady(row) for row in rows(killed)] == [steady(row) for row in rows(whole)]


def test_a_run_killed_while_it_goes_back_is_the_one_that_was_not(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"train": {"tokens": 32 * 4 * 20, "max_skips": 3, "save_every": 4}}
    whole, killed = settings("whole", **sections), settings("killed", **sections)
    poisoned(monkeypatch, lambda sample: 40 <= sample < 60)  # the checkpoint of step 12 is one that it goes back over
    expected = trained(whole)
    calls = iter(range(100))

    def dies(what: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if next(calls) == 1:  # the second thing that is done to go back
                raise MemoryError("as if killed")
            return what(*arguments)

        return called

    with monkeypatch.context() as patch:
        for name in ("set_aside", "write_whole"):
            patch.setattr(rollback, name, dies(getattr(rollback, name)))
        with pytest.raises(MemoryError):
            trained(killed)
    assert same(trained(killed, resume="auto"), Checkpoint(**{**vars(expected), "config": killed}))
    assert [steady(row) for row in rows(killed)] == [steady(row) for row in rows(whole)]


def test_a_run_that_goes_back_while_its_data_fails_is_no_traceback(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the figures of a step are read when the next one is there, or will not come."""

    def fails(*_: Any) -> None:
        raise NoData(UserError("data", "is gone", "look for it"), everywhere=True)

    def diverged(_: Any) -> None:
        raise loop._Diverged(Bad(1, 3, 0, 12, "loss not finite"))

    monkeypatch.setattr(loop, "_train", fails)
    monkeypatch.setattr(loop._Report, "catch_up", diverged)
    with pytest.raises(
        UserError, match=r"train\.max_rollbacks: steps 1 to 3 \(samples 0 to 11\): loss not finite, after going back 2 times"
    ):
        trained(settings(train={"max_rollbacks": 2}))


def test_a_run_that_is_stopped_where_it_went_on_saves_nothing_again(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").unlink()

    def waits(*_: Any) -> None:
        raise NoData(None, everywhere=True)

    monkeypatch.setattr(loop, "_train", waits)
    with pytest.raises(Stopped, match="stopped at step 8 of 12"):
        trained(config, resume="auto")
    assert sorted(found.name for found in config.out_dir.glob("step_*")) == ["step_00000004", "step_00000008"]


def test_the_checkpoints_of_another_run_are_set_aside(settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The next start, or going back, would take them for this run's."""
    trained(settings("other"))
    trained(settings("run", train={"seed": 5}))
    begun, folder = settings("other").out_dir / "step_00000008", settings("run").out_dir
    (folder / "rollbacks.json").write_text("[]")
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trained(settings("run"), resume=str(begun))
    said = capsys.readouterr().err
    for name in ("step_00000004", "metrics.csv", "rollbacks.json"):
        assert f"{name}: is of another run than {begun}; kept as {name}.aside" in said
    assert len((folder / "metrics.csv").read_text().splitlines()) < 3 < len((folder / "metrics.csv.aside").read_text().splitlines())
    assert sorted(found.name for found in folder.glob("step_*")) == ["step_00000004.aside", "step_00000008.aside"]
    assert (folder / "final.pth.aside").exists() and [step_of(found) for found in step_folders(begun.parent)] == [4, 8]


def test_a_checkpoint_that_was_set_aside_can_be_gone_on_from(settings: Make) -> None:
    """In the place of the one of the same step, which is another."""
    config = settings()
    expected = trained(config)
    aside = set_aside(config.out_dir / "step_00000008")
    again = trained(config, resume=str(config.out_dir / "step_00000004"))
    assert same(again, expected) and (config.out_dir / "step_00000008").exists()
    assert same(trained(config, resume=str(aside)), expected)
    assert sorted(found.name for found in config.out_dir.glob("step_00000008*")) == ["step_00000008.aside", "step_00000008.aside2"]


def test_fewer_skips_than_there_were_already_have_the_run_go_back(settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    sections: dict[str, Any] = {"tokens": 32 * 4 * 16, "save_every": 4}
    poisoned(monkeypatch, lambda sample: 32 <= sample < 52)  # steps 9 to 13
    begun = settings(train={**sections, "max_skips": 100})
    trained(begun)
    (begun.out_dir / "final.pth").unlink()
    assert load_checkpoint(begun.out_dir / "step_00000012").progress["skipped_in_a_row"] == 4
    path = run(settings(train={**sections, "max_skips": 3}), resume="auto", dry_run=False, allowed=("train.max_skips",))
    assert path is not None and load_checkpoint(path).progress["stepped_over"] == [[32, 52]]
    assert "going back to" in capsys.readouterr().err


@pytest.mark.parametrize("step", [6, 12])
def test_a_row_that_cannot_be_written_ends_the_run_after_the_last_step_too(
    settings: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real = MetricsLog.write

    def full(self: MetricsLog, row: Row) -> None:
        if row["step"] == step:
            raise OSError(28, "No space left on device", "metrics.csv")
        real(self, row)

    monkeypatch.setattr(MetricsLog, "write", full)
    config = settings()
    with pytest.raises(OSError, match="No space left"):
        trained(config)
    assert not (config.out_dir / "final.pth").exists()


def test_a_row_that_was_made_up_for_and_cannot_be_written_is_as_any_other(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    config = settings(train={"if_save_fails": "continue"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 5 of 12"):
            trained(config)
    real = MetricsLog.write

    def full(self: MetricsLog, row: Row) -> None:
        if row["step"] == 5:
            raise OSError(28, "No space left on device", "metrics.csv")
        real(self, row)

    monkeypatch.setattr(MetricsLog, "write", full)
    assert trained(config, resume="auto").progress["step"] == 12
    assert "warning: not written: metrics.csv: no space left on device; training on" in capsys.readouterr().err


def test_what_is_resumed_from_is_held_neither_in_memory_nor_on_the_disk(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"ema": 0.9})
    trained(config)
    (config.out_dir / "final.pth").unlink()
    mapped: list[bool] = []
    maps = Path("/proc/self/maps")
    at_step(monkeypatch, 2, lambda: mapped.append("step_00000004" in maps.read_text()))
    assert trained(config, resume=str(config.out_dir / "step_00000004")).progress["step"] == 12
    assert mapped == [False]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.csv"])
def test_what_the_first_process_cannot_write_stops_all(settings: Make, name: str) -> None:
    """In their first step the others would wait for it, until they are killed."""
    config = settings()
    (config.out_dir / name).mkdir(parents=True)

    def one(world: World) -> str:
        phase = Phase(config, plan(config, 2), runtime.machine(), world, start=None, suite=None, say=print)
        with pytest.raises(OSError, match=name) as caught:
            running._log(phase, Progress())
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, threads(2))
    assert first == second


def test_a_run_that_learns_nothing_ends_with_what_it_saw(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"tokens": 32 * 4 * 20, "max_skips": 2, "max_rollbacks": 2, "save_every": 2})
    poisoned(monkeypatch, lambda sample: sample >= 24)
    with pytest.raises(
        UserError, match=r"train\.max_rollbacks: steps 7 to 8 .*after going back 2 times.*lower --lr.*look at these samples"
    ):
        trained(config)
    went = json.loads((config.out_dir / "rollbacks.json").read_text())
    assert [one["to"] for one in went] == [6, 4], "the second time it does not trust the checkpoint it had gone back to"
    assert [load_checkpoint(found).progress["step"] for found in step_folders(config.out_dir)] == [2, 4, 6]


@pytest.mark.parametrize("if_save_fails", ["stop", "continue"])
def test_a_save_that_fails_leaves_the_last_good_one(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: Capture, if_save_fails: str
) -> None:
    config = settings(train={"if_save_fails": if_save_fails})
    real = saver.write_step  # type: ignore[attr-defined]

    def fails(state: Any, *arguments: Any) -> Path:
        if state["progress"]["step"] == 8:
            raise OSError(30, "Read-only file system", str(config.out_dir / "step_00000008.part"))
        return Path(real(state, *arguments))

    monkeypatch.setattr(saver, "write_step", fails)
    if if_save_fails == "continue":
        assert trained(config).progress["step"] == 12
        assert "warning: not written: " in (said := capsys.readouterr().err) and "read-only file system; training on" in said
    else:
        with pytest.raises(OSError, match="Read-only"):
            trained(config)
    assert [found.name for found in step_folders(config.out_dir)] == ["step_00000004"]


def test_a_folder_that_vanishes_is_one_line(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()

    def vanish() -> None:
        deadline = time.monotonic() + 60
        while not (config.out_dir / "step_00000004").exists():  # on a busy machine it is still being written
            assert time.monotonic() < deadline
            time.sleep(0.01)
        shutil.rmtree(config.out_dir)

    at_step(monkeypatch, 6, vanish)
    with pytest.raises(UserError, match="the folder of the run is gone; find out where it went"):
        trained(config)
    assert not config.out_dir.exists()


def test_when_no_checkpoint_is_whole_the_run_is_not_begun_anew(settings: Make) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").write_bytes(b"")
    for folder in step_folders(config.out_dir):
        (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="holds checkpoints, but none of them is intact; begin again in another --out_dir"):
        run(config, resume="auto", dry_run=False)


def test_a_damaged_final_is_made_again_from_the_last_step(settings: Make, capsys: Capture) -> None:
    config = settings()
    expected = trained(config)
    final = config.out_dir / "final.pth"
    content = bytearray(final.read_bytes())
    content[len(content) // 2] ^= 1
    final.write_bytes(content)
    assert same(trained(config, resume="auto"), expected)
    assert "final.pth does not match its sha256; passed over" in capsys.readouterr().err


def test_places_step_over_holes() -> None:
    assert [beyond(sample, 4, [[8, 16], [16, 20]]) for sample in (0, 4, 5, 8, 12, 20)] == [0, 4, 20, 20, 20, 20]
    progress = Progress(sample=4, stepped_over=[[8, 16]])
    assert list(progress.places(3, 4)) == [4, 16, 20] and progress.end(3, 4) == 24 and progress.end(0, 4) == 4
    for holes in ([], [[8, 16]], [[3, 5], [8, 16], [17, 18], [40, 41]], [[0, 100]]):
        for size in (1, 3, 4):
            progress = Progress(sample=4, stepped_over=holes)
            assert [progress.end(steps, size) for steps in range(1, 20)] == [place + size for place in progress.places(19, size)]
    assert Progress().end(10**15, 4) == 4 * 10**15, "at once"


def test_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    assert not stop.asked
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)
    stop = Stop(max_hours=10)
    stop.nothing_to_save = False
    stop(signal.SIGUSR1, None)
    stop(signal.SIGTERM, None)  # of a scheduler that tells torchrun too, which tells its processes
    assert stop.asked and stop.reason == "SIGUSR1"
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_terminal_that_closes_is_a_stop_but_under_nohup(under_nohup: bool) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with stop_on_signals() as stop:
            stop.nothing_to_save = False
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is not under_nohup
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_disk_that_is_planned_is_what_checkpoints_take(settings: Make) -> None:
    config = settings(train={"keep": 1, "keep_every": 4})
    trained(config)
    sizes = [(folder / TENSORS).stat().st_size for folder in step_folders(config.out_dir)]
    assert [step_of(folder) for folder in step_folders(config.out_dir)] == [4, 8]
    planned, without = (plan(settings(train={"keep": 1, "keep_every": every}), 1) for every in (4, None))
    assert planned.disk_bytes - without.disk_bytes == pytest.approx(3 * sizes[0], rel=0.05)
    assert without.disk_bytes == pytest.approx(2 * sizes[0] + planned.memory["weights"], rel=0.05)


def test_the_former_model_is_gone_before_the_run_goes_back(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is split lies in a cycle, which only the collector takes apart; a second one would not fit beside it."""
    models: list[weakref.ref[torch.nn.Module]] = []

    def fails_once(*_arguments: Any, **_settings: Any) -> Bad | Path:
        if models:
            assert models[0]() is None
            return tmp_path
        model = torch.nn.Linear(2, 2)
        model.__dict__["itself"] = model
        models.append(weakref.ref(model))
        return Bad(1, 2, 0, 8, "loss not finite")

    monkeypatch.setattr(running, "_train", fails_once)
    monkeypatch.setattr(running, "_gone_back", lambda *_: None)
    monkeypatch.setattr(runtime, "gc", gc)
    config = settings()
    phase = Phase(config, plan(config, 1), runtime.machine(), World(), start=None, suite=None, say=print)
    gc.disable()
    try:
        assert running._trained(phase, Stop(), path=None, resumed=None) == tmp_path
    finally:
        gc.enable()


def test_no_other_run_can_write_while_one_chooses_where_to_go_on(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would set aside what the other one, which is just saving its last step, has written since."""
    config = settings()
    expected = trained(config)
    (config.out_dir / "final.pth").unlink()
    real = checkpoint_to_resume

    def chosen(*arguments: Any) -> Any:
        found = real(*arguments)
        with pytest.raises(UserError, match="is being written by another process"), held(config.out_dir):
            pass
        return found

    monkeypatch.setattr(running, "checkpoint_to_resume", chosen)
    assert same(trained(config, resume="auto"), expected)


def test_a_stop_whose_save_fails_does_not_say_that_it_is_saved(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"if_save_fails": "continue"})
    real = saver.write_step  # type: ignore[attr-defined]

    def fails(state: Any, *arguments: Any) -> Path:
        if state["progress"]["step"] == 6:
            raise OSError(28, "No space left on device", "disk")
        return Path(real(state, *arguments))

    monkeypatch.setattr(saver, "write_step", fails)
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match=r"SIGTERM: stopped at step 6, which could not be saved; --resume auto goes on from step_00000004$"):
        trained(config)


def test_all_processes_step_over_what_the_first_one_knows(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may still see the folder as it was before the first one wrote down that the run goes back."""
    config = settings()
    config.out_dir.mkdir()
    given: list[Any] = []
    process = threading.local()

    def begins(*_: Any, stepped_over: Any, **__: Any) -> Any:
        given.append(stepped_over)
        raise UserError("data", "is not there", "look for it")

    def one(world: World) -> None:
        process.sees = [[8, 12]] if world.is_first else []
        phase = Phase(config, plan(config, 2), runtime.machine(), world, start=None, suite=None, say=print)
        with pytest.raises(UserError, match="is not there"):
            running._train(phase, Stop(), resumed=None, again=True)

    monkeypatch.setattr(running, "training_data", begins)
    monkeypatch.setattr(running, "stepped_over", lambda _: process.sees)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, threads(2)))
    assert given == [[[8, 12]]] * 2


def test_a_run_that_saves_often_goes_back_to_the_step_before_the_first_bad_one(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the beginning, and what it went back over does not stay on the disk."""
    poisoned(monkeypatch, lambda sample: 40 <= sample < 52)  # steps 11 to 13
    config = settings(train={"tokens": 32 * 4 * 16, "max_skips": 3, "save_every": 1, "keep": 1})
    assert trained(config).progress["stepped_over"] == [[40, 52]]
    assert [one["to"] for one in json.loads((config.out_dir / "rollbacks.json").read_text())] == [10]
    assert [found.name for found in config.out_dir.glob("step_*")] == ["step_00000015"]


def test_what_there_is_to_go_back_to(tmp_path: Path) -> None:
    bad = Bad(9, 11, 32, 44, "loss not finite")
    begun = tmp_path / "step_00000008.aside"  # of the run's own folder, under another name
    begun.mkdir()
    (begun / "manifest.json").write_text(json.dumps({"step": 8}))

    def found(begun: Path | None) -> Path | None:
        return rollback.checkpoint_before(bad, tmp_path, begun, most=3, say=print)

    imported = tmp_path / "imported.pth"
    imported.touch()
    assert found(None) is None and found(begun) == begun and found(tmp_path / "removed") is None and found(imported) == imported
    rollback.record_rollback(bad, begun, tmp_path)
    assert [one["to"] for one in rollback.rollbacks(tmp_path)] == [8]
    for again in (None, begun):  # whose weights are bad then
        with pytest.raises(UserError, match=r"loss not finite, at once after going back to step 8, and there is no checkpoint from before"):
            found(again)
    (begun / "manifest.json").write_text(json.dumps({"step": 6}))
    assert found(begun) == begun
