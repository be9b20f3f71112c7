"""Whole runs on CPU: resumed equals uninterrupted, nothing overwritten, each fault one line."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minifoundation import runtime
from minifoundation.checkpoint import TENSORS, Checkpoint, load_checkpoint
from minifoundation.config import RunConfig, TokenizerConfig, TrainConfig
from minifoundation.data.tokenizer import train_tokenizer
from minifoundation.distributed import Split, World
from minifoundation.errors import Stopped, UserError
from minifoundation.runtime import Machine
from minifoundation.train import finder, loop, step
from minifoundation.train import run as running
from minifoundation.train.parallel import chosen_split
from minifoundation.train.plan import Plan, plan
from minifoundation.train.run import run
from minifoundation.train.state import Start
from tests.pretended import Pretended

Make = Callable[..., RunConfig]


def trained(config: RunConfig, *, resume: str | None = None, start: Start | None = None) -> Checkpoint:
    path = run(config, resume=resume, dry_run=False, start=start)
    assert path is not None
    return load_checkpoint(path)


def rows(config: RunConfig) -> list[dict[str, str]]:
    with (config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steady(row: dict[str, str]) -> dict[str, str]:
    """The columns that do not depend on the clock or the allocator."""
    return {name: row[name] for name in ("step", "tokens", "loss", "z_loss", "held_out_bits_per_byte", "lr", "grad_norm")}


@pytest.fixture
def as_if_8_bits_could_run() -> Iterator[None]:
    """Have a CPU compute in 8 bits, by the plain definitions of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "fp8_obstacle", lambda _: None)
        yield


