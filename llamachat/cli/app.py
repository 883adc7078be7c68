"""The command line: which commands there are, and how each of them ends."""

from __future__ import annotations

import functools
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from llamachat.cli import (
    bench,
    chat,
    compare,
    config,
    doctor,
    eval,
    fit,
    merge,
    models,
    quantize,
    serve,
    sessions,
    tokenize,
    unconverted,
)
from llamachat.cli.configured import origin_of
from llamachat.cli.manual import epilog
from llamachat.errors import LlamachatError, TransferError, UsageError
from llamachat.terminal import output
from llamachat.terminal.failure import show_failure, understood

ALIASES = {"run": "chat", "download": "pull", "remove": "rm"}  # what other programs call them


_GRACE_S = 3  # that an end by a signal may take
_ENDINGS = [signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
    _ENDINGS.append(signal.SIGHUP)  # the terminal has gone


class Commands(unconverted.Group):
    """Understands other programs' names of a command; they share its variables and help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is asked for."""
        return super().resolve_command(ctx, [ALIASES.get(args[0], args[0]), *args[1:]])


app = typer.Typer(
    cls=Commands,
    epilog=epilog(),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "LLAMACHAT",
        "max_content_width": 100,
    },
)


def run() -> int:
    """Run the command line; returns its exit code, however it ends."""
    output.prepare()
    try:
        _stand_somewhere()
        exit_code: int | None = app(prog_name="llamachat", standalone_mode=False)
        sys.stdout.flush()
    except OSError as error:  # help or version: what a command raises does not come here
        return _failed(output.lost(error))
    except SystemExit:  # what Typer makes of a closed pipe
        return 0
    except Exception as error:  # noqa: BLE001  # nothing may escape
        return _failed(_misused(error))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late to change how it ended
    return exit_code or 0


def guarded(command: Callable[..., None]) -> Callable[..., int]:
    """The command, with every ending turned into its exit code and at most two lines."""

    @functools.wraps(command)
    def ended(*args: Any, **kwargs: Any) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in _ENDINGS:
            signal.signal(number, _end)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            return 130
        except SystemExit as terminated:
            return int(terminated.code or 0)
        except Exception as error:  # noqa: BLE001  # nothing may escape
            return _failed(error, verbose=bool(kwargs.get("verbose")))
        return 0

    return ended


def _end(number: int, _frame: FrameType | None) -> None:
    """End the program; what is still shown on a terminal that has gone goes nowhere.

    An event loop may lose what is raised here, between taking a callback and calling it, and wait
    for that one for ever: hence the alarm.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
        signal.alarm(_GRACE_S)
    if number != signal.SIGTERM:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    sys.exit(128 + number)


def _stand_somewhere() -> None:
    """Refuse to run in a folder that is gone: libraries die of it, in words of their own."""
    try:
        Path.cwd()
    except OSError as error:
        raise TransferError("the working folder is gone", hint="cd to another one") from error


def _failed(error: Exception, *, verbose: bool = False) -> int:
    if isinstance(error, BrokenPipeError):  # nobody reads on, as with `| head`
        return 0
    show_failure(error, verbose=verbose)
    error = understood(error)
    return error.exit_code if isinstance(error, LlamachatError) else 1


def _misused(error: Exception) -> Exception:
    """An error of the command line in our words; Typer does not export its classes."""
    if not hasattr(error, "format_message"):
        return error
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "llamachat"
    message, parameter = error.format_message().rstrip("."), getattr(error, "param", None)
    origin = origin_of(context, parameter.name) if context and parameter else None
    if origin not in (None, "flag"):
        message = f"{origin}: {message}"
    return UsageError(message, hint=f"{program} --help")


def _show_version(value: bool) -> None:
    if value:
        from llamachat import __version__

        typer.echo(f"llamachat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_show_version,
            is_eager=True,
            help="Show it and leave.",
            show_envvar=False,
        ),
    ] = False,
) -> None:
    """Talk to a Llama model on your own machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("chat", chat.chat),
    ("compare", compare.compare),
    ("serve", serve.serve),
    ("pull", models.pull),
    ("fit", fit.fit),
    ("list", models.list_models),
    ("show", models.show),
    ("where", models.where),
    ("rm", models.remove),
    ("tokenize", tokenize.tokenize),
    ("quantize", quantize.quantize),
    ("merge", merge.merge),
    ("eval", eval.evaluate),
    ("bench", bench.bench),
    ("doctor", doctor.doctor),
    ("replay", sessions.replay),
)
SETTINGS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("path", config.path),
    ("show", config.show),
    ("set", config.set_),
)
settings_app = typer.Typer(
    no_args_is_help=True,
    help="Settings: where they are, what they are, and how to change them.",
)
app.add_typer(settings_app, name="config", epilog=epilog("config"))
on_sessions = typer.Typer(help="Conversations that are saved.")
on_sessions.callback(invoke_without_command=True)(sessions.top)
app.add_typer(on_sessions, name="sessions", epilog=epilog("sessions"))

for group, prefix, commands in (
    (app, "", COMMANDS),
    (settings_app, "config ", SETTINGS),
    (on_sessions, "sessions ", tuple(sessions.COMMANDS.items())),
):
    for name, command in commands:
        ending = epilog(prefix + name)
        group.command(name, cls=unconverted.Command, epilog=ending)(guarded(command))
