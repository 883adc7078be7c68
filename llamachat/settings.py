"""What the user's machine says: folders, environment, config file. The only reader of either."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamachat.errors import UsageError

DEFAULT_MODEL = "smollm2-135m"
COLOR_CHOICES = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class Ui:
    """How the program looks: the `[ui]` table of the config file.

    Attributes:
        markdown: replies on a terminal are rendered.
        color: one of `COLOR_CHOICES`.
        toolbar: a line below the input tells the state of the conversation.
    """

    markdown: bool = True
    color: str = "auto"
    toolbar: bool = True


def cache_dir() -> tuple[Path, str | None]:
    """The folder for files that can be fetched again, and a notice if it is not the usual one.

    A folder that cannot be made or written (no HOME, read-only disk) is replaced by a private
    temporary one, so that the program still answers.
    """
    return _usable_dir("LLAMACHAT_CACHE_DIR", "user_cache_path")


def data_dir() -> tuple[Path, str | None]:
    """The folder for history and sessions, and a notice if it is not the usual one."""
    return _usable_dir("LLAMACHAT_DATA_DIR", "user_data_path")


def config_path() -> Path:
    """Where `config.toml` is looked for.

    Raises:
        UsageError: this user has no home folder, and nothing else says where.
    """
    if named := os.environ.get("LLAMACHAT_CONFIG"):
        return Path(named)
    import platformdirs

    try:
        return platformdirs.user_config_path("llamachat", appauthor=False) / "config.toml"
    except RuntimeError as error:
        hint = "set HOME or LLAMACHAT_CONFIG"
        raise UsageError("there is no home folder for config.toml", hint=hint) from error


@lru_cache(maxsize=1)
def config() -> Mapping[str, Any]:
    """The config file, or an empty mapping where there is none.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    return parse_config(config_text())


def config_text() -> str:
    """The config file as it is written; empty where there is none.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        path = config_path()
    except UsageError:  # no home folder at all
        return ""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: {error}", hint="mend or remove the file") from error


def parse_config(text: str) -> Mapping[str, Any]:
    """What the text of a config file says.

    Raises:
        UsageError: it is not TOML.
    """
    if not text:
        return {}
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise UsageError(f"{config_path()}: {error}", hint="mend or remove the file") from error


def config_line(text: str, path: Sequence[str]) -> int | None:
    """The line of a config file that names a key; else that of its table."""
    lines = text.splitlines()
    for wanted in (tuple(path), tuple(path[:-1])):
        table: tuple[str, ...] = ()
        for number, line in enumerate(lines, 1):
            if line.lstrip().startswith("["):
                table = named = _keys(line)
            else:
                named = table + _keys(f"{line.partition('=')[0]} = 0")
            if wanted and named == wanted:
                return number
    return None


def _keys(line: str) -> tuple[str, ...]:
    """The keys that one line of TOML names, the outermost first."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    keys = []
    try:
        inner: Any = tomlkit.parse(line).unwrap()
    except TOMLKitError:
        return ()
    while isinstance(inner, Mapping) and inner:
        key, inner = next(iter(inner.items()))
        keys.append(key)
    return tuple(keys)


def defaults() -> Mapping[str, Any]:
    """The `[defaults]` table of the config file."""
    return _table("defaults")


def ui() -> Ui:
    """The `[ui]` table of the config file; what is of another kind is as if it were not there."""
    table = _table("ui")
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Ui)}
    known: dict[str, Any] = {k: it for k, it in table.items() if type(it) is kinds.get(k)}
    return Ui(**known)


def _table(name: str) -> Mapping[str, Any]:
    table = config().get(name, {})
    if not isinstance(table, Mapping):
        raise UsageError(f"{config_path()}: '{name}' is not a table")
    return table


def aliases() -> Mapping[str, str]:
    """The `[aliases]` table of the config file: own short names, and what each stands for."""
    table = _table("aliases")
    if not all(isinstance(it, str) for it in table.values()):
        raise UsageError(f"{config_path()}: 'aliases' is not a table of names")
    return table


def default_model() -> str:
    """The model without `-m`: `$LLAMACHAT_MODEL`, then the config file, then the embedded one."""
    return default_model_and_origin()[0]


def default_model_and_origin() -> tuple[str, str]:
    """The model without `-m`, and who names it."""
    if named := os.environ.get("LLAMACHAT_MODEL"):
        return named, "LLAMACHAT_MODEL"
    if named := defaults().get("model"):
        return str(named), "config.toml"
    return DEFAULT_MODEL, "built in"


def editor() -> str | None:
    """The command of the editor that the user wants."""
    return os.environ.get("VISUAL") or os.environ.get("EDITOR") or None


def keeps_history() -> bool:
    """Whether typed lines may be kept in a file (`LLAMACHAT_NOHISTORY=1`: no)."""
    return os.environ.get("LLAMACHAT_NOHISTORY", "") in ("", "0")


