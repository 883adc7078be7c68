"""What may stand in the config file, what a mistake is told as, and how a setting is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llamachat import settings
from llamachat.chat.configuration import Flag, defaults_for, read, write
from llamachat.cli.configured import flags_of_chat
from llamachat.errors import LlamachatError, UsageError

FLAGS = flags_of_chat()


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the config file is; nothing of another one is remembered."""
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "folder" / "config.toml"))
    (tmp_path / "folder").mkdir()
    settings.config.cache_clear()
    yield tmp_path / "folder" / "config.toml"
    settings.config.cache_clear()


def test_what_a_flag_takes_is_known_from_the_command() -> None:
    assert FLAGS["temperature"] == Flag(float)
    assert FLAGS["logprobs"] == Flag(int, least=0, most=20)
    assert FLAGS["stop"] == Flag(str, several=True)
    assert FLAGS["json"] == FLAGS["stream"] == Flag(bool)
    assert FLAGS["system_file"] == FLAGS["model"] == Flag(str)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("[defaults]\n# why\ntemprature = 1", 3, "did you mean temperature?"),
        ("[default]\ntop_k = 1", 1, "did you mean defaults?"),
        ("[ui]\n\ncolour = 'never'", 3, "did you mean color?"),
        ("[models.'a.b']\ntop-k = 1\ntopk = 1", 3, "did you mean top_k?"),
        ("[defaults]\ntemperature = 'hot'", 2, "expected a number"),
        ("[defaults]\ntemperature = true", 2, "expected a number"),
        ("[defaults]\nctx_size = 1.5", 2, "expected a whole number"),
        ("[defaults]\nctx_size = 0", 2, "expected 1 or more"),
        ("[defaults]\nlogprobs = 21", 2, "expected 20 or less"),
        ("[defaults]\ntop_p = 1.5", 2, "above 0, at most 1"),
        ("[defaults]\nstop = 'a'", 2, "expected a list"),
        ("[defaults]\nstop = [\n  1,\n]", 2, "expected text"),
        ("[defaults]\nquiet = 'yes'", 2, "expected true or false"),
        ("[defaults]\nquantize = 'int5'", 2, "auto, none, int8"),
        ("[defaults]\nstrategy = 'beem'", 2, "greedy, random"),
        ("[defaults]\nearly_stopping = 'soon'", 2, "true, false or never"),
        ("[defaults]\nsamplers = 'top_j'", 2, "top_j"),
        ("[defaults]\ntemplate = 'lama2'", 2, "did you mean llama2?"),
        ("defaults.top_p = 2", 1, "at most 1"),
        ("ui = {toolbar = 'no'}", 1, "expected true or false"),
        ("\n[ui]\ncolor = 'red'", 3, "auto, always, never"),
        ("[aliases]\nmine = 3", 2, "expected text"),
        ("models = 3", 1, "not a table"),
        ("[models]\nmine = 3", 2, "not a table"),
        ("# x\n[defaults]\nstrategy = 'greedy'\ntop_p = 0.5", 2, "contradict each other"),
    ],
)
def test_a_mistake_is_told_with_its_file_and_line(
    file: Path, text: str, line: int, named: str
) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(FLAGS)
    assert caught.value.message.startswith(f"{file}, line {line}: ")
    assert named in f"{caught.value.message} {caught.value.hint}"


def test_what_flags_take_is_no_mistake(file: Path) -> None:
    file.write_text(
        "[defaults]\nmax-new-tokens = 5\ntemperature = 1\nstop = ['a']\nlength_penalty = 2\n"
        "samplers = 'top_k;temperature'\nlogit_bias = ['3=-1']\nbad_word = ['x']\n"
        "[models.mine]\nstrategy = 'beam:2'\n[aliases]\nmine = 'org/name'\n[ui]\nmarkdown = true\n"
    )
    read(FLAGS)


