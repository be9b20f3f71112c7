"""The command line: documented lines verbatim, spellings, messages, exit codes, help."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from minifoundation import __version__, cli, config
from minifoundation.errors import Interrupted, Stopped, UserError
from tests.conftest import COMMANDS, Calls


def one(calls: Calls, line: str) -> tuple[str, Any, dict[str, Any]]:
    assert cli.main(line.split()) == 0
    assert len(calls) == 1
    return calls.pop()


def test_pretrain_as_documented(calls: Calls) -> None:
    name, options, values = one(
        calls,
        "pretrain --config configs/model_0p5b.yaml --data fineweb --tokens 200_000_000 "
        "--batch_size 1 --grad_accum 32 --amp --bf16 --compile",
    )
    assert name == "pretrain"
    assert options == config.PretrainOptions(config=Path("configs/model_0p5b.yaml"), amp=True, bf16=True)
    from_yaml = config.read_yaml(config.REPOSITORY / "configs" / "model_0p5b.yaml")
    run = config.build(config.RunConfig, config.merged(from_yaml, values), "line")
    assert (run.data.source, run.train.tokens, run.train.batch_size, run.train.grad_accum) == ("fineweb", 200_000_000, 1, 32)
    assert run.train.compile is True
    assert run.out_dir == Path("outputs/pretrain")


def test_longft_as_documented(calls: Calls) -> None:
    name, options, values = one(
        calls,
        "longft --ckpt_in outputs/pretrain/final.pth --data fineweb --seq_len 16384 --batch_size 1 --grad_accum 16 --amp --bf16",
    )
    assert name == "longft"
    assert options == config.LongftOptions(ckpt_in=Path("outputs/pretrain/final.pth"), amp=True, bf16=True)
    assert values == {"data": {"source": "fineweb"}, "train": {"seq_len": "16384", "batch_size": "1", "grad_accum": "16"}}


def test_export_and_eval_as_documented(calls: Calls) -> None:
    _, options, _ = one(calls, "export_hf --ckpt outputs/pretrain/final.pth --out_dir outputs/hf_export")
    assert options == config.ExportOptions(ckpt=Path("outputs/pretrain/final.pth"), out_dir=Path("outputs/hf_export"))
    _, options, _ = one(calls, "eval --model_path outputs/hf_export --tasks configs/tasks.txt --limit 0")
    assert options == config.EvalOptions(model_path="outputs/hf_export", tasks="configs/tasks.txt", limit=0)


@pytest.mark.parametrize("line", ["--tokens 7", "--train.tokens 7", "--tokens=7", "--train.tokens=7"])
def test_a_short_flag_and_a_dotted_name_are_one_setting(calls: Calls, line: str) -> None:
    assert one(calls, f"pretrain {line}")[2] == {"train": {"tokens": "7"}}


def test_switches_say_yes_no_or_nothing(calls: Calls) -> None:
    assert one(calls, "pretrain")[2] == {}
    assert one(calls, "pretrain --compile")[2] == {"train": {"compile": True}}
    assert one(calls, "pretrain --no_compile")[2] == {"train": {"compile": False}}
    assert one(calls, "pretrain --no_model.tie_embeddings")[2] == {"model": {"tie_embeddings": False}}


def test_deep_and_mixed_case_values_arrive_untouched(calls: Calls) -> None:
    values = one(calls, "pretrain --model.rope.theta 1e6 --data Some/Path.JSONL --out_dir Outputs/A_b-C")[2]
    assert values == {"model": {"rope": {"theta": "1e6"}}, "data": {"source": "Some/Path.JSONL"}, "out_dir": "Outputs/A_b-C"}


def test_prepare_without_tokens_reads_the_whole_corpus(calls: Calls) -> None:
    _, options, values = one(calls, "prepare --data text --tokens none")
    assert options.tokens is None
    assert values == {"data": {"source": "text"}}
    assert one(calls, "prepare --data text --tokens 5_000")[1].tokens == 5000


def test_every_setting_is_an_option_of_its_commands() -> None:
    commands = cli.program().commands
    for name in ("pretrain", "longft"):
        spelled = {option for param in commands[name].params for option in param.opts}
        assert {f"--{dotted}" for dotted in config.dotted_names(config.RunConfig)} <= spelled
        assert {f"--{flag}" for flag in config.flags(config.RunConfig).values()} <= spelled


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pretrian", "error: pretrian: no such command; did you mean pretrain?"),
        (
            "nonsense",
            "error: nonsense: no such command; choose from prepare, inspect, pretrain, longft, bench, export_hf, import_hf, "
            "eval, eval-data, contamination, report, generate, serve, doctor",
        ),
        ("pretrain --lrr 3", "error: --lrr: no such option; did you mean --lr?"),
        ("pretrain --grad-accum 2", "error: --grad-accum: no such option; did you mean --grad_accum?"),
        ("pretrain --model.lr 2", "error: --model.lr: no such option; did you mean --lr?"),
        ("pretrain -config a.yaml", "error: -config: no such option; did you mean --config?"),
        ("pretrain --epochs 3", "error: --epochs: no such option; did you mean --tokens?"),
        ("pretrain --train.lerning_rate 3", "error: --train.lerning_rate: no such option; did you mean --lr?"),
        ("pretrain --min_lrs 3", "error: --min_lrs: no such option; did you mean --train.min_lr?"),
        ("pretrain --dtype bf16", "error: --dtype: no such option; did you mean --train.precision?"),
        (
            "--config a.yaml pretrain",
            "error: --config: no such option here; a command comes first: minifoundation COMMAND --config ...; "
            "minifoundation --help lists them",
        ),
        ("eval --zzzz 2", "error: --zzzz: no such option; minifoundation eval --help lists them"),
        (
            "pretrain --tokens",
            "error: minifoundation pretrain: Option '--tokens' requires an argument; minifoundation pretrain --help shows how",
        ),
        (
            "pretrain surplus",
            "error: minifoundation pretrain: Got unexpected extra argument (surplus); minifoundation pretrain --help shows how",
        ),
        ("eval", "error: model_path: required and not set (in command line); give it with --model_path"),
        ("longft", "error: ckpt_in: required and not set (in command line); give it with --ckpt_in"),
        ("export_hf --ckpt a --dtype int4", "error: dtype: 'int4' is not valid; input should be 'fp32', 'bf16' or 'fp16'"),
        ("eval --model_path a --limit -1", "error: limit: '-1' is not valid; input should be greater than or equal to 0"),
        ("generate --model a --prompt b --top_p 2", "error: top_p: '2' is not valid; input should be less than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(calls: Calls, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err == message + "\n"
    assert calls == []


@pytest.mark.parametrize("line", ["generate --model a --prompt", "report --runs a --name", "report --runs a --license"])
def test_text_of_a_terminal_in_another_encoding_is_refused(calls: Calls, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main([*line.split(), b"caf\xe9".decode("utf-8", "surrogateescape")]) == 2
    setting = line.rpartition("--")[2]
    remedy = "set the terminal to UTF-8 (its locale, or PYTHONUTF8=1) and type it again"
    assert capsys.readouterr().err == f"error: {setting}: is not text in UTF-8; {remedy}\n"
    assert calls == []


def test_a_terminal_that_lacks_a_character_loses_nothing_else() -> None:
    script = "import click, minifoundation.cli as cli\ncli.main = lambda: print('caf\u00e9 and more') or 0\ncli.run()"
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout == b"caf\\xe9 and more\n"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (UserError("a", "b", "c"), 2, "error: a: b; c\n"),
        (Stopped("stopped at step 3 and saved"), 0, "stopped at step 3 and saved\n"),
        (Interrupted("stopped; complete shards are kept"), 130, "stopped; complete shards are kept\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "outputs/x"),
            2,
            "error: outputs/x: the disk is full; free some space and run the same command again (a training run with --resume auto)\n",
        ),
        (OSError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: permission denied; check the path and its permissions\n"),
        (OSError(errno.EISDIR, "Is a directory", "/x.part", None, "/x"), 2, "error: /x: is a directory; give the path of a file\n"),
        (OSError(errno.EEXIST, "File exists", "/x"), 2, "error: /x: file exists; it is a file and a folder is needed: give another path\n"),
    ],
)
def test_exit_codes(calls: Calls, capsys: pytest.CaptureFixture[str], failure: BaseException, code: int, message: str) -> None:
    calls.failure = failure
    assert cli.main(["pretrain"]) == code
    assert capsys.readouterr().err == message


def struck(module: str, number: int) -> str:
    """Return a script that is the program, and gets a signal when it imports ``module``, where what that raises is lost."""
    return f"""