def terminal_is_dumb() -> bool:
    """Whether `TERM` says that the terminal knows no escapes."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def terminal_opens_links() -> bool:
    """Whether the terminal is one of those that open addresses behind a text (OSC 8)."""
    if in_tmux():  # which passes them on only if it is told so
        return False
    return (
        os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm", "vscode", "ghostty")
        or any(map(os.environ.get, ("WT_SESSION", "KITTY_WINDOW_ID", "VTE_VERSION", "DOMTERM")))
        or os.environ.get("TERM", "").startswith(("xterm-kitty", "alacritty", "foot"))
    )


def in_tmux() -> bool:
    """Whether the terminal is one of tmux."""
    return bool(os.environ.get("TMUX"))


def terminal_without_clipboard() -> str | None:
    """The name of a terminal that is known to ignore OSC 52, if this is one."""
    if terminal_is_dumb() or os.environ.get("TERM") == "linux":
        return f"TERM={os.environ['TERM']}"
    if os.environ.get("TERM_PROGRAM") == "Apple_Terminal":
        return "Apple's Terminal"
    return "screen" if os.environ.get("STY") else None


def forbids_colors() -> bool:
    """Whether `NO_COLOR` is set (https://no-color.org): bold and underlined text stays."""
    return bool(os.environ.get("NO_COLOR"))


def choose_color(choice: str) -> None:
    """Let every library, and every program that is started, use colours or not.

    Raises:
        UsageError: `choice` is none of `COLOR_CHOICES`.
    """
    if choice not in COLOR_CHOICES:
        raise UsageError(f"color is {choice!r}, expected one of {', '.join(COLOR_CHOICES)}")
    if choice != "auto":
        wanted, other = ("NO_COLOR", "FORCE_COLOR")[:: 1 if choice == "never" else -1]
        os.environ.pop(other, None)
        os.environ[wanted] = "1"


def quieten_libraries() -> None:
    """Let native code of libraries tell errors alone; it writes to stderr by itself."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def endpoint() -> str | None:
    """The server that answers without `--endpoint`: `$LLAMACHAT_ENDPOINT`, then the config file."""
    return os.environ.get("LLAMACHAT_ENDPOINT") or defaults().get("endpoint") or None


def api_key() -> str | None:
    """`OPENAI_API_KEY`: what lets this user in at a server."""
    return os.environ.get("OPENAI_API_KEY", "").strip() or None


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_cache_dir() -> Path:
    """The Hugging Face cache, shared with other tools (`HF_HUB_CACHE`, `HF_HOME`)."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or f"{xdg}/huggingface"
    try:
        return Path(home).expanduser() / "hub"
    except RuntimeError:  # no home folder
        return cache_dir()[0] / "hub"


def native_instruction_set() -> str | None:
    """The one that native kernels shall use (`LLAMACHAT_NATIVE_ISA`), instead of the best."""
    return os.environ.get("LLAMACHAT_NATIVE_ISA") or None


def native_library() -> str | None:
    """`LLAMACHAT_NATIVE_LIBRARY`: the library of kernels to load, or "none" to do without any."""
    return os.environ.get("LLAMACHAT_NATIVE_LIBRARY") or None


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, for a program that is started."""
    return {**os.environ, **changes}


def disable_multicast() -> None:
    """Keep torch from setting NVLink's up for symmetric memory, which needs none here."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun says of a process: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`."""

    rank: int
    size: int
    local_rank: int


def launch() -> Launch | None:
    """The place of this process among several that torchrun started, or None.

    Raises:
        UsageError: it is none.
    """
    values = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if None in values or values[1] == "1":
        return None
    try:
        rank, size, local_rank = (int(value or "") for value in values)
    except ValueError:
        raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK are not numbers") from None
    if not 0 <= local_rank <= rank < size:
        raise UsageError(f"RANK is {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {size}")
    return Launch(rank, size, local_rank)


def omp_threads() -> int | None:
    """`OMP_NUM_THREADS`, if it is a positive number."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _usable_dir(variable: str, kind: str) -> tuple[Path, str | None]:
    import platformdirs

    folder: Path | None = None
    try:
        if named := os.environ.get(variable):
            folder = Path(named)
            folder = folder.expanduser()
        else:
            folder = Path(getattr(platformdirs, kind)("llamachat", appauthor=False))
        if not folder.is_absolute():
            raise OSError(f"{folder} is not absolute")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, None
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        private = _private_temporary_dir()
        return private, f"{folder or 'the home folder'}: {reason}; using {private} instead"


@lru_cache(maxsize=1)
def _private_temporary_dir() -> Path:
    """One folder a user, kept between runs, that no other user can have prepared."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"llamachat-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        ours = not hasattr(os, "getuid") or (
            found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700
        )
        if stat.S_ISDIR(found.st_mode) and ours:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="llamachat-"))
