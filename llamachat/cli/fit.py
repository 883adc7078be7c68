"""`llamachat fit`: whether a model will fit, before it is fetched."""

from __future__ import annotations

from llamachat.cli.flags import (
    CtxSize,
    Device,
    Json,
    KvCache,
    Name,
    Offline,
    Quantize,
    Quiet,
    Revision,
    TokenFile,
)


def fit(
    model: Name,
    *,
    ctx_size: CtxSize = None,
    quantize: Quantize = "auto",
    kv_cache: KvCache = "auto",
    device: Device = "auto",
    json: Json = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
) -> None:
    """Tell whether a model will fit in memory and on disk; nothing is fetched but headers.

    The exit code is 5 if it will not.
    """
    from llamachat.library.fit import Wanted, examine
    from llamachat.terminal import fitting
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.question import token

    notices = Notices(quiet=quiet)
    found = examine(
        model,
        Wanted(ctx_size, quantize, device, kv_cache=kv_cache),
        revision=revision,
        token=token(hf_token_file, notices),
        offline=offline,
        notice=notices,
    )
    fitting.show_fit(found, json=json)
    fitting.require(found)
