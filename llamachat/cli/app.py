"""The command line: which commands there are, and how each of them ends."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llamachat.cli import bench, chat, compare, doctor, eval, fit, merge, models, quantize, tokenize
from llamachat.errors import LlamachatError, UsageError
from llamachat.terminal import output
from llamachat.terminal.failure import show_failure

EPILOG = (
    "LLAMACHAT_<COMMAND>_<OPTION> sets any option. Exit codes: 0 ok, 1 unexpected, 2 usage or "
    "empty prompt, 3 model unknown or not on disk, 4 no access, 5 will not fit, 6 prompt longer "
    "than the context, 7 network or disk, 8 a check failed, 9 damaged or unsupported file, "
    "130 interrupted."
)

ALIASES = {"run": "chat", "download": "pull", "remove": "rm"}  # what other programs call them


class Commands(TyperGroup):
    """Understands other programs' names of a command; they share its variables and help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is asked for."""
        return super().resolve_command(ctx, [ALIASES.get(args[0], args[0]), *args[1:]])


app = typer.Typer(
    cls=Commands,
    epilog=EPILOG,
    rich_markup_mode=None,
    add_completion=False,
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
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
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


def _failed(error: Exception, *, verbose: bool = False) -> int:
    if isinstance(error, BrokenPipeError):  # nobody reads on, as with `| head`
        return 0
    show_failure(error, verbose=verbose)
    return error.exit_code if isinstance(error, LlamachatError) else 1


def _misused(error: Exception) -> Exception:
    """An error of the command line in our words; Typer does not export its classes."""
    if not hasattr(error, "format_message"):
        return error
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "llamachat"
    return UsageError(error.format_message().rstrip("."), hint=f"{program} --help")


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


for name, command in (
    ("chat", chat.chat),
    ("compare", compare.compare),
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
):
    app.command(name)(guarded(command))
