"""What ChatGLM2's folders call their weights, and what else is theirs: tokens and a template.

Source: THUDM/chatglm2-6b, modeling_chatglm.py and tokenization_chatglm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import Shape, WeightName, half_split_rows, iter_weights

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

# The tokenizer's code appends them to the SentencePiece model, in this order.
APPENDED_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

# What `get_prefix_tokens` and `build_prompt` write; a system message joins the first question.
CHAT_TEMPLATE = """\
[gMASK]sop
{%- set turn = namespace(round=0, system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set turn.system = message.content | trim %}
{%- elif message.role == 'user' %}
{%- set turn.round = turn.round + 1 %}
{{- '\\n\\n' if turn.round > 1 }}{{ '[Round ' ~ turn.round ~ ']\\n\\n问：' }}
{{- turn.system ~ '\\n\\n' if turn.system }}{{ message.content | trim }}{{ '\\n\\n答：' }}
{%- set turn.system = '' %}
{%- else %}
{{- message.content | trim }}
{%- endif %}
{%- endfor %}"""

_PARTS = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "self_attn.q_proj": "self_attention.query_key_value",
    "self_attn.k_proj": "self_attention.query_key_value",
    "self_attn.v_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_proj": "mlp.dense_h_to_4h",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
_LAYERS, _OUR_LAYERS = "transformer.encoder.layers.", "model.layers."


@dataclass(frozen=True, slots=True)
class Joined:
    """One tensor of a file: the rows of one weight, or of several, one below the other."""

    name: str
    weights: tuple[WeightName, ...]

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return (sum(weight.shape[0] for weight in self.weights), *self.weights[0].shape[1:])

    def split(self, tensor: Tensor | QTensor) -> Iterator[tuple[str, Tensor | QTensor]]:
        """The weights by their Hugging Face names.

        Of several weights the pairs that rope turns are neighbours, and are brought to the
        half-split order. The pairs that it leaves alone have frequency 0 there: which two
        dimensions make one does not matter, as long as it is the same in queries and keys.
        """
        import torch

        if len(self.weights) == 1:
            yield self.weights[0].hf, tensor
            return
        first = 0
        for weight in self.weights:
            n_rows = weight.shape[0]
            rows = torch.arange(n_rows)
            if weight.heads is not None:
                rows = torch.from_numpy(half_split_rows(n_rows, weight.heads))
            rows += first
            yield weight.hf, tensor[rows] if isinstance(tensor, torch.Tensor) else tensor.rows(rows)
            first += n_rows


def iter_joined(config: ModelConfig) -> Iterator[Joined]:
    """Every tensor that the config asks for, in the order of a forward pass."""
    for name, weights in groupby(iter_weights(config), lambda weight: stored_name(weight.hf)):
        yield Joined(name, tuple(weights))


def stored_name(hf: str) -> str:
    """The tensor that holds the weight which Hugging Face's Llama calls `hf`."""
    module, _, kind = hf.rpartition(".")
    if not module.startswith(_OUR_LAYERS):
        return f"{_PARTS[module]}.{kind}"
    layer, _, part = module.removeprefix(_OUR_LAYERS).partition(".")
    return f"{_LAYERS}{layer}.{_PARTS.get(part, part)}.{kind}"
