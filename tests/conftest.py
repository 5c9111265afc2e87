"""Random checkpoints small enough for every test, in every layout; one thread for all of them and their children."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from gptoss_infer.adapter import Adapter, Factors, Target, zero_like
from gptoss_infer.checkpoint.layouts import expected_shapes
from gptoss_infer.config import ModelConfig, RopeConfig, to_hf_json

if TYPE_CHECKING:
    from gptoss_infer.engine import Engine

# Tensors are tiny here: more threads only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def tiny_config(**changes: object) -> ModelConfig:
    """A model with every feature in play: window 16, YaRN over a short original context, groups of 4."""
    fields: dict = {
        "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 6,
        "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "sliding_window": 16,
        "rope": RopeConfig(factor=8.0, original_max_position_embeddings=64),
    } | changes  # fmt: skip
    kinds = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(fields["num_hidden_layers"])]
    return ModelConfig(**{"layer_types": tuple(kinds)} | fields)


def random_tensors(config: ModelConfig, experts: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of about unit effect, biases and sinks included, so that no term can be missing unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config, experts).items():
        if name.endswith("_blocks"):
            tensors[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        elif name.endswith("_scales"):
            tensors[name] = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
        else:
            std = 1.0 if len(shape) == 1 or "embed" in name else shape[-1 if len(shape) == 2 else -2] ** -0.5
            values = torch.randn(shape, generator=generator) * std
            tensors[name] = (values * 0.1 + 1 if "norm" in name else values).bfloat16()
    return tensors


def random_adapter(
    config: ModelConfig,
    targets: Sequence[Target],
    size: float = 0.2,
    *,
    rank: int = 4,
    rslora: bool = False,
    seed: int = 5,
) -> Adapter:
    """Alpha 8, both factors normal of this size."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        target: Factors(*(torch.randn(x.shape, generator=generator) * size for x in pair))
        for target, pair in zero_like(config, targets, rank, 8.0).factors.items()
    }
    return Adapter(rank, 8.0, rslora, 0.0, factors)


def write_tiny(directory: Path, config: ModelConfig, experts: str = "mxfp4", seed: int = 0) -> Path:
    """Write a random checkpoint in Hugging Face's layout through the safetensors library, not through our writer."""
    directory.mkdir(parents=True)
    save_file(random_tensors(config, experts, seed), directory / "model.safetensors", metadata={"format": "pt"})
    config_json = to_hf_json(config, quantized=experts == "mxfp4")
    (directory / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    return directory


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that speaks harmony: see `speaker`."""
    from speaker import write_speaker

    return write_speaker(tmp_path_factory.mktemp("speaker") / "model")


@pytest.fixture(scope="session")
def speaker_engine(speaker: Path) -> Engine:
    """Our engine with it, in fp32; what it says depends on prompt and seed alone."""
    from gptoss_infer.engine import Engine

    return Engine.from_checkpoint(str(speaker), device="cpu", dtype=torch.float32)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """A random MXFP4 checkpoint of 3 layers with a 512-token vocabulary."""
    return write_tiny(tmp_path / "base", tiny_config())


@pytest.fixture
def tiny_harmony_checkpoint(tmp_path: Path) -> Path:
    """As `tiny_checkpoint`, with the 201,088-token vocabulary of harmony (and 1 layer, to stay small)."""
    return write_tiny(tmp_path / "base", tiny_config(num_hidden_layers=1, vocab_size=201088))
