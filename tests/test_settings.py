"""What the environment and the config file say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamachat import settings
from llamachat.errors import UsageError

Folder = Callable[[], tuple[Path, str | None]]
FOLDERS = [("LLAMACHAT_CACHE_DIR", settings.cache_dir), ("LLAMACHAT_DATA_DIR", settings.data_dir)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No config file, no variables, nothing remembered; temporary files below `tmp_path`."""
    for name in [*os.environ]:
        if name.startswith("LLAMACHAT_") or name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(settings.tempfile, "tempdir", str(tmp_path))
    settings.config.cache_clear()
    settings._private_temporary_dir.cache_clear()
    yield
    settings.config.cache_clear()
    settings._private_temporary_dir.cache_clear()


def write_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)


@pytest.mark.parametrize(("variable", "folder"), FOLDERS)
def test_a_folder_that_is_named_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, folder: Folder
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "a" / "b"))
    assert folder() == (tmp_path / "a" / "b", None)
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("named", ["relative", "~nobody-of-this-name/x", "config.toml/x"])
@pytest.mark.parametrize(("variable", "folder"), FOLDERS)
def test_a_folder_that_cannot_be_is_replaced_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, folder: Folder, named: str
) -> None:
    write_config(tmp_path, b"")
    if named.startswith("config.toml"):
        named = str(tmp_path / named)
    monkeypatch.setenv(variable, named)
    found, notice = folder()
    assert found.parent == tmp_path
    assert notice is not None
    assert named in notice
    assert f"using {found} instead" in notice


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_the_replacement_is_private_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", "relative")
    found, _ = settings.cache_dir()
    assert found.stat().st_mode & 0o777 == 0o700
    settings._private_temporary_dir.cache_clear()
    assert settings.cache_dir()[0] == found


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("prepared", ["open to all", "a link"])
def test_a_replacement_that_another_user_may_have_prepared_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prepared: str
) -> None:
    trap, elsewhere = tmp_path / f"llamachat-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if prepared == "a link":
        trap.symlink_to(elsewhere)
    else:
        trap.mkdir()
        trap.chmod(0o777)
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", "relative")
    assert settings.cache_dir()[0] not in (trap, elsewhere)


def test_without_a_config_file_there_are_no_defaults() -> None:
    assert settings.defaults() == {}
    assert settings.default_model() == "smollm2-135m"


def test_the_config_file_has_defaults(tmp_path: Path) -> None:
    write_config(tmp_path, b'[defaults]\nmodel = "mine"\ntemperature = 0.2\n')
    assert settings.defaults() == {"model": "mine", "temperature": 0.2}
    assert settings.default_model() == "mine"


def test_the_environment_names_the_model_before_the_config_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_config(tmp_path, b'[defaults]\nmodel = "mine"\n')
    monkeypatch.setenv("LLAMACHAT_MODEL", "other")
    assert settings.default_model() == "other"


@pytest.mark.parametrize(
    "content",
    [b"[defaults", b"a = 1\na = 2", b"[a]\nb = 1\n[a.b]\nc = 1", b'a = "\xff"', b"\0"],
    ids=["syntax", "twice", "two kinds", "not UTF-8", "zero"],
)
def test_a_config_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_config(tmp_path, content)
    with pytest.raises(UsageError, match=r"config\.toml"):
        settings.config()


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write_config(tmp_path, b"\xef\xbb\xbfa = 1")
    assert settings.config() == {"a": 1}


def test_defaults_that_are_no_table_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, b"defaults = 3")
    with pytest.raises(UsageError, match="'defaults' is not a table"):
        settings.defaults()


@pytest.mark.parametrize(
    ("value", "kept"), [(None, True), ("", True), ("0", True), ("1", False), ("yes", False)]
)
def test_history_is_kept_unless_forbidden(
    monkeypatch: pytest.MonkeyPatch, value: str | None, kept: bool
) -> None:
    if value is not None:
        monkeypatch.setenv("LLAMACHAT_NOHISTORY", value)
    assert settings.keeps_history() is kept


@pytest.mark.parametrize(
    ("value", "offline"), [("", False), ("0", False), ("1", True), ("true", True), ("on", True)]
)
def test_the_hub_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, value: str, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert settings.is_offline() is offline


def test_the_hub_cache_is_where_other_tools_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.hub_cache_dir() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert settings.hub_cache_dir() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert settings.hub_cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize(
    ("value", "threads"), [("", None), ("3", 3), ("0", None), ("-1", None), ("2,1", None)]
)
def test_threads_are_a_positive_number_or_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert settings.omp_threads() == threads


@pytest.mark.parametrize(
    ("choice", "found"), [("always", (None, "1")), ("never", ("1", None)), ("auto", ("x", "y"))]
)
def test_colours_are_chosen_for_every_library(
    monkeypatch: pytest.MonkeyPatch, choice: str, found: tuple[str | None, str | None]
) -> None:
    monkeypatch.setenv("NO_COLOR", "x")
    monkeypatch.setenv("FORCE_COLOR", "y")
    settings.choose_color(choice)
    assert (os.environ.get("NO_COLOR"), os.environ.get("FORCE_COLOR")) == found


def test_a_choice_of_colours_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, always, never"):
        settings.choose_color("red")


def test_what_the_program_looks_like_is_in_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, b"[ui]\nmarkdown = false\ntoolbar = 3\n")
    assert settings.ui() == settings.Ui(markdown=False)
