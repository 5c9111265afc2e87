"""`gptoss-infer bench`: how fast prompts are read and tokens generated, and what share of the machine that is.

Random prompts, greedy, no early stop, by the engine itself. Every case is the best of some rounds, as a machine has
bad moments and no good ones. Shares are of what `gptoss_infer.roofline` measures just before on the same device.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from gptoss_infer import roofline
from gptoss_infer.checkpoint.reader import Checkpoint, resolve
from gptoss_infer.config import ModelConfig, parse_config, published, read_json
from gptoss_infer.engine import Engine, SamplingParams, form_for
from gptoss_infer.errors import UsageError
from gptoss_infer.experts import ExpertLinear
from gptoss_infer.loading import load, pick_device, show_progress
from gptoss_infer.model import GptOss, RMSNorm
from gptoss_infer.tiled import tile_experts

SHAPES = ("20b", "120b")
SCALES = (118, 122)  # bytes of random MXFP4 scales: weights of about 0.01 to 0.1


class Case(NamedTuple):
    """What is timed."""

    batch: int
    prompt: int
    new: int


def bench(model: GptOss, cases: Sequence[Case], rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Yield one line of results per case."""
    dtype = model.lm_head.weight.dtype
    peak = roofline.measure_peak(model.device, dtype)
    if model.device.type == "cuda":
        print(tile_experts(model), file=sys.stderr)
    for case in cases:
        tokens = case.batch * (case.prompt + case.new + 64)
        engine = Engine(model, max_batch=case.batch, cache_tokens=tokens)
        timed = [_time(engine, case, number) for number in range(rounds)]
        prefill, decode = min(one.prefill_s for one in timed), min(timed, key=lambda one: one.decode_s)
        step = decode.decode_s / decode.steps
        needed = roofline.decode_bytes(model, case.batch, case.prompt + case.new // 2)
        flops = case.batch * roofline.prefill_flops(model.config, case.prompt)
        yield {
            "tool": "gptoss_infer",
            "device": model.device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "experts": next(m.format for m in model.modules() if isinstance(m, ExpertLinear)),
            "threads": torch.get_num_threads(),
            **case._asdict(),
            "prefill_tokens_per_s": round(case.batch * case.prompt / prefill, 1),
            "decode_tokens_per_s": round(decode.tokens / decode.decode_s, 2),
            "prefill_share_of_arithmetic": round(flops / prefill / peak.flops, 3),
            "decode_share_of_bandwidth": round(needed / step / peak.read_bytes_per_s, 3),
            "measured_gb_per_s": round(peak.read_bytes_per_s / 1e9, 1),
            "measured_gflops": round(peak.flops / 1e9),
            "peak_gb": round(_peak_bytes(model.device) / 1e9, 2),
        }


class _Timed(NamedTuple):
    prefill_s: float  # to all first tokens
    decode_s: float  # from there to all last ones
    steps: int  # in that time
    tokens: int  # in that time: some prompts were read before others, and had more than their first


def _time(engine: Engine, case: Case, seed: int) -> _Timed:
    """Time one round."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = engine.model.config.vocab_size
    prompts = torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator).tolist()
    engine.scheduler.forget_prefixes()
    samples = engine.add(prompts, SamplingParams(max_tokens=case.new, stop_token_ids=()))
    start = time.perf_counter()
    while not all(one.token_ids for one in samples):
        engine.step()
    first, steps = time.perf_counter(), 0
    tokens = sum(case.new - len(one.token_ids) for one in samples)
    while any(one.finish_reason is None for one in samples):
        engine.step()
        steps += 1
    return _Timed(first - start, time.perf_counter() - first, steps, tokens)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_model(
    checkpoint: str | None, shape: str | None, device: str, dtype: torch.dtype, experts: Literal["mxfp4", "bf16"] | None
) -> tuple[GptOss, float]:
    """Return a checkpoint's model, or one of random weights in a shape, and the seconds that took.

    Args:
        shape: 20b, 120b, or a file with the fields of a config.json.
        experts: None for the form that the engine would choose.
    """
    start = time.perf_counter()
    if checkpoint is not None:
        opened = Checkpoint.open(resolve(checkpoint))
        form = experts or form_for(opened, device, dtype)
        model = load(opened, device=device, dtype=dtype, experts=form, progress=show_progress())
        return model, time.perf_counter() - start
    assert shape is not None, "a checkpoint or a shape"
    model = random_model(shape_config(shape), pick_device(device), dtype)
    return model, time.perf_counter() - start


def shape_config(shape: str) -> ModelConfig:
    """Return the config that `shape` stands for."""
    if shape in SHAPES:
        return published(shape)  # type: ignore[arg-type]
    if not Path(shape).is_file():
        raise UsageError(f"--shape is {shape!r}; expected {' or '.join(SHAPES)}, or a file like a config.json")
    return parse_config(read_json(Path(shape)), shape)


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> GptOss:
    """Return a model of random weights with MXFP4 experts, each tensor made where it stays."""
    with torch.device("meta"):
        model = GptOss(config)
    for module in model.modules():
        norm = isinstance(module, RMSNorm)
        for name, meta in module.named_parameters(recurse=False):
            value = torch.empty(meta.shape, dtype=torch.float32 if norm else dtype, device=device)
            value = value.fill_(1.0) if norm else value.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(module, ExpertLinear):
            blocks, scales = (
                torch.empty(x.shape, dtype=x.dtype, device=device) for x in (module.blocks, module.scales)
            )
            blocks.flatten().view(torch.int64).random_(-(2**63), 2**63 - 1)
            module.blocks, module.scales = blocks, scales.random_(*SCALES)
    return model.eval()


def header() -> str:
    """Return the head of the table."""
    return (
        f"{'batch':>5} {'prompt':>6} {'new':>5}  {'prefill tokens/s':>16} {'of arithmetic':>13}  "
        f"{'decode tokens/s':>15} {'of bandwidth':>12}  {'peak GB':>7}"
    )


def row(result: dict[str, Any]) -> str:
    """Return a line of it."""
    return (
        f"{result['batch']:>5} {result['prompt']:>6} {result['new']:>5}  {result['prefill_tokens_per_s']:>16,.1f} "
        f"{result['prefill_share_of_arithmetic']:>13.1%}  {result['decode_tokens_per_s']:>15,.2f} "
        f"{result['decode_share_of_bandwidth']:>12.1%}  {result['peak_gb']:>7.2f}"
    )
