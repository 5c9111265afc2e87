"""Keys and values of a batch of sequences, one slot per position."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_infer.config import ModelConfig

GROW_TOKENS = 256


class KVCache:
    """Slot s of a row holds position s, so padded rows overwrite their padding as they go on.

    Every layer keeps all positions; sliding layers only read the last `sliding_window` of them.
    """

    def __init__(self, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.num_slots = 0  # slots attended to

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` positions; what is stored stays."""
        self.num_slots = num_slots
        room = self.keys[0].shape[2]
        if num_slots <= room:
            return
        extra = -(-num_slots // GROW_TOKENS) * GROW_TOKENS - room
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = torch.cat([old, old.new_zeros(*old.shape[:2], extra, old.shape[3])], dim=2)

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B, T); return the attended slots, (B, K, S, D)."""
        index = positions[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)
        return self.keys[layer][:, :, : self.num_slots], self.values[layer][:, :, : self.num_slots]

    def keep(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, int64 (B',)."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