def test_one_models_settings_come_before_those_of_all(file: Path) -> None:
    file.write_text(
        "[defaults]\ntop_k = 1\ntop-p = 0.1\n[models.mine]\ntop_k = 2\n"
        "[models.'org/name']\ntop_k = 3\nmin_p = 0.3\n[aliases]\nmine = 'org/name'\n"
        "[ui]\ncolor = 'never'\n"
    )
    assert defaults_for(read(FLAGS), "mine") == {
        "top_k": (2, "config.toml [models.mine]"),
        "top_p": (0.1, "config.toml"),
        "min_p": (0.3, "config.toml [models.org/name]"),
        "color": ("never", "config.toml"),
    }
    assert defaults_for(read(FLAGS), "other")["top_k"] == (1, "config.toml")


@pytest.mark.parametrize("model", ["smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "small"])
def test_a_models_settings_are_found_by_each_of_its_names(file: Path, model: str) -> None:
    file.write_text("[models.smollm2-360m]\ntop_k = 2\n[aliases]\nsmall = 'smollm2-360m'\n")
    assert defaults_for(read(FLAGS), model)["top_k"] == (2, "config.toml [models.smollm2-360m]")


def test_a_setting_is_written_and_comments_stay(file: Path) -> None:
    file.write_text("# mine\n[defaults]\ntop_k = 1 # few\n\n[ui]  # looks\n")
    for key, value in [
        ("top_k", "2"),
        ("defaults.top-p", "0.5"),
        ("stop", '["a", "b"]'),
        ("system", "3"),
        ("models.llama3.1-8b.ctx-size", "8192"),
        ("aliases.a.b", "org/name"),
        ("ui.toolbar", "false"),
    ]:
        write(key, value, FLAGS)
    text = file.read_text()
    assert text.startswith("# mine\n[defaults]\ntop_k = 2 # few\n")
    assert "[ui]  # looks" in text
    settings.config.cache_clear()
    assert read(FLAGS) == {
        "defaults": {"top_k": 2, "top_p": 0.5, "stop": ["a", "b"], "system": "3"},
        "ui": {"toolbar": False},
        "models": {"llama3.1-8b": {"ctx_size": 8192}},
        "aliases": {"a.b": "org/name"},
    }


def test_a_setting_that_is_written_with_a_dash_is_not_written_twice(file: Path) -> None:
    file.write_text("[defaults]\ntop-k = 1\n")
    write("top_k", "2", FLAGS)
    assert file.read_text() == "[defaults]\ntop-k = 2\n"


def test_a_wrong_setting_can_be_put_right(file: Path) -> None:
    file.write_text("[defaults]\ntop_k = 'many'\n")
    write("top_k", "2", FLAGS)
    assert file.read_text() == "[defaults]\ntop_k = 2\n"


def test_the_folder_of_the_file_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "a" / "b" / "config.toml"))
    assert write("seed", "3", FLAGS).read_text() == "[defaults]\nseed = 3\n"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("temprature", "1", "did you mean temperature?"),
        ("temperature", "hot", "expected a number"),
        ("default.top_k", "1", "did you mean defaults?"),
        ("ui.colour", "never", "did you mean color?"),
        ("models.mine", "1", "models.ALIAS"),
        ("top_p", "7", "at most 1"),
    ],
)
def test_what_is_wrong_does_not_get_into_the_file(
    file: Path, key: str, value: str, named: str
) -> None:
    file.write_text("[defaults]\nseed = 1\n")
    with pytest.raises(UsageError) as caught:
        write(key, value, FLAGS)
    assert caught.value.message.startswith(f"{key}: ")
    assert named in f"{caught.value.message} {caught.value.hint}"
    assert file.read_text() == "[defaults]\nseed = 1\n"


def test_a_file_that_is_already_wrong_is_told_and_kept(file: Path) -> None:
    file.write_text("[defaults]\nsed = 1\n")
    with pytest.raises(UsageError, match=r"config\.toml, line 2: 'sed' is no setting"):
        write("top_k", "1", FLAGS)
    assert file.read_text() == "[defaults]\nsed = 1\n"


def test_a_file_that_cannot_be_written_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "file" / "config.toml"))
    with pytest.raises(LlamachatError) as caught:
        write("seed", "3", FLAGS)
    assert caught.value.exit_code == 7
