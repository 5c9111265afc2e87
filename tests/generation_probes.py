"""A whole model the way of a GPU, for the interpreter's worker: generation, and gradients, by Triton kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.engine import Engine, SamplingParams, draw_next
from gptoss_infer.graphs import Graphs
from gptoss_infer.model import MoE
from gptoss_infer.page_tables import Batch
from gptoss_infer.tiled import tile_layer


def slopes(checkpoint: str, dtype: torch.dtype, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Gradients of the mean log-sum-exp of logits to everything in the attention blocks, (parameters,), in fp32."""
    model = gi.load(Path(checkpoint), device="cpu", dtype=dtype).requires_grad_(False)
    wanted = [p.requires_grad_(True) for name, p in model.named_parameters() if "self_attn" in name]
    model(input_ids, positions).float().logsumexp(-1).mean().backward()
    return torch.cat([p.grad.float().flatten() for p in wanted if p.grad is not None])


def slopes_by_kernels(checkpoint: str, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The same in bf16, the way of a GPU."""
    with patch.object(kernels, "why_no_triton", lambda x: None):
        return slopes(checkpoint, torch.bfloat16, input_ids, positions)


def decoded_in_slots(checkpoint: str, prompts: list[list[int]], steps: int, options: dict) -> tuple[Tensor, ...]:
    """Logits (steps, prompts, V) of decoding by tables of a step's own, then by tables in place, and how many sizes of
    those were used; greedy tokens of the former are fed to both."""
    model = gi.load(Path(checkpoint), device="cpu", dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, MoE):
            module.tiled = tile_layer(module)
    plain, static = [], []
    with patch.object(kernels, "why_no_triton", lambda x: None), torch.inference_mode():
        engine = Engine(model, **options)
        graphs = Graphs(model, engine.cache, record=lambda run: run)
        samples = engine.add(prompts, SamplingParams(max_tokens=steps + 1, stop_token_ids=()))
        while not all(one.token_ids for one in samples):
            engine.step()
        for _ in range(steps):
            chunks = engine.scheduler.plan()
            logits = graphs.logits(chunks)
            assert logits is not None, "a step that decodes has a graph"
            static.append(logits.clone())  # written to the same pages as by the step below
            plain.append(engine._logits(chunks, None))
            engine.scheduler.advance(chunks)
            draw_next(samples, plain[-1])
    return torch.stack(plain), torch.stack(static), torch.tensor([len(graphs._recorded)])


def generate(checkpoint: str, prompts: list[list[int]], fields: dict, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (samples, tokens), their log-probabilities, and (calls of attention, those that shared keys).

    `fields` are of SamplingParams, `options` of Engine.
    """
    model = gi.load(Path(checkpoint), device="cpu", dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, MoE):
            module.tiled = tile_layer(module)
    shared: list[bool] = []
    attend = kernels.attend_paged

    def counted(*arguments: Any, window: int | None) -> Tensor:
        batch: Batch = arguments[-1]
        shared.append(batch.shared is not None)
        return attend(*arguments, window=window)

    with patch.object(kernels, "why_no_triton", lambda x: None), patch.object(kernels, "attend_paged", counted):
        engine = Engine(model, **options)
        assert engine.compiled is None, "experts in tiles are compiled for no CPU"
        done = list(engine.generate(prompts, SamplingParams(**fields, logprobs=True, stop_token_ids=())))
    calls = torch.tensor([len(shared), sum(shared)])
    return torch.tensor([c.token_ids for c in done]), torch.tensor([c.logprobs for c in done]), calls
