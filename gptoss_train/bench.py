"""`gptoss-train bench CKPT`: training steps on synthetic data through the trainer's own step, timed.

Here: the synthetic data and the one line of results. The step is `gptoss_train.train.Trainer.step`, with packing, loss,
clipping and optimizer. Random tokens; the last `loss_fraction` of every sample carries loss.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.config import ModelConfig
from gptoss_train.data import CHANNELS, Dataset, Report, Sample
from gptoss_train.plan import Workload, need_of
from gptoss_train.progress import peak_memory_bytes
from gptoss_train.recipe import Recipe
from gptoss_train.train import build_trainer


class Shape(NamedTuple):
    """What a step works on: `batch` samples of `seq` tokens, in packs of `pack` samples, a share of them labelled."""

    seq: int
    batch: int
    pack: int
    loss_fraction: float


def bench(checkpoint: str, shape: Shape, steps: int, settings: dict[str, dict[str, object]]) -> dict[str, object]:
    """Return the median time of `steps` optimizer steps after one to warm up, tokens/s and peak memory.

    Args:
        settings: sections of a recipe that replace the defaults, such as {"lora": {"rank": 8}}.
    """
    resident = peak_memory_bytes(torch.device("cpu"))
    opened = Checkpoint.open(resolve(checkpoint))
    sections: dict[str, dict[str, object]] = {
        "model": {"checkpoint": checkpoint},
        "data": {"train": "synthetic"},
        "train": {
            "max_steps": steps + 1,
            "pack_tokens": shape.seq * shape.pack,
            "batch_tokens": shape.seq * shape.batch,
        },
    }
    for name, given in settings.items():
        sections[name] = sections.get(name, {}) | given
    recipe = Recipe.model_validate({"version": 1} | sections)
    accelerator = Accelerator(cpu=recipe.model.device == "cpu" or not torch.cuda.is_available())
    data = synthetic(opened.config, shape, steps + 1)
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(
            recipe, opened, data, None, run_dir=Path(directory), fingerprint="", accelerator=accelerator
        )
        times: list[float] = []
        values: dict[str, float] = {}
        for step in range(steps + 1):
            started = time.perf_counter()
            values, _ = trainer.step(step)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        trainable = sum(parameter.numel() for parameter in trainer.factors.values())
    peak = peak_memory_bytes(accelerator.device)
    step_s = statistics.median(times[1:])
    return {
        "tool": "gptoss-train",
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "dtype": recipe.model.dtype,
        "experts": recipe.model.experts,
        "recompute": recipe.train.recompute,
        "seq": shape.seq,
        "batch": shape.batch,
        "pack": shape.pack,
        "loss_fraction": shape.loss_fraction,
        "rank": recipe.lora.rank,
        "trainable": trainable,
        "step_s": round(step_s, 4),
        "tokens_per_s": round(shape.seq * shape.batch / step_s, 1),
        "tflops": round(values["train/tflops"] * times[-1] / step_s, 3),
        "mfu": round(values["train/mfu"] * times[-1] / step_s, 4) if "train/mfu" in values else None,
        "peak_gb": round(peak / 1e9, 2),
        "planned_gb": round(_planned(recipe, opened.config, shape, resident) / 1e9, 2),
    }


def _planned(recipe: Recipe, config: ModelConfig, shape: Shape, resident: int) -> float:
    """Return the peak that `gptoss-train plan` predicts: tensors of a GPU, or all that is resident on a CPU."""
    documents = [shape.seq] * shape.pack
    labels = shape.pack * round(shape.seq * shape.loss_fraction)
    gpu = recipe.model.device != "cpu" and torch.cuda.is_available()
    workload = Workload(documents, labels, None, None, shape.loss_fraction)
    need = need_of(recipe, config, workload, gpu=gpu, resident=resident)
    return need.step.device if gpu else need.device


def synthetic(config: ModelConfig, shape: Shape, steps: int) -> Dataset:
    """Return random samples for so many steps, with `shape.seq` inputs each."""
    generator = torch.Generator().manual_seed(0)
    size = (steps * shape.batch, shape.seq + 1)
    ids = torch.randint(0, min(config.vocab_size, 199998), size, generator=generator, dtype=torch.int32)
    channels = torch.zeros(shape.seq + 1, dtype=torch.uint8)
    channels[shape.seq + 1 - round(shape.seq * shape.loss_fraction) :] = CHANNELS.index("final") + 1
    return Dataset([Sample(row, channels) for row in ids], Report("synthetic"), "")
