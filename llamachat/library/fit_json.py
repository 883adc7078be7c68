"""What `fit` found, for programs to read."""

from __future__ import annotations

from collections.abc import Mapping

from llamachat.library.fit import Choice, Fit


def as_json(fit: Fit) -> Mapping[str, object]:
    """All of it, ready for JSON."""
    return {
        "name": fit.name,
        "verdict": fit.verdict,
        "params": fit.source.config.n_params,
        "form": fit.source.form,
        "size_bytes": fit.source.size_bytes,
        "disk": {
            "folder": str(fit.disk.folder),
            "download_bytes": fit.disk.download_bytes,
            "free_bytes": fit.disk.free_bytes,
        },
        "device": fit.device.id,
        "best": _choice_json(fit.best),
        "together": fit.together
        and {"gpus": fit.together.n_gpus, **_choice_json(fit.together.choice)},
        "devices": [
            {
                "id": device.id,
                "name": device.name,
                "verdict": device.best.verdict,
                "best": device.best.quantize,
                "n_needed": device.n_needed,
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "choices": [_choice_json(choice) for choice in device.choices],
            }
            for device in fit.devices
        ],
    }


def _choice_json(choice: Choice) -> Mapping[str, object]:
    found = choice.forecast
    return {
        "quantize": choice.quantize,
        "verdict": choice.verdict,
        "weight_bytes": found.weight_bytes,
        "kv_bytes_per_token": found.token_bytes,
        "ctx_size": choice.ctx_size,
        "kv_bytes": found.context_bytes(choice.ctx_size),
        "activation_bytes": found.activation_bytes,
        "loading_bytes": found.program_bytes + found.loading_bytes,
        "peak_bytes": choice.peak_bytes,
        "longest_context": choice.longest_context,
        "tok_per_s_at_most": choice.tok_per_s and round(choice.tok_per_s, 1),
    }
