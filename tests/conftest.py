"""Fixtures that every room's tests share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import TOKEN, Hub, serving

if TYPE_CHECKING:
    import torch
    from terminals import Terminal

    from llamachat.kernels import Batch, Cache, Kernels
    from llamachat.kernels.native import Native
    from llamachat.model.decoder import Decoder


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what loads leave behind out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real tokenizers, weights and text that LLAMACHAT_TEST_DATA names."""
    named = os.environ.get("LLAMACHAT_TEST_DATA")
    if not named:
        pytest.skip("LLAMACHAT_TEST_DATA is not set")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"LLAMACHAT_TEST_DATA names {folder}, which is no folder")
    return folder.resolve()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes folders of small random Llamas with a ChatML template, as transformers saves them.

    Ids 0 to 255 are bytes, then come <|im_start|>, <|im_end|> (which stops) and <s>; the model's
    table has 272 rows. Weights are spread so widely that the best logits stand well apart.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    def write(*, shard_size: str = "1GB", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        shape = {
            "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 1024, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
            "bos_token_id": 258, "eos_token_id": 257,
        }  # fmt: skip
        set_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero, as transformers begins
                parameter.data.normal_(std=0.5)
        model.save_pretrained(folder, max_shard_size=shard_size)
        _write_byte_tokenizer(folder)
        return folder

    return write


def _write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """Builds small random decoders in float32, without files; the same weights each time."""
    import torch

    from llamachat.architecture import ModelConfig
    from llamachat.checkpoints.names import iter_weights
    from llamachat.kernels.reference import Reference
    from llamachat.model.decoder import load_decoder

    torch.set_num_threads(1)  # more only wait for each other over matrices as small as these

    def build(kernels: Kernels | None = None, damaged: str = "") -> Decoder:
        config = ModelConfig(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=64,
            norm_eps=1e-5, rope_theta=1e4, max_seq_len=256, tied=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        tensors = {
            weight.hf: torch.randn(weight.shape, generator=generator) * 0.3
            for weight in iter_weights(config)
        }
        if damaged:
            tensors[damaged][-1] = math.nan
        return load_decoder(config, tensors.items(), kernels or Reference())

    return build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What asks for `isa` runs with each instruction set that was built and that this CPU has."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _instruction_sets(), scope="session")


def _instruction_sets() -> list[Any]:
    from llamachat.kernels.library import LibraryMissing
    from llamachat.kernels.native import instruction_sets

    try:
        return list(instruction_sets())
    except LibraryMissing as missing:
        return [pytest.param("", id="none", marks=pytest.mark.skip(f"no kernels: {missing}"))]


@pytest.fixture(scope="session")
def exact_decoder(random_decoder: Callable[..., Decoder]) -> Decoder:
    """Of which a pass over several tokens is exactly as good as several passes."""
    from llamachat.kernels.library import LibraryMissing
    from llamachat.kernels.native import Native

    try:
        return random_decoder(Native(1))
    except LibraryMissing as missing:
        pytest.skip(f"no kernels: {missing}")


@pytest.fixture(scope="session")
def native(isa: str) -> Callable[[int], Native]:
    """Gives the native backend with so many threads and the instruction set `isa`."""
    from functools import cache

    import torch

    from llamachat.kernels.native import Native

    torch.set_num_threads(1)
    return cache(lambda threads: Native(threads, isa))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hugging Face cache of a user with a token."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def fake_hub(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which `huggingface_hub` talks to; hub_folder is empty."""
    from huggingface_hub import constants

    from llamachat.library import download

    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield server


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens a terminal with flags and variables, and closes it after the test."""
    from terminals import Terminal

    opened: list[Terminal] = []

    def open_terminal(*flags: str, **options: Any) -> Terminal:
        opened.append(Terminal(tmp_path, *flags, **options))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.child.close(force=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of a decoder is over."""
    from llamachat.model.decoder import Decoder

    counts: list[int] = []
    run = Decoder.__call__

    def counted(decoder: Decoder, batch: Batch, cache: Cache) -> torch.Tensor:
        counts.append(len(batch.ids))
        return run(decoder, batch, cache)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return counts
