"""Kernels, and the one place that chooses between them: Triton on a GPU, the plain PyTorch reference everywhere else.

Triton is imported when the first CUDA (or ROCm) tensor arrives, never before. A kernel's module holds its launcher,
with the signature and the results of its reference; `crosscompile` compiles all of them for GPUs that need not be
there. Used by the model and by training.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from gptoss_infer import mxfp4

_LOG = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether work on `x` goes the way of a GPU. That of a tensor without data (device meta) does, for planning."""
    return x.device.type != "cpu"


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4; signature, values and errors are those of `gptoss_infer.mxfp4.decode`."""
    if blocks.is_cuda and dtype in (torch.bfloat16, torch.float32) and has_triton():
        from gptoss_infer.kernels import mxfp4_decode

        return mxfp4_decode.decode(blocks, scales, dtype)
    return mxfp4.decode(blocks, scales, dtype)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; without it a GPU runs the references, which is said once."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _LOG.warning("triton is not installed: the GPU runs plain PyTorch instead of our kernels, more slowly")
    return found
