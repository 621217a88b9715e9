"""What a decoder's weights take, in parameters and bytes: the part of `memory_plan` about them."""

from __future__ import annotations

from typing import NamedTuple

from engine.config import DTYPE_BYTES, Architecture, ModelConfig


class Weight(NamedTuple):
    """One kind of tensor of the decoder, over all layers.

    Attributes:
      name: as in a Hugging Face checkpoint, without prefix and layer number.
      num_parameters: elements, all layers together.
      num_parts: how many pieces it can be cut into over chips: query heads, KV heads,
        feed-forward columns or vocabulary entries. 1: every chip holds all of it.
      num_scales: of a matrix that may be in int8, its columns, over all layers; 0: it may not.
      cuts_columns: whether the pieces are columns, so that the scales are cut too.
    """

    name: str
    num_parameters: int
    num_parts: int
    num_scales: int = 0
    cuts_columns: bool = True

    def bytes_per_chip(self, model: ModelConfig, tensor: int) -> int:
        """On the fullest of `tensor` chips; with more chips than parts they repeat."""
        parameters = _per_chip(self.num_parameters, self.num_parts, tensor)
        if model.quantization == "none" or not self.num_scales:
            return parameters * DTYPE_BYTES[model.dtype]
        parts = self.num_parts if self.cuts_columns else 1
        return parameters + 4 * _per_chip(self.num_scales, parts, tensor)


def weights(arch: Architecture) -> tuple[Weight, ...]:
    """Every tensor of a decoder, in the order the forward pass reads them."""
    layers, width, head = arch.num_layers, arch.hidden_size, arch.head_dim
    query, kv, ffn = arch.num_heads, arch.num_kv_heads, arch.intermediate_size

    def matrix(name: str, rows: int, columns: int, parts: int, cuts_columns: bool = True) -> Weight:
        return Weight(name, layers * rows * columns, parts, layers * columns, cuts_columns)

    vocab = arch.vocab_size
    tensors = [
        Weight("embed_tokens", vocab * width, vocab, vocab if arch.tie_embeddings else 0),
        Weight("input_layernorm", layers * width, 1),
        matrix("q_proj", width, query * head, query),
        matrix("k_proj", width, kv * head, kv),
        matrix("v_proj", width, kv * head, kv),
    ]
    if arch.qkv_bias:
        tensors += [
            Weight("q_proj.bias", layers * query * head, query),
            Weight("k_proj.bias", layers * kv * head, kv),
            Weight("v_proj.bias", layers * kv * head, kv),
        ]
    if arch.qk_norm:
        tensors += [Weight("q_norm", layers * head, 1), Weight("k_norm", layers * head, 1)]
    tensors += [
        matrix("o_proj", query * head, width, query, cuts_columns=False),
        Weight("post_attention_layernorm", layers * width, 1),
        matrix("gate_proj", width, ffn, ffn),
        matrix("up_proj", width, ffn, ffn),
        matrix("down_proj", ffn, width, ffn, cuts_columns=False),
        Weight("norm", width, 1),
    ]
    if not arch.tie_embeddings:
        tensors.append(Weight("lm_head", vocab * width, vocab, vocab))
    return tuple(tensors)


def num_parameters(arch: Architecture) -> int:
    """Elements of all weights, without scales; tied embeddings count once."""
    return sum(weight.num_parameters for weight in weights(arch))


def weight_bytes_per_chip(model: ModelConfig, arch: Architecture, tensor: int) -> int:
    """Bytes of the weights, scales too, on the fullest of `tensor` chips."""
    return sum(weight.bytes_per_chip(model, tensor) for weight in weights(arch))


def _per_chip(count: int, parts: int, tensor: int) -> int:
    return count // parts * -(-parts // tensor)
