"""The command line: which commands there are, and how each of them ends."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llamachat.cli import chat, doctor, models, tokenize
from llamachat.errors import LlamachatError

EPILOG = (
    "LLAMACHAT_<COMMAND>_<OPTION> sets any option. Exit codes: 0 ok, 1 unexpected, 2 usage or "
    "empty prompt, 3 model unknown or not on disk, 4 no access, 5 will not fit, 6 prompt longer "
    "than the context, 7 network or disk, 8 a check failed, 9 damaged or unsupported file, "
    "130 interrupted."
)

app = typer.Typer(
    help="Talk to a Llama model on your own machine.",
    epilog=EPILOG,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "LLAMACHAT",
        "max_content_width": 100,
    },
)


def show_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from llamachat import __version__

        typer.echo(f"llamachat {__version__}")
        raise typer.Exit


@app.callback()
def top(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=show_version,
            is_eager=True,
            help="Show it and leave.",
            show_envvar=False,
        ),
    ] = False,
) -> None:
    """Talk to a Llama model on your own machine."""


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with every ending turned into its exit code and at most two lines."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_stdout()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except LlamachatError as error:
            _end(error, error.exit_code, verbose=verbose)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  # the one place where nothing may escape
            _end(error, 1, verbose=verbose)

    return run


def _end(error: Exception, exit_code: int, *, verbose: bool) -> None:
    from llamachat.terminal.failure import show_failure

    show_failure(error, verbose=verbose)
    raise typer.Exit(exit_code)


def _discard_stdout() -> None:
    """Nobody reads on: whatever is still buffered goes nowhere, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


for name, command, hidden in (
    ("chat", chat.chat, False),
    ("run", chat.chat, True),
    ("pull", models.pull, False),
    ("download", models.pull, True),
    ("list", models.list_models, False),
    ("show", models.show, False),
    ("where", models.where, False),
    ("rm", models.remove, False),
    ("remove", models.remove, True),
    ("tokenize", tokenize.tokenize, False),
    ("doctor", doctor.doctor, False),
):
    app.command(name, hidden=hidden)(guarded(command))
