"""What our results are judged by: transformers' model, and MXFP4 read off the specification."""

from __future__ import annotations

from pathlib import Path

import torch

from gptoss_infer.checkpoint import Checkpoint


def transformers_model(directory: Path) -> torch.nn.Module:
    """The stock implementation, fp32 eager, its weights decoded one code at a time from the OCP table."""
    from transformers import GptOssConfig, GptOssForCausalLM

    checkpoint = Checkpoint.open(directory)
    raw = dict(checkpoint.raw_config)
    raw.pop("quantization_config", None)
    config = GptOssConfig(**raw | {"pad_token_id": None, "eos_token_id": None})
    config._attn_implementation = "eager"
    oracle = GptOssForCausalLM(config).float().eval()
    state = {}
    for name in checkpoint.names():
        if not name.endswith(("_blocks", "_scales")):
            state[name] = checkpoint.tensor(name).float()
            continue
        if name.endswith("_blocks"):
            blocks, scales = checkpoint.tensor(name), checkpoint.tensor(name.replace("_blocks", "_scales"))
            state[name.removesuffix("_blocks")] = slow_decode(blocks, scales).transpose(1, 2)
    oracle.load_state_dict(state, strict=True)
    return oracle


def slow_decode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 read off the specification, element by element of the code: sign, 2 exponent bits, 1 mantissa bit."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).double()
    sign = 1 - 2 * (codes >= 8).double()
    exponent, mantissa = ((codes % 8) // 2), codes % 2
    magnitude = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa / 2) * 2 ** (exponent - 1))
    return (sign * magnitude * 2 ** (scales.double().unsqueeze(-1) - 127)).flatten(-2).float()
