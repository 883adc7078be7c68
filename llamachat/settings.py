"""What the user's machine says: folders, environment, config file. The only reader of either."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamachat.errors import UsageError

DEFAULT_MODEL = "smollm2-135m"


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
    """Where `config.toml` is looked for."""
    if named := os.environ.get("LLAMACHAT_CONFIG"):
        return Path(named)
    import platformdirs

    return platformdirs.user_config_path("llamachat", appauthor=False) / "config.toml"


@lru_cache(maxsize=1)
def config() -> Mapping[str, Any]:
    """The config file, or an empty mapping where there is none.

    Raises:
        UsageError: it is not TOML.
    """
    try:
        path = config_path()
        content = path.read_bytes()
    except (OSError, RuntimeError):  # absent, unreadable, or no home folder at all
        return {}
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(content.decode("utf-8-sig")).unwrap()
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", hint="mend or remove the file") from error


def defaults() -> Mapping[str, Any]:
    """The `[defaults]` table of the config file."""
    table = config().get("defaults", {})
    if not isinstance(table, Mapping):
        raise UsageError(f"{config_path()}: 'defaults' is not a table")
    return table


def aliases() -> Mapping[str, str]:
    """The `[aliases]` table of the config file: own short names, and what each stands for."""
    table = config().get("aliases", {})
    if not isinstance(table, Mapping) or not all(isinstance(it, str) for it in table.values()):
        raise UsageError(f"{config_path()}: 'aliases' is not a table of names")
    return table


def default_model() -> str:
    """The model without `-m`: `$LLAMACHAT_MODEL`, then the config file, then the embedded one."""
    return os.environ.get("LLAMACHAT_MODEL") or str(defaults().get("model", DEFAULT_MODEL))


def keeps_history() -> bool:
    """Whether typed lines may be kept in a file (`LLAMACHAT_NOHISTORY=1`: no)."""
    return os.environ.get("LLAMACHAT_NOHISTORY", "") in ("", "0")


def terminal_is_dumb() -> bool:
    """Whether `TERM` says that the terminal knows no escapes."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def forbids_colors() -> bool:
    """Whether `NO_COLOR` is set (https://no-color.org): bold and underlined text stays."""
    return bool(os.environ.get("NO_COLOR"))


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
