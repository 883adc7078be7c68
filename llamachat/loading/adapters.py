"""Adapters over a model, and whether they were made for it. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.lora import AdaptedCheckpoint, Adapter, adapter_named
from llamachat.checkpoints.overlay import Overlay
from llamachat.errors import DamagedFileError
from llamachat.library import catalog
from llamachat.library.store import Located

# Models that were trained from nothing: what was made for one does not belong to another.
_FOUNDATIONS = frozenset(
    (
        *("LLaMA-1", "Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2"),
        *("TinyLlama", "SmolLM2", "ChatGLM", "ChatGLM2"),
    )
)


def adapted(
    checkpoint: Checkpoint,
    lora: Sequence[str | Path],
    located: Located,
    notice: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint with adapters merged in, in order: PATH or PATH:SCALE each.

    Raises:
        DamagedFileError: one cannot be followed, or was made for another model.
    """
    for name in lora:
        adapter = adapter_named(str(name))
        other = check_base(adapter, checkpoint, located)
        if other is not None and not isinstance(checkpoint, Overlay):  # which has no name
            notice(other)
        checkpoint = AdaptedCheckpoint(checkpoint, adapter)
    return checkpoint


def check_base(adapter: Adapter, checkpoint: Checkpoint, located: Located) -> str | None:
    """Compare the name of the model that an adapter was made for with that of the model.

    Returns:
        what to warn of where the names differ: the same model may go by many.

    Raises:
        DamagedFileError: the catalog knows both, and that they have no weights in common.
    """
    wanted = adapter.base_name
    if wanted is None:
        return None
    metadata = checkpoint.metadata
    names = (located.repo, located.alias, located.path.name, metadata.get("name"))
    found = [str(name) for name in (*names, metadata.get("source")) if name]
    if any(_is_same(wanted, name) for name in found):
        return None
    made_for, model = catalog.of_repo(wanted), catalog.of_repo(located.repo or "")
    said = f"{adapter.path}: it was made for {wanted}, the model is {found[0]}"
    families = {entry.family for entry in (made_for, model) if entry}
    if made_for and len(families) == 2 and families <= _FOUNDATIONS:
        raise DamagedFileError(said, hint=f"llamachat chat -m {made_for.alias} --lora ...")
    return said


def _is_same(wanted: str, name: str) -> bool:
    """Whether names differ only in who keeps the files, or in their form."""
    bare, other = _bare(wanted), _bare(name)
    return bool(bare) and (bare == other or (name.endswith(".gguf") and other.startswith(bare)))


def _bare(name: str) -> str:
    last = PurePosixPath(name.replace("\\", "/")).name.lower()
    return re.sub(r"[^a-z0-9]", "", re.sub(r"[-_](hf|gguf)$", "", last))
