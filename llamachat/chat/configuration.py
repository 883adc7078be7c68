"""The config file: what may stand in it, and what it says about one model. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from llamachat import settings
from llamachat.chat.context import Overflow
from llamachat.chat.options import Options, Said, parse_bias, parse_samplers
from llamachat.chat.sources import BEAMS_ALONE
from llamachat.chat.specs import FORMS
from llamachat.errors import TransferError, UsageError
from llamachat.files import write_atomically
from llamachat.settings import COLOR_CHOICES, Ui

TABLES = ("defaults", "models", "aliases", "ui")
EXPECTED = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes",
}  # fmt: skip
CHOICES: Mapping[str, Sequence[str]] = {
    "quantize": ("auto", *FORMS),
    "dtype": ("auto", "float32", "bfloat16"),
    "kv_cache": ("auto", "f32", "bf16", "int8"),
    "backend": ("auto", "native", "cuda", "reference", "bitsandbytes"),
    "color": COLOR_CHOICES,
    "overflow": get_args(Overflow),
}


@dataclass(frozen=True, slots=True)
class Flag:
    """What a flag takes.

    Attributes:
        kind: of its value, or of each of them.
        several: whether it takes a list.
        least: that a number may be.
        most: that a number may be.
    """

    kind: type[bool] | type[int] | type[float] | type[str]
    several: bool = False
    least: float | None = None
    most: float | None = None


LOOKS: Mapping[str, Flag] = {name: Flag(type(it)) for name, it in asdict(Ui()).items()}


class WrongSettingError(Exception):
    """A key or a value that the config file may not have.

    Attributes:
        path: where it stands: tables and key, the outermost first.
    """

    def __init__(self, path: Sequence[str], problem: str, hint: str | None = None) -> None:
        super().__init__(problem)
        self.path, self.problem, self.hint = tuple(path), problem, hint


def read(flags: Mapping[str, Flag]) -> Mapping[str, Any]:
    """The config file, checked.

    Raises:
        UsageError: it names the file, the line, and the nearest key.
    """
    try:
        check(settings.config(), flags)
    except WrongSettingError as wrong:
        raise located(wrong, settings.config_text()) from None
    return settings.config()


def located(wrong: WrongSettingError, text: str) -> UsageError:
    """What is wrong in the config file whose text this is, with its line."""
    number = settings.config_line(text, wrong.path)
    place = f"{settings.config_path()}" + (f", line {number}" if number else "")
    return UsageError(f"{place}: {wrong.problem}", hint=wrong.hint)


def check(config: Mapping[str, Any], flags: Mapping[str, Flag]) -> None:
    """Refuse what has no meaning.

    Args:
        config: the tables of a config file.
        flags: those of `chat`, by their names.

    Raises:
        WrongSettingError: the first key or value that is wrong.
    """
    for name, table in config.items():
        if name not in TABLES:
            _unknown((name,), TABLES, "table")
        if not isinstance(table, Mapping):
            raise WrongSettingError((name,), f"'{name}' is not a table", f"write [{name}]")
    _check_flags(("defaults",), config.get("defaults", {}), flags)
    for model, table in config.get("models", {}).items():
        if not isinstance(table, Mapping):
            raise WrongSettingError(
                ("models", model), f"'{model}' is not a table", f"write [models.{model}]"
            )
        _check_flags(("models", model), table, flags)
    for name, value in config.get("ui", {}).items():
        _check_value(("ui", name), value, LOOKS)
    for name, value in config.get("aliases", {}).items():
        _check_value(("aliases", name), value, {name: Flag(str)})


def write(key: str, value: str, flags: Mapping[str, Flag]) -> Path:
    """Write one setting into the config file, which is made if there is none; returns its path.

    Args:
        key: "temperature", "defaults.temperature", "models.ALIAS.temperature"...
        value: as text; a list as TOML has it, or one value.
        flags: those of `chat`, by their names.

    Raises:
        UsageError: there can be no such setting, or the file is wrong already.
        TransferError: the file cannot be written.
    """
    import tomlkit

    file, text = settings.config_path(), settings.config_text()
    before = settings.parse_config(text)
    path = _path_of(key)
    document = tomlkit.parse(text)
    table: Any = document
    try:
        for depth, name in enumerate(path[:-1], 1):
            table = table.setdefault(name, tomlkit.table(is_super_table=name == "models"))
            if not isinstance(table, Mapping):
                raise WrongSettingError(path[:depth], f"'{name}' is not a table")
        written = (it for it in table if path[0] != "aliases" and key_of(it) == path[-1])
        table[next(written, path[-1])] = _parsed(path, value, flags)
        check(document.unwrap(), flags)
    except WrongSettingError as wrong:
        if wrong.path not in (path, path[:-1]) and wrong.path[0] in before:
            raise located(wrong, text) from None
        raise UsageError(f"{key}: {wrong.problem}", hint=wrong.hint) from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, tomlkit.dumps(document).encode())
    except OSError as error:
        raise TransferError(f"{file}: {error.strerror or error}") from error
    return file


def _path_of(key: str) -> tuple[str, ...]:
    """Tables and key. Names of models and aliases may have dots, flags have none."""
    table, _, rest = key.partition(".")
    if not rest:
        return "defaults", key_of(key)
    if table != "models":
        return table, key_of(rest) if table == "defaults" else rest
    name, _, flag = rest.rpartition(".")
    if not name:
        raise UsageError(f"{key}: found no setting", hint="write models.ALIAS.temperature")
    return table, name, key_of(flag)


def _parsed(path: tuple[str, ...], value: str, flags: Mapping[str, Flag]) -> Any:
    """A value that was typed, as TOML would hold it; text is taken as it is."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    known = {"defaults": flags, "models": flags, "ui": LOOKS}.get(path[0], {})
    flag = known.get(path[-1], Flag(str))
    if flag.several and not value.startswith("["):
        return [value]
    if flag.kind is str and not flag.several:
        return value
    try:
        return tomlkit.value(value)
    except (TOMLKitError, ValueError):
        return value


