"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Alias, org/name, or path.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notices on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Statistics, and tracebacks.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Revision = Annotated[
    Optional[str],  # noqa: UP045  # Typer evaluates it on Python 3.10, too
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository."),
]
TokenFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--hf-token-file", metavar="FILE", help="File that holds the Hub token."),
]
