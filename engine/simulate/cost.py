"""How long a step would take on a device, and how many blocks fit beside the weights.

A roofline of published peaks: the longer of computing and of reading memory, plus a fixed time.
Real steps take longer; compare allocators with it, not machines.
"""

from __future__ import annotations

import dataclasses

MEMORY_SHARE = 0.90
"""Part of a chip's memory for weights and cache; activations and programs take the rest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """A model on a device, as far as the time of a step depends on them.

    Attributes:
      name: of both, for reports.
      weight_bytes: read once a step.
      kv_bytes_per_token: keys and values of one position, all layers.
      flops_per_token: of the matrix products with weights.
      flops_per_pair: of attention, for one query position and one key position, all layers.
      bytes_per_s: peak memory bandwidth.
      flops_per_s: peak rate of dense bfloat16 matrix products.
      overhead_s: of every step, whatever it holds: launch, sampling, transfers.
      memory_bytes: of the device.
      host_bytes_per_s: between its memory and the host's.
    """

    name: str
    weight_bytes: float
    kv_bytes_per_token: int
    flops_per_token: float
    flops_per_pair: float
    bytes_per_s: float
    flops_per_s: float
    overhead_s: float
    memory_bytes: float
    host_bytes_per_s: float = 32e9  # a guess: half of what a PCIe 5.0 x16 slot can do

    def step_s(self, num_tokens: int, num_pairs: int, context: int, num_swapped: int = 0) -> float:
        """Seconds of a step.

        Args:
          num_tokens: positions computed.
          num_pairs: (query, key) position pairs attended to: a position sees itself and those
            before it.
          context: positions whose keys and values are read or written, over all rows.
          num_swapped: positions moved to or from host memory; nothing else is done meanwhile.
        """
        flops = num_tokens * self.flops_per_token + num_pairs * self.flops_per_pair
        read = self.weight_bytes + context * self.kv_bytes_per_token
        swaps_s = num_swapped * self.kv_bytes_per_token / self.host_bytes_per_s
        return self.overhead_s + swaps_s + max(flops / self.flops_per_s, read / self.bytes_per_s)

    def blocks_in(self, memory: float, block_size: int) -> int:
        """Whole blocks of `block_size` tokens in so many bytes."""
        return int(memory // (self.kv_bytes_per_token * block_size))

    def blocks_beside_weights(self, block_size: int) -> int:
        """Blocks in what weights and reserve leave of the device."""
        left = MEMORY_SHARE * self.memory_bytes - self.weight_bytes
        return max(0, self.blocks_in(left, block_size))


# Meta's model card and config.json: 8.03e9 parameters, 32 layers, 32 query and 8 KV heads of 128.
_PARAMETERS, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 8.03e9, 32, 32, 8, 128
_BF16 = 2  # bytes


def _llama3_8b(
    device: str, *, memory_bytes: float, bytes_per_s: float, flops_per_s: float
) -> CostModel:
    return CostModel(
        name=f"Llama-3-8B, bfloat16, one {device} (estimate)",
        weight_bytes=_PARAMETERS * _BF16,
        kv_bytes_per_token=2 * _LAYERS * _KV_HEADS * _HEAD_DIM * _BF16,
        flops_per_token=2 * _PARAMETERS,
        flops_per_pair=4 * _LAYERS * _HEADS * _HEAD_DIM,  # scores and the sum of values
        bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
        overhead_s=0.5e-3,  # a guess
        memory_bytes=memory_bytes,
    )


DEVICES = {
    # cloud.google.com/tpu/docs/v6e
    "v6e": _llama3_8b("TPU v6e", memory_bytes=32e9, bytes_per_s=1.64e12, flops_per_s=918e12),
    # NVIDIA H100 datasheet, SXM, dense
    "h100": _llama3_8b("H100 SXM", memory_bytes=80e9, bytes_per_s=3.35e12, flops_per_s=989e12),
}
"""Cost models by name; none was measured."""
