"""What a shell offers for the beginning of a value: names, without torch and without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from llamachat.errors import LlamachatError


def models(incomplete: str) -> Iterator[str]:
    """Own aliases, what is in the cache of the Hub, and the catalog."""
    from llamachat import settings
    from llamachat.library import hub_cache
    from llamachat.library.catalog import CATALOG

    try:
        own = [*settings.aliases(), *(str(name) for name, _ in hub_cache.installed())]
    except (LlamachatError, OSError):
        own = []
    return starting(incomplete, [*own, *(entry.alias for entry in CATALOG)])


def sessions(incomplete: str) -> Iterator[str]:
    """Conversations that are kept, the last one first."""
    from llamachat.chat import saved

    try:
        return starting(incomplete, saved.names())
    except LlamachatError:
        return iter(())


def strategies(incomplete: str) -> Iterator[str]:
    """Names of strategies."""
    from llamachat.chat.options import STRATEGIES

    return starting(incomplete, STRATEGIES)


def specs(incomplete: str) -> Iterator[str]:
    """The first word of a spec."""
    from llamachat.chat.options import STRATEGIES
    from llamachat.chat.specs import DEFAULT

    return starting(incomplete, (*STRATEGIES, DEFAULT, "quantize="))


def templates(incomplete: str) -> Iterator[str]:
    """Names of built-in templates."""
    from llamachat.chat.builtin import NAMES

    return starting(incomplete, NAMES)


def keys(incomplete: str) -> Iterator[str]:
    """Of the config file: flags of `chat`, and how the program looks."""
    from dataclasses import fields

    from llamachat.cli.configured import flags_of_chat
    from llamachat.settings import Ui

    look = (f"ui.{field.name}" for field in fields(Ui))
    return starting(incomplete, (*flags_of_chat(), *look))


def choices(name: str) -> Callable[[str], Iterable[str]]:
    """The values of a flag that has only a few."""

    def complete(incomplete: str) -> Iterator[str]:
        from llamachat.chat.configuration import CHOICES

        return starting(incomplete, CHOICES[name])

    return complete


def starting(incomplete: str, names: Iterable[str]) -> Iterator[str]:
    """Those of the names that begin so, each once."""
    return (name for name in dict.fromkeys(names) if name.startswith(incomplete))
