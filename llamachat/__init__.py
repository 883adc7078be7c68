"""Talk to a Llama model on your own machine.

    import llamachat
    model = llamachat.load("smollm2-135m")
    chat = llamachat.ChatSession(model)
    for event in chat.send("Hello"): ...

Importing this is cheap: torch comes with the first `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamachat.chat.session import ChatSession
    from llamachat.engine.decoding import Start
    from llamachat.engine.strategies import Greedy, Sample
    from llamachat.load import Model, load

_HOMES = {
    "ChatSession": "llamachat.chat.session",
    "Greedy": "llamachat.engine.strategies",
    "Model": "llamachat.load",
    "Sample": "llamachat.engine.strategies",
    "Start": "llamachat.engine.decoding",
    "load": "llamachat.load",
}

__all__ = ["ChatSession", "Greedy", "Model", "Sample", "Start", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562)."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("llamachat")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # All of a module's names at once: importing llamachat.load put the module in place of `load`.
    globals().update({n: getattr(home, n) for n in _HOMES if _HOMES[n] == _HOMES[name]})
    return globals()[name]
