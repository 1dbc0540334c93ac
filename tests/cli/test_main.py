"""The command line as a whole: help costs nothing, mistakes are one line, statuses mean something."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from headway.cli import main as cli
from headway.cli.main import COMMANDS, headway_group, main
from headway.errors import ConfigError

HEADWAY = str(Path(sys.executable).parent / "headway")


@pytest.fixture
def failing_command(monkeypatch: pytest.MonkeyPatch):
    """Replace `headway info` by a command that raises what the test wants."""

    def install(error: BaseException) -> None:
        @click.command("info")
        @click.argument("words", nargs=-1)
        def info(words: tuple[str, ...]) -> None:
            raise error

        monkeypatch.setattr("headway.cli.info.info_command", info)

    importlib.import_module("headway.cli.info")
    return install


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda arguments: " ".join(arguments))
def test_help_is_shown_without_importing_torch(arguments: list[str]):
    script = (
        "import sys\n"
        "from headway.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'matplotlib', 'rich'} & sys.modules.keys()\n"
        "sys.exit(status or (f'imported {sorted(heavy)}' if heavy else 0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: headway")
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_table_is_the_first_line_of_the_commands_own_help(name: str):
    command = headway_group.get_command(click.Context(headway_group), name)
    assert command is not None
    assert command.name == name
    assert (command.help or "").strip().splitlines()[0] == COMMANDS[name].help


def test_the_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("headway 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: no such command 'trian'; did you mean 'train'?"),
        (["ggenerate", "x"], "error: no such command 'ggenerate'; did you mean 'generate'?"),
        (["frobnicate"], "error: no such command 'frobnicate'; the commands are train, "),
        (["--verbsoe"], "error: No such option '--verbsoe'. Did you mean '--version'?"),
        (["info", "--batch-sise", "3"], "'--batch-size'"),
        (["info", "--zzz"], "No such option '--zzz'; see 'headway info --help'"),
        (["info", "--batch-size", "many"], "'many' is not a valid integer range; see 'headway info --help'"),
    ],
)
def test_a_usage_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")
    assert message in printed.err


def test_an_error_of_headway_is_one_line_and_status_2(failing_command, capsys: pytest.CaptureFixture[str]):
    failing_command(ConfigError("first line\n  second line;\nlower it"))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "error: first line second line; lower it\n"


def test_an_unexpected_error_names_its_type_and_the_way_to_its_traceback(
    failing_command, capsys: pytest.CaptureFixture[str]
):
    failing_command(ZeroDivisionError("by zero"))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == ("error: ZeroDivisionError: by zero; run again with --debug for the traceback\n")


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
@pytest.mark.parametrize(("error", "status"), [(ConfigError("no"), 2), (ZeroDivisionError("no"), 1)])
def test_debug_shows_the_traceback_wherever_it_stands(
    arguments: list[str], error: Exception, status: int, failing_command, capsys: pytest.CaptureFixture[str]
):
    failing_command(error)
    assert main(arguments) == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "error: " in shown.splitlines()[-1]


def test_what_follows_a_double_dash_is_text_even_if_it_says_debug():
    assert cli._without_debug(["generate", "--debug", "--", "--debug"]) == (["generate", "--", "--debug"], True)
    assert cli._without_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


def test_an_interrupt_is_quiet_and_status_130(failing_command, capsys: pytest.CaptureFixture[str]):
    failing_command(KeyboardInterrupt())
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([HEADWAY, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_the_installed_command_passes_its_status_on():
    done = subprocess.run([HEADWAY, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_shells_can_complete_command_names():
    environment = os.environ | {
        "_HEADWAY_COMPLETE": "bash_complete",
        "COMP_WORDS": "headway de",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([HEADWAY], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "plain,demo\n"
