"""What this machine can do at most, measured, and what a step of generation needs at least, counted.

Generating is limited by memory: each step reads all dense weights, the experts that any of its tokens chose, and the
keys and values that its queries see. Reading a prompt is limited by arithmetic. Used by `gptoss_infer.bench`.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from gptoss_infer.config import ModelConfig
from gptoss_infer.experts import ExpertLinear
from gptoss_infer.model import GptOss

READ_BYTES = 2**28  # beyond any cache, and less than a model: the peak of memory is the model's
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}


class Peak(NamedTuple):
    """Measured rates of a device."""

    read_bytes_per_s: float
    flops: float  # of bf16 products (fp32 for a model in fp32), per second


def measure_peak(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> Peak:
    """Return the best of some rounds of reading a quarter of a GiB, and of multiplying square matrices."""
    data = torch.zeros(READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    reading = min(_seconds(lambda: data.amax(), device) for _ in range(rounds))
    product = min(_seconds(lambda: left @ right, device) for _ in range(rounds))
    return Peak(READ_BYTES / reading, 2 * size**3 / product)


def _seconds(work, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def decode_bytes(model: GptOss, batch: int, context: int) -> float:
    """Return the bytes that one step of `batch` samples reads at least, each having `context` tokens before it.

    Weights are counted as they are held. Experts are expected to be chosen evenly, and each independently: E (1 - (1 -
    k / E)^batch) of E are read. Real routing is uneven and reads fewer.
    """
    config = model.config
    untouched = (1 - config.num_experts_per_tok / config.num_local_experts) ** batch
    experts = dense = 0
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        size = sum(tensor.nbytes for tensor in own)
        if isinstance(module, ExpertLinear):
            experts += size
        elif not isinstance(module, nn.Embedding):  # of which a step reads one row a token
            dense += size
    return dense + experts * (1 - untouched) + batch * _cache_bytes(model, context)


def _cache_bytes(model: GptOss, context: int) -> int:
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * model.lm_head.weight.itemsize
    windows = sum(kind == "sliding_attention" for kind in config.layer_types)
    full = len(config.layer_types) - windows
    return per_token * (full * context + windows * min(context, config.sliding_window))


def prefill_flops(config: ModelConfig, prompt: int) -> float:
    """Return the operations of reading one prompt, a multiplication and an addition counted as two.

    The unembedding counts once: only the last token needs it.
    """
    c, d, i = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    attention = c * d * (heads + 2 * kv) + heads * d * c
    layer = attention + c * config.num_local_experts + config.num_experts_per_tok * 3 * c * i
    seen = 0  # keys, over all tokens and layers
    for kind in config.layer_types:
        window = config.sliding_window if kind == "sliding_attention" else prompt
        seen += sum(min(position + 1, window) for position in range(prompt))
    return 2.0 * (prompt * len(config.layer_types) * layer + 2 * seen * heads * d + c * config.vocab_size)
