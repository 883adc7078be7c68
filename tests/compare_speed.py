"""Speed beside transformers: the same weights, dtype and threads, in turn, in one process.

    python tests/compare_speed.py [MODEL] [--dtype bfloat16] [--rounds 5]

Prints medians of prefill (512 tokens) and decode (64 tokens), their ratio round by round, and the
limit: each token of decode reads every weight once, so bandwidth / bytes bounds it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llamachat
from llamachat import hardware
from llamachat.checkpoints import open_checkpoint
from llamachat.engine.events import Token
from llamachat.quant.tensor import QTensor

PROMPT, REPLY = 512, 64
Seconds = tuple[float, float]  # prefill, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = llamachat.load(arguments.model, backend="reference", dtype=arguments.dtype)
    peer = in_transformers(model)
    ids = model.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 60)[: PROMPT - 1]
    ours: list[Seconds] = []
    theirs: list[Seconds] = []
    for round_ in range(arguments.rounds + 1):  # the first one warms up
        prompt = [round_ + 20, *ids]  # nothing of it is in the cache
        ours.append(time_ours(model, prompt))
        theirs.append(time_theirs(peer, prompt))
    weights = model.config.n_params * (2 if model.dtype == "bfloat16" else 4)
    bandwidth = read_bandwidth()
    print(f"{hardware.cpu_name()}, {model.threads} threads, torch {torch.__version__}")
    print(f"{model.name}, {model.dtype}; reads {bandwidth / 1e9:.1f} GB/s")
    print(f"limit of decode: {bandwidth / weights:.0f} tok/s for {weights / 1e6:.0f} MB of weights")
    for phase, tokens in ((0, PROMPT), (1, REPLY - 1)):
        mine = [tokens / times[phase] for times in ours[1:]]
        peers = [tokens / times[phase] for times in theirs[1:]]
        ratios = [a / b for a, b in zip(mine, peers, strict=True)]
        print(
            f"{('prefill', 'decode')[phase]:8} llamachat {statistics.median(mine):6.1f}  "
            f"transformers {statistics.median(peers):6.1f} tok/s  "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def in_transformers(model: llamachat.Model) -> LlamaForCausalLM:
    """The same weights in the peer."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    peer = LlamaForCausalLM(config).to(getattr(torch, model.dtype)).eval()
    weights = {
        name: tensor.dequantize() if isinstance(tensor, QTensor) else tensor
        for name, tensor in open_checkpoint(model.located.path).tensors()
    }
    missing = peer.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return peer


def time_ours(model: llamachat.Model, ids: list[int]) -> Seconds:
    events = model.engine.generate(
        ids, llamachat.Greedy(), max_new_tokens=REPLY, stop_ids=frozenset()
    )
    began = time.perf_counter()
    moments = [time.perf_counter() for event in events if isinstance(event, Token)]
    return moments[0] - began, moments[-1] - moments[0]


def time_theirs(peer: LlamaForCausalLM, ids: list[int]) -> Seconds:
    with torch.inference_mode():
        began = time.perf_counter()
        out = peer(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(REPLY - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = peer(token, past_key_values=out.past_key_values, use_cache=True)
        return first - began, time.perf_counter() - first


def read_bandwidth() -> float:
    """Bytes a second that summing 1 GB takes; the best of five."""
    block = torch.ones(250_000_000)
    return max(block.nbytes / seconds(block.sum) for _ in range(5))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
