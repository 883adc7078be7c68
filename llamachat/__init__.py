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
    from llamachat.engine.beam import Beam
    from llamachat.engine.decoding import Start
    from llamachat.engine.strategies import Greedy, Sample
    from llamachat.loading import Model, load

_HOMES = {
    "Beam": "llamachat.engine.beam",
    "ChatSession": "llamachat.chat.session",
    "Greedy": "llamachat.engine.strategies",
    "Model": "llamachat.loading",
    "Sample": "llamachat.engine.strategies",
    "Start": "llamachat.engine.decoding",
    "load": "llamachat.loading",
}

__all__ = ["Beam", "ChatSession", "Greedy", "Model", "Sample", "Start", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562)."""
    from importlib import import_module, metadata

    if name == "__version__":
        try:
            return metadata.version("llamachat")
        except metadata.PackageNotFoundError:  # run from its sources
            return "unknown"
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
