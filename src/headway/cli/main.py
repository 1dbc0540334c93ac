"""The `headway` command: loads a command's module only when that command is asked for.

Exit status: 0 done; 1 something unexpected; 2 a mistake that can be mended (an option, a file, a model: one line says
what and how); 130 interrupted. Tracebacks are shown only with `--debug`, which may stand anywhere on the line.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import click

from headway.cli.launched import EXIT_USAGE, launched_rank
from headway.errors import ConfigError, HeadwayError

EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended


class CommandEntry(NamedTuple):
    """Where a command lives and the line that `headway --help` shows for it."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "train": CommandEntry(
        "headway.cli.train",
        "train_command",
        "Train a multi-token model from text, or continue the unfinished run in the output folder.",
    ),
    "report": CommandEntry(
        "headway.cli.report", "report_command", "Compare training runs on one page, from their metrics alone."
    ),
    "generate": CommandEntry(
        "headway.cli.generate", "generate_command", "Continue a prompt, faster, with not one token changed."
    ),
    "race": CommandEntry(
        "headway.cli.race", "race_command", "Watch plain and self-speculative decoding type the same text."
    ),
    "bench": CommandEntry("headway.cli.bench", "bench_command", "Measure every way to decode a model on this machine."),
    "calibrate": CommandEntry(
        "headway.cli.calibrate", "calibrate_command", "Fit a model's drafts to a text and to this machine."
    ),
    "info": CommandEntry(
        "headway.cli.info", "info_command", "Show versions and device, or what a model costs in memory."
    ),
    "demo": CommandEntry(
        "headway.cli.demo", "demo_command", "Train a small byte model here and now, and compare its decoding."
    ),
    "convert": CommandEntry(
        "headway.cli.convert",
        "convert_command",
        "Convert a model between headway, plain Hugging Face and other layouts.",
    ),
    "analyze": CommandEntry(
        "headway.cli.analyze", "analyze_command", "Show what a model says about the next two tokens along a text."
    ),
    "experiments": CommandEntry(
        "headway.cli.experiments", "experiments_group", "Train several models under equal conditions and compare them."
    ),
}


class LazyGroup(click.Group):
    """A group whose help is drawn from `COMMANDS` without importing any command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return the command, or None for an unknown name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command), f"{entry.module}.{entry.attribute} is not a click command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the line names; an unknown name is answered with the nearest one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command '{name}'; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.command(
    cls=LazyGroup,
    name="headway",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Human text goes to stderr; measuring commands end stdout with one JSON document.",
)
@click.version_option(package_name="headway", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks; may stand anywhere on the line.")
@click.pass_context
def headway_group(context: click.Context, debug: bool) -> None:
    """Train, understand and use multi-token prediction language models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every failure is one line on stderr.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` where not given.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Text of a model can hold any character, a console may not know them all.
            stream.reconfigure(errors="replace")
    arguments, debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; there is no one left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except (click.ClickException, ConfigError) as error:
        if launched_rank():
            # Every process that a launcher started reads the same options: the first one tells.
            return EXIT_USAGE
        message = _usage_message(error) if isinstance(error, click.ClickException) else str(error)
        return _report(message, EXIT_USAGE, debug=debug)
    except HeadwayError as error:
        return _report(str(error), EXIT_USAGE, debug=debug)
    except Exception as error:
        hint = "" if debug else "; run again with --debug for the traceback"
        return _report(f"{type(error).__name__}: {error}{hint}", EXIT_UNEXPECTED, debug=debug)


def _run(arguments: list[str]) -> int:
    completion = os.environ.get("_HEADWAY_COMPLETE")
    if completion:
        from click.shell_completion import shell_complete

        return shell_complete(headway_group, {}, "headway", "_HEADWAY_COMPLETE", completion)
    try:
        # Not click's own main(): it turns a closed pipe and an interrupt into statuses of its own.
        with headway_group.make_context("headway", arguments) as context:
            headway_group.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, operands = arguments[:end], arguments[end:]
    return [option for option in options if option != "--debug"] + operands, "--debug" in options


def _usage_message(error: click.ClickException) -> str:
    message = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or not isinstance(error, click.NoSuchOption | click.BadParameter):
        return message
    if message.endswith("?"):  # click suggests a name itself
        return message
    return f"{message.rstrip('.')}; see '{context.command_path} --help'"


def _report(message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())
    rank = launched_rank()
    click.echo(f"error: {f'rank {rank}: ' if rank else ''}{line}", err=True)
    return status
