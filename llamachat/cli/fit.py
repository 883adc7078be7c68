"""`llamachat fit`: whether a model will fit, before it is fetched."""

from __future__ import annotations

from typing import Annotated

from llamachat.cli.flags import (
    Json,
    Name,
    Number,
    Offline,
    Quantize,
    Quiet,
    Revision,
    TokenFile,
    option,
)


def fit(
    model: Name,
    *,
    ctx_size: Annotated[
        Number,
        option("--ctx-size", "-c", metavar="N", minimum=1, help="Context [default: the model's]."),
    ] = None,
    quantize: Quantize = "auto",
    json: Json = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
) -> None:
    """Tell whether a model will fit in memory and on disk; nothing is fetched but headers.

    The exit code is 5 if it will not.
    """
    from llamachat.library.fit import examine
    from llamachat.terminal import fitting
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.question import token

    notices = Notices(quiet=quiet)
    found = examine(
        model,
        ctx_size=ctx_size,
        quantize=quantize,
        revision=revision,
        token=token(hf_token_file, notices),
        offline=offline,
        notice=notices,
    )
    fitting.show_fit(found, json=json)
    fitting.require(found)
