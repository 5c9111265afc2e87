"""The gpt-oss models and their formats: config, MXFP4, checkpoints, harmony, the model, and an engine to run it.

Imports nothing of the sibling packages. Public names are imported on first use, so that a command's `--help` and the
light modules (errors, config) do not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_infer import constraints, harmony, mxfp4
    from gptoss_infer.checkpoint import Checkpoint
    from gptoss_infer.config import ModelConfig
    from gptoss_infer.engine import Completion, Engine, SamplingParams
    from gptoss_infer.loading import load

__all__ = [
    "Checkpoint",
    "Completion",
    "Engine",
    "ModelConfig",
    "SamplingParams",
    "constraints",
    "harmony",
    "load",
    "mxfp4",
]

_MODULES = {
    "Checkpoint": "checkpoint",
    "Completion": "engine",
    "Engine": "engine",
    "ModelConfig": "config",
    "SamplingParams": "engine",
    "load": "loading",
}


def __getattr__(name: str) -> object:
    """Import the module behind a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'gptoss_infer' has no attribute {name!r}; public names: {', '.join(__all__)}")
    if name in ("constraints", "harmony", "mxfp4"):
        return importlib.import_module(f"gptoss_infer.{name}")
    return getattr(importlib.import_module(f"gptoss_infer.{_MODULES[name]}"), name)
