"""The command line: click options made from the settings' own types; a UserError becomes one line and exit code 2.

Click splits the line and suggests near names; pydantic converts and checks every value (docs/decisions/0001).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast, get_args, get_origin

import click
from pydantic import BaseModel

from minifoundation import __version__, config
from minifoundation.errors import Interrupted, Stopped, UserError

Values = dict[str, Any]

BROKEN_OFF = 130
"""Exit code of what was interrupted before it was done: the shell's for Ctrl-C."""


class Command(click.Command):
    """A click command whose unknown options name the nearest known one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.params for name in param.opts]
            name = error.option_name
            if not name.startswith("--"):  # click reads -config as the options -c, -o, ...
                name = next((arg.partition("=")[0] for arg in typed if arg.startswith(name)), name)
            near = config.nearest(name.lstrip("-").replace("-", "_"), [k.lstrip("-") for k in known])
            raise UserError(
                name, "no such option", f"did you mean --{near}?" if near else f"{ctx.command_path} --help lists them"
            ) from None
        except click.UsageError as error:
            raise UserError(ctx.command_path, error.format_message().rstrip("."), f"{ctx.command_path} --help shows how") from None


class Commands(click.Group):
    """The group of commands, in the order in which they are used; a mistyped one names the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            remedy = f"a command comes first: {ctx.command_path} COMMAND {name} ...; {ctx.command_path} --help lists them"
            raise UserError(name, "no such option here", remedy) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            near = get_close_matches(name, self.commands, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(self.commands)}"
            raise UserError(name, "no such command", remedy)
        return super().resolve_command(ctx, args)


def options_of(kind: type[BaseModel], other: Mapping[str, str] | None = None) -> list[click.Option]:
    """Return one click option for each leaf setting of ``kind``, spelled ``--dotted.name`` and by its short flag.

    Args:
        other: what is shown instead of a setting's own default, by its dotted name; under ``*`` for all that are not named.
    """
    found = []
    for name, field in config.fields(kind):
        flag = config.flags(kind).get(name)
        spellings = [f"--{flag}", f"--{name}"] if flag and flag != name else [f"--{name}"]
        switch = field.annotation is bool
        if switch:
            spellings = [f"{spelling}/--no_{spelling[2:]}" for spelling in spellings]
        default = "  [required]" if field.is_required() else f"  [default: {_shown(field.default)}]"
        if other is not None and (name in other or "*" in other):
            default = other.get(name, other.get("*", ""))
        elif other is not None and field.is_required():
            default = "  [required, here or in the YAML]"
        found.append(
            click.Option(
                [*spellings, _variable(name)],
                help=f"{field.description}{default}",
                metavar=None if switch else _metavar(field.annotation),
                is_flag=switch,
                default=None,
            )
        )
    return found


def _variable(name: str) -> str:
    return name.replace(".", "__")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, ()) else str(value).removeprefix(f"{config.REPOSITORY}/")  # a clone's own files, by their short path


