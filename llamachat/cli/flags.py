"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def option(*names: str, help: str, metavar: str | None = None, minimum: int | None = None) -> Any:
    """An option whose help is one line. The variable that sets it is told once, for all."""
    return typer.Option(
        *names, help=help, metavar=metavar, min=minimum, show_default=False, show_envvar=False
    )


Name = Annotated[str, typer.Argument(metavar="MODEL", help="Alias, org/name, or path.")]
Json = Annotated[bool, option("--json", help="JSON on stdout.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="No notices on stderr.")]
Verbose = Annotated[bool, option("--verbose", "-v", help="Statistics, and tracebacks.")]
Offline = Annotated[bool, option("--offline", help="Never use the network.")]
# Typer evaluates annotations on Python 3.10, too: hence Optional.
Text = Optional[str]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Fraction = Optional[float]  # noqa: UP045
Revision = Annotated[
    Text, option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
]
TokenFile = Annotated[
    Optional[Path],  # noqa: UP045
    option("--hf-token-file", metavar="FILE", help="File that holds the Hub token."),
]
# How a model is run.
Threads = Annotated[
    Number, option("--threads", "-t", metavar="N", minimum=1, help="[default: physical cores]")
]
Backend = Annotated[
    str, option("--backend", metavar="NAME", help="auto, native, reference, bitsandbytes.")
]
Dtype = Annotated[str, option("--dtype", metavar="NAME", help="auto, float32, bfloat16.")]
Quantize = Annotated[
    str, option("--quantize", metavar="FORM", help="auto, none, int8, int4, nf4, fp4, llm-int8.")
]
KvCache = Annotated[str, option("--kv-cache", metavar="NAME", help="auto, f32, bf16, int8.")]