def defaults_for(config: Mapping[str, Any], model: str) -> dict[str, tuple[Any, str]]:
    """What a checked config file says of each flag, and where: of one model before of all.

    Args:
        config: the tables of a config file.
        model: as it was asked for. Other names of it, own or of the catalog, have its settings,
            too; the one that was asked for comes first.
    """
    said = {key_of(it): (value, "config.toml") for it, value in _table(config, "defaults").items()}
    if "color" in (look := _table(config, "ui")):
        said.setdefault("color", (look["color"], "config.toml"))
    for name in _names_of(model, config) if "models" in config else ():
        of_model = _table(_table(config, "models"), str(name))
        origin = f"config.toml [models.{name}]"
        said |= {key_of(key): (value, origin) for key, value in of_model.items()}
    return said


def _names_of(model: str, config: Mapping[str, Any]) -> list[str]:
    """Every name of a model, the one that was asked for last."""
    from llamachat.library.catalog import find, of_repo

    meant = str(_table(config, "aliases").get(model, model))
    entry = find(meant) or of_repo(meant)
    known = [entry.alias, *entry.also, entry.repo] if entry else []
    return list(dict.fromkeys([model, meant, *known]))[::-1]


def key_of(written: str) -> str:
    """A flag's name, written with dashes or underscores."""
    return written.replace("-", "_")


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table: Mapping[str, Any] = config.get(name, {})
    return table


def _check_flags(
    path: tuple[str, ...], table: Mapping[str, Any], flags: Mapping[str, Flag]
) -> None:
    for name, value in table.items():
        _check_value((*path, name), value, flags)
    words = {
        key: value
        for it, value in table.items()
        if (key := key_of(it)) in {field.name for field in fields(Said)}
        if key not in (*BEAMS_ALONE, "samplers", "logit_bias")
    }
    try:
        Options(Said(**words)).decoding()
    except UsageError as error:
        raise WrongSettingError(path, error.message, error.hint) from None


def _check_value(path: tuple[str, ...], value: Any, flags: Mapping[str, Flag]) -> None:
    key = path[-1]
    flag = flags.get(key if key in flags else key_of(key))
    if flag is None:
        _unknown(path, flags, "setting")
    if flag.several and not isinstance(value, list):
        raise WrongSettingError(path, f"{key} is {value!r}, expected a list: [...]")
    for one in value if flag.several else [value]:
        if not _is(one, flag.kind):
            raise WrongSettingError(path, f"{key} is {one!r}, expected {EXPECTED[flag.kind]}")
        if flag.least is not None and one < flag.least:
            raise WrongSettingError(path, f"{key} is {one}, expected {flag.least:g} or more")
        if flag.most is not None and one > flag.most:
            raise WrongSettingError(path, f"{key} is {one}, expected {flag.most:g} or less")
    _check_meaning(path, key_of(key), value)


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _check_meaning(path: tuple[str, ...], name: str, value: Any) -> None:
    """Refuse a value of the right kind that its flag would not take."""
    if path[0] == "aliases":
        return
    choices = CHOICES.get(name)
    if choices is not None and value not in choices:
        raise WrongSettingError(path, f"{name} is {value!r}, expected one of {', '.join(choices)}")
    try:
        if name == "template":
            from llamachat.chat.builtin import check_name

            check_name(value)
        elif name == "samplers":
            parse_samplers(value)
        elif name == "logit_bias":
            parse_bias(value)
        elif name in BEAMS_ALONE:
            Options(Said(strategy="beam", **{name: value})).beams()
            Options(Said(strategy="beam", **{name: value})).decoding()
        elif name in {field.name for field in fields(Said)}:
            Options(Said(**{name: value})).decoding()
    except UsageError as error:
        raise WrongSettingError(path, error.message, error.hint) from None


def _unknown(path: Sequence[str], known: Iterable[str], what: str) -> NoReturn:
    near = difflib.get_close_matches(key_of(path[-1]), list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
    raise WrongSettingError(path, f"'{path[-1]}' is no {what}", hint)
