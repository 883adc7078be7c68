"""What folders of ChatGLM call their weights, and what else is ChatGLM2's: tokens, a template.

Source: THUDM/chatglm-6b and THUDM/chatglm2-6b, modeling_chatglm.py and tokenization_chatglm.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.joined import Layout, Rows, rows_by_weight
from llamachat.checkpoints.names import WeightName, renamed

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

_PARTS_OF_6B = {
    "model.embed_tokens": "transformer.word_embeddings",
    "self_attn.q_proj": "attention.query_key_value",
    "self_attn.k_proj": "attention.query_key_value",
    "self_attn.v_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "model.norm": "transformer.final_layernorm",
    "lm_head": "lm_head",
}
_PARTS_OF_2 = {
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


def layout(config: ModelConfig) -> Layout:
    """Of ChatGLM-6B or ChatGLM2."""
    parts, layers, rows_of = _PARTS_OF_2, "transformer.encoder.layers.", rows_by_weight
    if config.prefix is not None:
        parts, layers, rows_of = _PARTS_OF_6B, "transformer.layers.", _rows_by_head
    return Layout(lambda hf: renamed(hf, parts, layers), rows_of)


def _rows_by_head(weights: Sequence[WeightName]) -> Iterator[Rows]:
    """Each head has its query, key and value; both halves of a query or key are half-split.

    The first halves of the two come first, so that they are turned as one head.
    """
    n_heads = weights[0].heads
    assert n_heads is not None
    rows = np.arange(sum(weight.shape[0] for weight in weights))
    quarters = rows.reshape(n_heads, len(weights), 2, 2, -1)  # (H, q k v, half, of a pair, E / 4)
    for i, weight in enumerate(weights):
        head = quarters[:, i]
        yield (head.swapaxes(1, 2) if weight.heads is not None else head).reshape(-1)
