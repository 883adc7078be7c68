"""`llamachat doctor`: what this machine runs with."""

from __future__ import annotations

from llamachat.cli.flags import Json


def doctor(*, json: Json = False) -> None:
    """Show versions, device, threads, backend and measured speed. Goes with a bug report."""
    from llamachat.measure.doctor import examine
    from llamachat.terminal import tables

    tables.show_findings(examine(), json=json)