import os, sys
class Strikes:
    def find_spec(self, name, *_):
        if name == "{module}":
            try:
                os.kill(os.getpid(), {number})
            except BaseException:
                pass
sys.meta_path.insert(0, Strikes())
from minifoundation.__main__ import run
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["click", "minifoundation.commands.inspect"])
@pytest.mark.usefixtures("signals")
def test_a_signal_while_it_starts_is_one_line(number: int, module: str) -> None:
    """The imports take seconds, and an exception in them is a traceback, or is lost."""
    line = [sys.executable, "-c", struck(module, int(number)), "inspect", "--shards", "x"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


def test_under_nohup_it_starts_in_spite_of_a_closed_terminal() -> None:
    line = ["bash", "-c", 'trap \'\' HUP; exec "$0" "$@"', sys.executable, "-c", struck("click", signal.SIGHUP), "--version"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == f"minifoundation {__version__}\n"


def test_a_fault_of_ours_is_not_hidden(calls: Calls) -> None:
    calls.failure = OSError(errno.EACCES, "Permission denied")
    with pytest.raises(OSError, match="Permission denied"):
        cli.main(["pretrain"])


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help(capsys: pytest.CaptureFixture[str], name: str | None) -> None:
    assert cli.main([*(name or "").split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: minifoundation")
    if name is None:
        assert all(command.split()[0] in shown for command in COMMANDS)


def test_the_list_of_commands_is_whole_and_in_the_order_of_use() -> None:
    shown = CliRunner().invoke(cli.program(), ["--help"], terminal_width=80).output.split("Commands:\n")[1]
    assert [line.split()[0] for line in shown.splitlines()] == list(cli.program().commands) and "..." not in shown


def test_help_shows_defaults_and_choices() -> None:
    shown = CliRunner().invoke(cli.program(), ["pretrain", "--help"], terminal_width=200).output
    assert "--lr, --train.lr FLOAT" in shown
    assert "[default: 0.0006]" in shown
    assert "--train.schedule cosine|constant|wsd" in shown
    assert "--batch_size, --train.batch_size INT|auto" in shown
    assert "training tokens in total  [required, here or in the YAML]" in shown


def test_help_claims_no_default_that_a_command_does_not_have() -> None:
    """longft's are those of its YAML and of the checkpoint, some of bench's are its own."""
    longft = CliRunner().invoke(cli.program(), ["longft", "--help"], terminal_width=200).output
    of_a_run = longft[longft.index("--out_dir PATH") :]
    assert "folder of the run" in of_a_run and "[default" not in of_a_run and "[required" not in of_a_run
    bench = CliRunner().invoke(cli.program(), ["bench", "--help"], terminal_width=200).output
    assert "training tokens in total  [not needed]" in bench and "the most that fit  [default: auto]" in bench


def test_an_empty_line_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    empty = capsys.readouterr().out
    cli.main(["--help"])
    assert empty == capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minifoundation {__version__}\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=config.REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def test_help_and_mistakes_load_neither_torch_nor_numpy() -> None:
    for line in (
        "['pretrain', '--help']",
        "['eval', '--limit', 'x']",
        "['pretrain', '--config', 'configs/model_0p5b.yaml', '--tokens', 'x']",
    ):
        heavy = "{'torch', 'numpy', 'transformers', 'datasets', 'sentencepiece'}"
        done = run("-c", f"import sys; from minifoundation.cli import main; main({line}); sys.exit(bool({heavy} & set(sys.modules)))")
        assert done.returncode == 0, (line, done.stderr)


def test_the_documented_spelling_runs() -> None:
    done = run("-m", "src.cli", "pretrain", "--data", "x", "--nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --nonsense: no such option")
    assert run("-m", "src.cli", "--version").stdout == f"minifoundation {__version__}\n"


def test_help_answers_at_once() -> None:
    def seconds(*arguments: str) -> float:
        """Return processor time: what else the machine is doing makes it grow too, but alike for what is measured by turns."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = "import click, yaml, pydantic; pydantic.BaseModel, pydantic.TypeAdapter"  # 0.15 s, and help 0.35 s, where nothing else runs
    turns = [(seconds("-m", "src.cli", "pretrain", "--help"), seconds("-c", libraries)) for _ in range(4)]
    assert min(shown for shown, _ in turns) <= 3.5 * min(imported for _, imported in turns), (
        "torch alone takes ten times as long as they do"
    )


def test_the_program_is_a_click_group() -> None:
    assert isinstance(cli.program(), click.Group)
    assert list(cli.program().commands) == list(dict.fromkeys(name.split()[0] for name in COMMANDS))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_is_gone_ends_nothing(stream: str) -> None:
    """Ctrl-C ends the ``tee`` behind a run too: what the run then says must not keep it from saving."""
    read, write = os.pipe()
    os.close(read)
    arguments = ["--help"] if stream == "stdout" else ["no_such_command"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    done = subprocess.run([sys.executable, "-m", "src.cli", *arguments], cwd=config.REPOSITORY, **streams, timeout=60, check=False)
    os.close(write)
    assert done.returncode == {"stdout": 0, "stderr": 2}[stream] and not done.stderr
