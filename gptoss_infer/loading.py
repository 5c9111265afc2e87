"""Fill a model from a checkpoint, tensor by tensor: any layout, experts kept as MXFP4 or expanded."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gptoss_infer.checkpoint.layouts import EXPERT_WEIGHTS
from gptoss_infer.checkpoint.reader import Checkpoint, resolve
from gptoss_infer.errors import MachineError, UsageError
from gptoss_infer.model import GptOss, RMSNorm

EMBEDDING = "model.embed_tokens.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # as recipes and command lines name them


def pick_device(device: str) -> torch.device:
    """Return the device named, or for `auto` CUDA if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError(
            f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device; use cpu"
        )
    return torch.device(device)


def load(
    checkpoint: str | Path | Checkpoint,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    experts: Literal["mxfp4", "bf16"] = "mxfp4",
    embedding: Literal["device", "host"] = "device",
    progress: Callable[[float], object] = lambda _: None,
) -> GptOss:
    """Return the model of a checkpoint, in eval mode and without gradients.

    Args:
        checkpoint: directory, hub id[@revision] or an open Checkpoint.
        dtype: of activations and all weights but the MXFP4 bytes; norms stay fp32 as in the reference.
        experts: `mxfp4` keeps the 4-bit bytes in memory and decodes the experts that are hit; `bf16` expands them to
            `dtype`.
        embedding: `host` keeps the input embedding in main memory.
        progress: told which share of the tensors is there; `show_progress()` draws a bar.
    On a CPU, tensors that keep their dtype stay mapped from the files: the system reads them when they are first used.
    Raises: DataError for a damaged checkpoint; UsageError for mxfp4 on a checkpoint whose experts are bf16.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(resolve(str(checkpoint)))
    if experts == "mxfp4" and checkpoint.experts == "bf16":
        raise UsageError(
            f"{checkpoint.directory} holds bf16 experts, which cannot be held as MXFP4 without rounding them; "
            "load it with experts='bf16' (in a recipe: model.experts=bf16)"
        )
    target = pick_device(device)
    with torch.device("meta"):
        model = GptOss(checkpoint.config, experts)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    expanded = experts == "bf16" and checkpoint.experts == "mxfp4"
    names = [name for name in checkpoint.names() if not (expanded and name.endswith(("_blocks", "_scales")))]
    steps = len(names) + (len(EXPERT_WEIGHTS) * checkpoint.config.num_hidden_layers if expanded else 0)
    for number, name in enumerate(names, start=1):
        tensor = checkpoint.tensor(name)
        wanted = tensor.dtype if tensor.dtype == torch.uint8 else torch.float32 if name in norms else dtype
        place = torch.device("cpu") if name == EMBEDDING and embedding == "host" else target
        _assign(model, name, tensor.to(place, wanted))
        progress(number / steps)
    if expanded:
        pairs = [(layer, weight) for layer in range(checkpoint.config.num_hidden_layers) for weight in EXPERT_WEIGHTS]
        for number, (layer, weight) in enumerate(pairs, start=len(names) + 1):
            dense = expand_experts(checkpoint, layer, weight, dtype, target)
            _assign(model, f"model.layers.{layer}.mlp.experts.{weight}", dense)
            progress(number / steps)
    return model.eval().requires_grad_(False)


def show_progress() -> Callable[[float], None]:
    """Return what draws a bar on stderr for `load`; on a terminal only, and only from its second second on."""
    started = time.monotonic()

    def draw(share: float) -> None:
        if sys.stderr.isatty() and time.monotonic() - started > 1:
            bar = "#" * round(40 * share)
            print(f"\r  [{bar:<40}] {share:4.0%}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)

    return draw


def expand_experts(
    checkpoint: Checkpoint,
    layer: int,
    weight: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    edit: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return one layer's `gate_up_proj` or `down_proj` dense, (E, in, out), decoded one expert at a time."""
    parts: Tensor | None = None
    for expert in range(checkpoint.config.num_local_experts):
        values = checkpoint.expert(layer, weight, expert)  # (out, in)
        if edit is not None:
            values = edit(expert, values)
        if parts is None:
            shape = (checkpoint.config.num_local_experts, values.shape[1], values.shape[0])
            parts = torch.empty(shape, dtype=dtype, device=device)
        parts[expert] = values.T
    assert parts is not None, "a model has at least one expert"
    return parts


def module_name(name: str) -> str:
    """Return the parameter's name in the model for a tensor's canonical name: experts are modules there."""
    prefix, experts, leaf = name.partition("mlp.experts.")
    if not experts:
        return name
    weight, _, kind = leaf.partition("_proj")
    return f"{prefix}{experts}{weight}_proj.{kind.lstrip('_') or 'weight'}"


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the meta tensor of canonical `name` by `tensor`."""
    owner_name, _, leaf = module_name(name).rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