def _metavar(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    match get_origin(annotation):
        case builtins.dict:
            return "NAME=VALUE,..."
        case builtins.tuple:
            return ",".join(map(_metavar, parts)) + ",..."
        case None:
            return str(annotation.__name__.upper())
        case _:
            return "|".join(map(_metavar, parts))


def _nested(kind: type[BaseModel], given: Values) -> Values:
    """Return the options that were given and belong to ``kind``, nested by section."""
    nested: Values = {}
    for name in config.dotted_names(kind):
        value = given.get(_variable(name))
        if value is not None:
            *sections, leaf = name.split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = value
    return nested


def _command(
    name: str,
    function: str,
    summary: str,
    kind: type[BaseModel],
    settings: type[BaseModel] | None = None,
    *,
    defaults: Mapping[str, str] | None = None,
) -> Command:
    """Return the command that calls ``function`` ("module.function" in ``commands``) with its options and, nested, the settings given.

    Args:
        defaults: of ``settings``, as for ``options_of``.
    """

    def callback(**given: Any) -> None:
        options = config.build(kind, _nested(kind, given), "command line")
        module, called = function.split(".")
        call = getattr(import_module(f"minifoundation.commands.{module}"), called)
        if settings is None:
            call(options)
        else:
            call(options, _nested(settings, given))

    parameters: list[click.Parameter] = [*options_of(kind), *(options_of(settings, defaults or {}) if settings else ())]
    return Command(name, params=parameters, callback=callback, help=summary, context_settings={"max_content_width": 110})


def program() -> Commands:
    """Return the click group with every command."""
    group = Commands("minifoundation", help="From raw text to a benchmarked small language model.", no_args_is_help=True)
    version = click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="print the version")
    group.params.append(version)
    run = config.RunConfig
    mirror = Commands("eval-data", help="Mirror benchmark data in a folder, for eval --data_dir.", no_args_is_help=True)
    mirror.add_command(
        _command("pull", "eval_data.pull", "Download the data of tasks from the hub to a mirror folder.", config.PullOptions)
    )
    mirror.add_command(
        _command("check", "eval_data.check", "Check a mirror folder against its manifest and the tasks.", config.CheckOptions)
    )
    commands: tuple[click.Command, ...] = (
        _command(
            "prepare",
            "prepare.prepare",
            "Turn a corpus into token shards.\n\n--config can be the YAML of a whole run. Settings of how rows are read from the shards "
            "(data.mask_documents, data.min_tokens, long_share, long_repeats, search_tokens) have no effect here.",
            config.PrepareOptions,
            config.PrepareConfig,
        ),
        _command("inspect", "inspect.inspect", "Show what shards contain, or what a checkpoint has read.", config.InspectOptions),
        _command(
            "pretrain",
            "pretrain.pretrain",
            "Train a model, from scratch or from given weights.\n\nA setting given here overrides the same one in --config.",
            config.PretrainOptions,
            run,
        ),
        _command(
            "longft",
            "longft.longft",
            "Extend the context of a trained model.\n\nSettings come from the checkpoint, then from --config (default: "
            "configs/longft.yaml, with out_dir outputs/longft), then from this command line; later ones win.",
            config.LongftOptions,
            run,
            defaults={"*": ""},
        ),
        _command(
            "bench",
            "bench.bench",
            "Measure a model on this machine, and recommend settings.\n\nIt takes the settings of pretrain; those of data, checkpoints "
            "and evaluations have no effect.",
            config.BenchOptions,
            run,
            defaults={
                "train.tokens": "  [not needed]",
                "train.batch_size": "  [default: auto]",
                "train.precision": "  [default: bf16 on a GPU, else fp32]",
                "train.compile": "  [default: on with a GPU]",
            },
        ),
        _command("export_hf", "export_hf.export_hf", "Export to a Hugging Face folder, and prove it equal.", config.ExportOptions),
        _command("import_hf", "import_hf.import_hf", "Convert a Hugging Face folder to an equal checkpoint.", config.ImportOptions),
        _command("eval", "eval.evaluate", "Run benchmarks on a model.", config.EvalOptions),
        mirror,
        _command("contamination", "contamination.contamination", "Find test items in the training text.", config.ContaminationOptions),
        _command("report", "report.report", "Write an HTML page and a model card of runs and scores.", config.ReportOptions),
        _command("generate", "generate.generate", "Continue a prompt.", config.GenerateOptions),
        _command("serve", "serve.serve", "Serve an OpenAI-compatible completions API and a web page.", config.ServeOptions),
        _command("doctor", "doctor.doctor", "Check this machine, and the files of a run.", config.DoctorOptions),
    )
    for command in commands:
        group.add_command(command)
    return group


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"minifoundation {__version__}")
        ctx.exit()


class Heard:
    """A stream for a person who may have gone: what a closed pipe or terminal does not take is dropped, and the work goes on.

    Ctrl-C also ends the ``tee`` behind a run, which is about to say that it saves, and then to save.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _unless_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _unless_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise


def run() -> NoReturn:
    """Run the command line of this process, and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal does not have is no reason to lose the rest
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and cast(TextIO, Heard(stream)) for stream in (sys.stdout, sys.stderr))
    code = main()
    several = os.environ.get("WORLD_SIZE", "") not in ("", "1")
    if code and several:
        # torchrun ends the others as soon as one has left: the one that speaks goes first, and none loses its exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)
    if code == BROKEN_OFF or (code and several):
        # Threads that are still at work, of torch.distributed or SentencePiece, abort a process now and then when Python takes it down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, or told to stop and saved; 2 the person can mend it; 130 broken off.

    Of several processes with the same to say one says it: the first, or, of what is wrong in settings alone, the first of its machine.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        program().main(arguments or ["--help"], prog_name="minifoundation", standalone_mode=False)
    except Stopped as stop:
        _say(str(stop), stop)
        return 0
    except Interrupted as stop:
        _say(str(stop), stop)
        return BROKEN_OFF
    except UserError as error:
        _say(f"error: {error}", error)
        return 2
    except click.ClickException as error:
        _say(f"error: {error.format_message()}", error)
        return 2
    except (KeyboardInterrupt, click.Abort) as stop:
        _say("stopped", stop)
        return BROKEN_OFF
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename or Path.cwd()
            remedy = "free some space and run the same command again (a training run with --resume auto)"
            _say(f"error: {place}: the disk is full; {remedy}", error)
        elif error.filename is not None and error.strerror is not None:
            remedy = {
                errno.EEXIST: "it is a file and a folder is needed: give another path",
                errno.ENOTDIR: "a part of this path is a file: give a folder",
                errno.EISDIR: "give the path of a file",
            }.get(error.errno or 0, "check the path and its permissions")
            place = error.filename2 or error.filename  # of a rename, where the new name is: the old one is of our making
            _say(f"error: {place}: {error.strerror.lower()}; {remedy}", error)
        else:
            raise
        return 2
    return 0


def _say(line: str, error: BaseException) -> None:
    told = getattr(error, "told", None)
    if told is None:
        told = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if not told:
        click.echo(line, err=True)
