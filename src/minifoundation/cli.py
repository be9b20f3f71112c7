"""The command line: click options made from the settings' own types; a UserError becomes one line and exit code 2.

Click splits the line and suggests near names; pydantic converts and checks every value (docs/decisions/0001).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel

from minifoundation import __version__, config
from minifoundation.errors import Interrupted, UserError

Values = dict[str, Any]


class Command(click.Command):
    """A click command whose unknown options name the nearest known one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.params for name in param.opts]
            name = error.option_name
            near = config.nearest(name.lstrip("-").replace("-", "_"), [k.lstrip("-") for k in known])
            raise UserError(
                name, "no such option", f"did you mean --{near}?" if near else f"{ctx.command_path} --help lists them"
            ) from None
        except click.UsageError as error:
            raise UserError(ctx.command_path, error.format_message().rstrip("."), f"{ctx.command_path} --help shows how") from None


class Commands(click.Group):
    """The group of commands; a mistyped one names the nearest."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            near = get_close_matches(name, self.commands, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(self.commands)}"
            raise UserError(name, "no such command", remedy)
        return super().resolve_command(ctx, args)


def options(kind: type[BaseModel]) -> list[click.Option]:
    """Return one click option for each leaf setting of ``kind``, spelled ``--dotted.name`` and by its short flag."""
    found = []
    for name, field in config.fields(kind):
        flag = config.flags(kind).get(name)
        spellings = [f"--{flag}", f"--{name}"] if flag and flag != name else [f"--{name}"]
        switch = field.annotation is bool
        if switch:
            spellings = [f"{spelling}/--no_{spelling[2:]}" for spelling in spellings]
        default = "required" if field.is_required() else f"default: {_shown(field.default)}"
        found.append(
            click.Option(
                [*spellings, _variable(name)],
                help=f"{field.description}  [{default}]",
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
    return "none" if value is None else str(value)


def _metavar(annotation: Any) -> str:
    words = []
    for part in get_args(annotation) or (annotation,):
        if isinstance(part, str):
            words.append(part)
        elif part is not type(None):
            words += [str(choice) for choice in get_args(part)] or [part.__name__.upper()]
    return "|".join(words)


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


def _pretrain(given: Values) -> None:
    from minifoundation.commands.pretrain import pretrain

    chosen = config.build(config.PretrainOptions, _nested(config.PretrainOptions, given), "command line")
    pretrain(chosen, _nested(config.RunConfig, given))


def _longft(given: Values) -> None:
    chosen = config.build(config.LongftOptions, _nested(config.LongftOptions, given), "command line")
    from minifoundation.commands.longft import longft

    longft(chosen, _nested(config.RunConfig, given))


def _prepare(given: Values) -> None:
    chosen = config.build(config.PrepareOptions, _nested(config.PrepareOptions, given), "command line")
    from minifoundation.commands.prepare import prepare

    prepare(chosen, _nested(config.PrepareConfig, given))


def _export_hf(given: Values) -> None:
    chosen = config.build(config.ExportOptions, _nested(config.ExportOptions, given), "command line")
    from minifoundation.commands.export_hf import export_hf

    export_hf(chosen)


def _eval(given: Values) -> None:
    chosen = config.build(config.EvalOptions, _nested(config.EvalOptions, given), "command line")
    from minifoundation.commands.eval import evaluate

    evaluate(chosen)


def _generate(given: Values) -> None:
    chosen = config.build(config.GenerateOptions, _nested(config.GenerateOptions, given), "command line")
    from minifoundation.commands.generate import generate

    generate(chosen)


def _command(name: str, action: Callable[[Values], None], summary: str, *kinds: type[BaseModel]) -> Command:
    def callback(**given: Any) -> None:
        action(given)

    parameters: list[click.Parameter] = [option for kind in kinds for option in options(kind)]
    return Command(name, params=parameters, callback=callback, help=summary, context_settings={"max_content_width": 110})


def program() -> Commands:
    """Return the click group with every command."""
    group = Commands("minifoundation", help="From raw text to a benchmarked small language model.")
    group.params.append(
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="print the version")
    )
    run = config.RunConfig
    for command in (
        _command("prepare", _prepare, "Turn a corpus into token shards.", config.PrepareOptions, config.PrepareConfig),
        _command("pretrain", _pretrain, "Train a model from scratch.", config.PretrainOptions, run),
        _command("longft", _longft, "Extend the context of a trained model.", config.LongftOptions, run),
        _command("export_hf", _export_hf, "Write a Hugging Face folder and prove it equal.", config.ExportOptions),
        _command("eval", _eval, "Run benchmarks on a Hugging Face folder.", config.EvalOptions),
        _command("generate", _generate, "Continue a prompt.", config.GenerateOptions),
    ):
        group.add_command(command)
    return group


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"minifoundation {__version__}")
        ctx.exit()


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 2 the person can mend it, 130 stopped and saved."""
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        program().main(arguments or ["--help"], prog_name="minifoundation", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except Interrupted as stop:
        click.echo(str(stop), err=True)
        return 130
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except OSError as error:
        if error.errno not in (28, 122):  # no space left, quota exceeded
            raise
        place = error.filename or Path.cwd()
        remedy = "free some space and run the same line again (a training run with --resume auto)"
        click.echo(f"error: {place}: the disk is full; {remedy}", err=True)
        return 2
    return 0