def test_8_bits_give_way_to_bf16_where_they_cannot_run(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU may have them")
    found = trained(settings("asked", train={"precision": "fp8"}))
    assert "warning: train.precision: fp8 cannot run here: CPU, " in (said := capsys.readouterr().err) and "; using bf16" in said
    expected = trained(settings("given", train={"precision": "bf16"}))
    assert all(torch.equal(found.model[name], expected.model[name]) for name in expected.model)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have ``act`` called when step ``number`` begins."""
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return step.train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", struck)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"ema": 0.9}},
        {"train": {"precision": "bf16"}, "model": {"dropout": 0.1, "checkpointing": "full"}},
        {"train": {"precision": "fp16"}},
        {"train": {"precision": "fp8", "loss_chunk": 64}},
    ],
    ids=["fp32+ema", "bf16+dropout+checkpointing", "fp16", "fp8"],
)
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(
    settings: Make, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], as_if_8_bits_could_run: None
) -> None:
    whole = trained(settings("whole", **sections))

    broken = settings("broken", **sections)
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match=r"stopped at step 7 of 12 .* --resume auto"):
        trained(broken)
    monkeypatch.undo()
    resumed = trained(broken, resume="auto")

    assert resumed.progress == whole.progress
    for name, value in whole.model.items():
        assert torch.equal(value, resumed.model[name]), name
    if whole.ema:
        assert resumed.ema is not None and all(torch.equal(value, resumed.ema[name]) for name, value in whole.ema.items())
    assert [steady(r) for r in rows(broken)] == [steady(r) for r in rows(settings("whole", **sections))]


def test_a_killed_run_goes_on_from_the_last_checkpoint(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(settings("whole"))
    killed = settings("killed")

    def die() -> None:
        raise MemoryError("as if killed")

    at_step(monkeypatch, 11, die)
    with pytest.raises(MemoryError):
        trained(killed)
    monkeypatch.undo()
    state = killed.out_dir / "step_00000008" / TENSORS
    state.write_bytes(state.read_bytes()[:-1])  # and the last checkpoint is damaged
    capsys.readouterr()
    resumed = trained(killed, resume="auto")
    said = capsys.readouterr().err
    assert re.search(r"step_00000008: tensors.safetensors has [\d,]+ bytes instead of [\d,]+; passed over", said)
    assert "continuing from" in said and "at step 4 of 12" in said and "kept as step_00000008.aside" in said
    assert all(torch.equal(value, resumed.model[name]) for name, value in whole.model.items())
    assert [row["step"] for row in rows(killed)] == [str(n) for n in range(1, 13)]


def test_the_loss_falls_and_the_table_is_whole(settings: Make) -> None:
    config = settings(train={"tokens": 32 * 4 * 60, "log_every": 3})
    trained(config)
    table = rows(config)
    assert float(table[-1]["loss"]) < float(table[0]["loss"]) - 1.0
    assert [int(r["step"]) for r in table if r["held_out_bits_per_byte"]] == list(range(5, 61, 5))
    assert {int(r["step"]) for r in table} == set(range(3, 61, 3)) | set(range(5, 61, 5))
    last = table[-1]
    assert int(last["tokens"]) == 32 * 4 * 60 and float(last["tokens_per_second"]) > 0 and last["mfu"] == ""
    assert float(last["peak_memory_gib"]) > 0 and float(last["data_wait_seconds"]) >= 0


def test_the_same_line_twice_resumes_nothing_and_overwrites_nothing(settings: Make) -> None:
    config = settings()
    path = run(config, resume=None, dry_run=False)
    assert path is not None
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds a finished run; add --resume auto to continue it, or --out_dir"):
        run(config, resume=None, dry_run=False)
    assert run(config, resume="auto", dry_run=False) == path
    assert path.read_bytes() == before


def test_settings_that_would_make_it_another_run_are_refused_on_resume(settings: Make) -> None:
    config = settings()
    trained(config)
    (config.out_dir / "final.pth").unlink()
    for sections, message in (
        ({"train": {"lr": 0.5}}, r"train\.lr: 0\.5 here, but 0\.01 in .*; set it to 0\.01"),
        ({"model": {"d_ff": 128}}, r"model\.d_ff: 128 here, but 64"),
        ({"train": {"batch_size": 4}}, r"8 rows a step here, but 4 .*; choose them so that their product is 4"),
    ):
        with pytest.raises(UserError, match=message):
            run(settings(**sections), resume="auto", dry_run=False)
    other_split = settings(train={"batch_size": 1, "grad_accum": 4})
    trained(other_split, resume="auto")


def test_longft_reads_on_where_pretraining_stopped(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(settings())
    rope = {"scaling": "yarn", "factor": 4.0}
    config = settings("long", model={"rope": rope}, train={"seq_len": 128, "batch_size": 1, "grad_accum": 1, "tokens": 128 * 6})
    second = trained(config, start=Start("longft", first))
    assert "starting at shard 1, after the 1,536 tokens" in capsys.readouterr().err
    assert list(second.progress["first_shards"].values()) == [1] and second.progress["phase"] == "longft"
    assert second.config.model.max_seq_len == 128
    assert not torch.equal(second.model["blocks.0.qkv.weight"], first.model["blocks.0.qkv.weight"])


def test_longft_of_a_read_corpus_says_that_it_reads_it_again(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(settings(train={"tokens": 60_000, "batch_size": 16}, data={"shard_tokens": 1_000_000}))
    config = settings("long", data={"shard_tokens": 1_000_000}, train={"tokens": 1_000})
    assert list(trained(config, start=Start("longft", first)).progress["first_shards"].values()) == [0]
    assert "come to the end of the corpus; reading it again" in capsys.readouterr().err


def test_the_checkpoint_s_tokenizer_takes_the_place_of_one_left_behind(settings: Make) -> None:
    first = trained(settings())
    config = settings("long", train={"tokens": 1_000})
    left = config.out_dir / "tokenizer" / "tokenizer.model"
    left.parent.mkdir(parents=True)
    left.write_bytes(first.tokenizer_model[:1000])  # a write that was cut off, or another run's
    second = trained(config, start=Start("longft", first))
    assert left.read_bytes() == second.tokenizer_model == first.tokenizer_model


def test_dry_run_writes_nothing_and_prints_the_plan(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings()
    assert run(config, resume=None, dry_run=True) is None
    shown = capsys.readouterr().out
    assert "12 of 128 tokens (2 rows x 2 micro-batches x 32 tokens x 1 process)" in shown
    assert "FLOP" in shown and "GiB" in shown and "at 40%" in shown and "MFU of an H100" in shown and "nothing was started" in shown
    assert not config.out_dir.exists() and not config.data.shards_dir.exists()


def test_a_dry_run_refuses_the_shards_that_the_run_would_refuse(settings: Make) -> None:
    path = run(settings("first"), resume=None, dry_run=False)
    assert path is not None
    tokenizer = {"path": path.parent / "tokenizer" / "tokenizer.model"}
    other = settings("second", tokenizer=tokenizer, data={"shard_tokens": 100_000})
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"^data.shard_tokens: 100000 here, but .* was made with "):
            run(other, resume=None, dry_run=dry_run)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that a run makes."""
    made: list[Plan] = []

    def noted(*arguments: Any) -> Plan:
        made.append(plan(*arguments))
        return made[-1]

    monkeypatch.setattr(running, "plan", noted)
    return made


HUGE = {"vocab_size": 32_000}
"""What the settings say of the model's vocabulary, which is another one."""


@pytest.mark.parametrize("known_by", ["a tokenizer given", "one to be trained", "the checkpoint to begin from", "the one resumed"])
def test_a_dry_run_plans_the_model_that_is_trained(
    settings: Make, plans: list[Plan], capsys: pytest.CaptureFixture[str], tmp_path: Path, known_by: str
) -> None:
    config, resume, start = settings("planned", model=HUGE), None, None
    if known_by == "a tokenizer given":
        text = (Path(__file__).parents[2] / "examples" / "shakespeare.txt").read_text(encoding="utf-8")[:60_000]
        given = train_tokenizer([text], TokenizerConfig(vocab_size=700), tmp_path / "given.model")
        assert given.vocab_size > 512
        config = settings("planned", model=HUGE, tokenizer={"path": str(given.path)})
    elif known_by != "one to be trained":
        path = trained_part(settings("before"))
        if known_by == "the one resumed":
            resume = str(path)
        else:
            start = Start("longft", load_checkpoint(path))
    plans.clear()
    assert run(config, resume=resume, dry_run=True, start=start) is None
    (planned,) = plans
    shown = capsys.readouterr().out
    assert not config.out_dir.exists()
    assert run(config, resume=resume, dry_run=False, start=start) is not None
    found = load_checkpoint(config.out_dir / "final.pth")
    assert found.config.model.vocab_size == (768 if known_by == "a tokenizer given" else 512)
    assert f"{planned.parameters:,} parameters" in shown and f"vocabulary {found.config.model.vocab_size:,}\n" in shown
    assert planned.parameters == sum(weight.numel() for weight in found.model.values())
    assert planned.memory["weights"] == sum(weight.nbytes for weight in found.model.values())
    moments = load_checkpoint(config.out_dir / "step_00000008").optimizer
    assert planned.memory["optimizer"] == sum(tensor.nbytes for name, tensor in moments.items() if not name.startswith("step/"))
    assert all(later.memory == planned.memory for later in plans)


def trained_part(config: RunConfig) -> Path:
    """Return a checkpoint from the middle of a run of ``config``."""
    trained(config)
    return config.out_dir / "step_00000004"


def test_what_is_refused_as_too_large_is_the_model_that_is_trained(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (plan(settings(model={"vocab_size": size}), 1).memory_total for size in (512, 32_000))
    between = Pretended(torch.device("cpu"), "a GPU", (small + large) // 2, None)
    monkeypatch.setattr(runtime, "machine", lambda *_: between)
    monkeypatch.setattr(running, "supported", lambda config, *_: config)
    assert run(settings(model=HUGE), resume=None, dry_run=True) is None
    with pytest.raises(UserError, match=r"do not fit the memory of a GPU"):
        run(settings(model={"vocab_size": 512}, tokenizer={"vocab_size": 32_000}), resume=None, dry_run=True)


def test_how_the_model_is_split_follows_from_the_model_that_is_trained(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def split(config: RunConfig, machine: Machine, world: World) -> Split:
        sizes.append(config.model.vocab_size)
        return chosen_split(config, machine, world)

    monkeypatch.setattr(running, "chosen_split", split)
    run(settings(model=HUGE), resume=None, dry_run=True)
    assert sizes == [512]
    found = trained(settings(tokenizer={"vocab_size": 32_000}, train={"tokens": 128}))
    assert sizes == [512, 32_000, found.config.model.vocab_size], "the text supports fewer pieces than were asked for"


def test_a_vocabulary_that_8_bits_cannot_have_is_refused(settings: Make, as_if_8_bits_could_run: None) -> None:
    """The settings' own may be one that they can, and is not the one that is trained."""
    first = trained(settings())
    odd = replace(first, config=first.config.replaced(model={"vocab_size": 520}))
    with pytest.raises(UserError, match=r"model\.vocab_size: 520 in the checkpoint is not a multiple of 16, which train\.precision fp8"):
        run(settings("long", train={"precision": "fp8", "loss_chunk": 64}), resume=None, dry_run=True, start=Start("longft", odd))


def test_the_checkpoint_that_was_given_is_the_one_that_is_finished(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the ``final.pth`` of the new folder, where there is none."""
    path = run(settings("first"), resume=None, dry_run=False)
    assert run(settings("second"), resume=str(path), dry_run=False) == path
    assert f"{path} is finished: 12 of 12 steps" in capsys.readouterr().err and not settings("second").out_dir.exists()


def test_fewer_tokens_than_are_done_finish_nothing(settings: Make) -> None:
    config = settings()
    trained(config)
    done = config.out_dir / "step_00000008"
    fewer = settings("fewer", train={"tokens": 4 * 128})
    with pytest.raises(
        UserError, match=rf"train.tokens: 512 are 4 steps, and {done} has done 8; give at least 1,024, or an earlier checkpoint"
    ):
        run(fewer, resume=str(done), dry_run=False, allowed=("train.tokens",))
    assert not (fewer.out_dir / "final.pth").exists()


def test_a_dry_run_refuses_a_folder_that_holds_a_run(settings: Make) -> None:
    trained(settings())
    with pytest.raises(UserError, match="holds a finished run; add --resume auto"):
        run(settings(), resume=None, dry_run=True)


def test_a_dry_run_tells_what_a_resumed_run_would_refuse(settings: Make) -> None:
    path = trained_part(settings())
    with pytest.raises(UserError, match=r"train\.lr: 0\.5 here, but 0\.01 in .*step_00000004; set it to 0\.01"):
        run(settings(train={"lr": 0.5}), resume=str(path), dry_run=True)
    assert path.exists() and (path.parent / "final.pth").exists()


def test_a_dry_run_names_what_is_not_there_and_counts_the_tokenizer_that_is(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.model: cannot be read"):
        run(settings(tokenizer={"path": tmp_path / "nowhere.model"}), resume=None, dry_run=True)
    with pytest.raises(UserError, match=r"data\.source: .*nowhere' is neither a known corpus nor a path"):
        run(settings(data={"source": str(tmp_path / "nowhere")}), resume=None, dry_run=True)
    assert "nothing was started" in capsys.readouterr().out, "the plan is told first"
    (tmp_path / "file").touch()
    for there in (tmp_path / "file", tmp_path / "file" / "run"):
        elsewhere = settings().model_copy(update={"out_dir": there})
        with pytest.raises(UserError, match=f"out_dir: {there} cannot be written: .*/file is not a folder; give another folder"):
            run(elsewhere, resume=None, dry_run=True)
    run(settings(data={"source": "fineweb"}), resume=None, dry_run=True)  # a plan needs no network
    assert "warning" not in capsys.readouterr().err
    run(settings(model={"n_layer": 10_000, "d_ff": 2**22}, data={"source": "fineweb"}), resume=None, dry_run=True)
    assert "has less memory than that: a run is refused here" in capsys.readouterr().err
    trained(settings(train={"tokens": 128}))
    other = settings("other", tokenizer={"path": str(tmp_path / "run" / "tokenizer" / "tokenizer.model")}, model={"vocab_size": 4096})
    capsys.readouterr()
    run(other, resume=None, dry_run=True)
    shown = capsys.readouterr()
    assert "vocabulary 512" in shown.out and "model.vocab_size: 512 instead of 4,096" in shown.err


def test_a_tokenizer_that_an_earlier_attempt_has_left_is_told(settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = settings(data={"held_out": 0.0}, train={"tokens": 128})
    trained(first)
    assert "is there already" not in capsys.readouterr().err
    left = tmp_path / "again" / "tokenizer" / "tokenizer.model"
    left.parent.mkdir(parents=True)
    left.write_bytes((first.out_dir / "tokenizer" / "tokenizer.model").read_bytes())
    trained(settings("again", data={"held_out": 0.0}, train={"tokens": 128}))
    assert f"tokenizer: {left} is there already, and is used" in capsys.readouterr().err


def test_an_empty_folder_of_the_users_own_is_left_there(settings: Make, tmp_path: Path) -> None:
    for mine in (True, False):
        config = settings("mine" if mine else "ours", data={"source": str(tmp_path / "nowhere")})
        if mine:
            config.out_dir.mkdir()
        with pytest.raises(UserError, match="nowhere"):
            run(config, resume=None, dry_run=False)
        assert config.out_dir.exists() == mine


def test_a_run_that_is_never_evaluated_says_so(settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shard that is read to its end of a corpus that goes on holds no held-out document."""
    for name, share in (("by chance", 1e-9), ("on purpose", 0.0)):
        trained(
            settings(name, data={"held_out": share, "shard_tokens": 2048, "shards_dir": str(tmp_path / name)}, train={"tokens": 128 * 4})
        )
        told = "warning: data.held_out: too few documents of the shards that are read fell into it to evaluate on; raise data.held_out"
        assert (told in (said := capsys.readouterr().err)) is (name == "by chance") and "held out 0 tokens" in said


def test_faults_are_one_line(settings: Make, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    short = tmp_path / "short.txt"
    short.write_text("one two three four five six seven eight nine ten. " * 40)
    for config, message in (
        (settings(train={"tokens": 100}), r"train\.tokens: 100 is less than one step of 128"),
        (settings(data={"source": str(empty)}), r"empty"),
        (settings(data={"source": str(tmp_path / "nowhere")}), r"nowhere"),
        (
            settings(data={"source": str(short)}, train={"grad_accum": 5000, "tokens": 10_000_000}),
            r"samples of 32 tokens, and one step takes 10,000",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(config, resume=None, dry_run=False)
        assert "\n" not in str(caught.value)


def test_what_this_machine_cannot_do_is_said_and_done_without(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("minifoundation.runtime.can_compile", lambda _where: "no C++ compiler (g++ or clang++) is on the PATH")
    trained(settings(train={"compile": True}, model={"attention": "flash"}))
    said = capsys.readouterr().err
    assert "warning: --compile: no C++ compiler (g++ or clang++) is on the PATH; running without it" in said
    assert "warning: model.attention: flash needs a CUDA GPU and this is cpu" in said


def test_too_little_memory_is_one_line(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(
        UserError,
        match=r"train\.batch_size: 2 rows of 32 tokens do not fit the memory of CPU.* \(peak [\d.]+ of [\d.]+ GiB\); "
        r"with --batch_size 1 --grad_accum 4 [\d.]+ GiB are predicted: .* --batch_size 1 --grad_accum 4",
    ):
        run(settings(), resume=None, dry_run=False)


def test_skipped_rows_are_reported(settings: Make, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(corpus, folder)
    (folder / "a.txt").write_bytes(b"not \xff UTF-8")
    trained(settings(data={"source": str(folder), "shard_tokens": 1_000_000}))
    assert "skipped  1 not UTF-8" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(settings: Make) -> None:
    with pytest.raises(UserError, match=r"train\.max_rollbacks: steps 2 to 5 .*not finite.*after going back 3 times .*lower --lr"):
        run(settings(train={"lr": 1e30, "grad_clip": None, "warmup": 0.0, "max_skips": 4}), resume=None, dry_run=False)


def test_a_full_disk_keeps_the_last_checkpoint(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        calls += TENSORS in name
        if calls >= 2:
            raise OSError(28, "No space left on device", name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(config, resume=None, dry_run=False)
    monkeypatch.undo()
    assert [p.name for p in config.out_dir.glob("step_*")] == ["step_00000004"]
    shutil.rmtree(config.out_dir / "tokenizer")  # the checkpoint holds the tokenizer too
    assert trained(config, resume="auto").progress["step"] == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler deprecates parts of itself
def test_compiled_training_follows_eager_training(settings: Make) -> None:
    eager = settings("eager")
    compiled = settings("compiled", train={"compile": True})
    trained(eager)
    trained(compiled)
    for a, b in zip(rows(eager), rows(compiled), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-4)


def test_tokens_per_step_are_so_many_micro_batches(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(settings("given"))
    config = settings("followed", train={"grad_accum": 1, "tokens_per_step": 128})
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped at step 5 of 12"):
        trained(config)
    monkeypatch.undo()
    found = trained(config, resume="auto")
    assert found.progress == expected.progress and (found.config.train.grad_accum, found.config.train.tokens_per_step) == (1, 128)
    assert all(torch.equal(value, found.model[name]) for name, value in expected.model.items())


def test_auto_splits_the_rows_of_a_step_and_trains_the_same(settings: Make) -> None:
    """Four rows a step, given as one row four times over: all at once here, as a card with room for them would."""
    found = trained(settings("auto", train={"batch_size": "auto", "grad_accum": 4}))
    assert (found.config.train.batch_size, found.config.train.grad_accum) == (4, 1)
    expected = trained(settings("given", train={"batch_size": 4, "grad_accum": 1}))
    assert all(torch.equal(found.model[name], expected.model[name]) for name in expected.model)
    assert found.kernels == {"attention": "auto", "swiglu": "own", "rows": "auto"} or torch.cuda.is_available()


def test_auto_tries_the_model_that_is_trained(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one asked for: its vocabulary follows from the tokenizer, which is made first, or from the checkpoint."""
    tried: list[int] = []

    def fits(one: RunConfig, *_: Any) -> bool:
        tried.append(one.model.vocab_size)
        return True

    monkeypatch.setattr("minifoundation.train.run.steps_fit", fits)
    config = settings(model={"vocab_size": 32_000}, train={"batch_size": "auto", "grad_accum": 4})
    size = trained(config).config.model.vocab_size
    assert size == 512 and tried == [size]
    (config.out_dir / "final.pth").unlink()
    assert trained(config, resume="auto").config.model.vocab_size == size and tried == [size, size]


def test_auto_goes_on_with_the_rows_of_the_run(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more would fit by now, on another card or because a prediction was too high the first time."""
    made = settings(train={"batch_size": "auto"})
    config = made.model_copy(update={"train": TrainConfig.model_validate(made.train.model_dump(exclude={"grad_accum"}))})
    monkeypatch.setattr(finder, "MOST_ROWS", 4)
    expected = trained(config)
    assert (expected.config.train.batch_size, expected.progress["samples_per_step"]) == (4, 4)
    (config.out_dir / "final.pth").unlink()
    monkeypatch.setattr(finder, "MOST_ROWS", 16)
    found = trained(config, resume="auto")
    assert found.progress == expected.progress
    assert all(torch.equal(value, found.model[name]) for name, value in expected.model.items())


def test_what_fits_is_told_by_the_smallest_device(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that each went by their own would take different numbers of rows."""
    config = settings(train={"batch_size": "auto", "grad_accum": 64, "tokens": 10**6})
    shown = []
    for devices in ((2**36,), (2**36, 2**22)):
        monkeypatch.setattr(World, "of_all", lambda _, value, devices=devices: devices if isinstance(value, int) else [value])
        run(config, resume=None, dry_run=True)
        shown += re.findall(r"\((\d+) rows x", capsys.readouterr().out)
    assert shown[0] == "64" and int(shown[1]) < 64
