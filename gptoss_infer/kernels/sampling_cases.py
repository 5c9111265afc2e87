"""In which forms the sampler's kernels are launched, and how they are checked on a GPU; see `cases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton

from gptoss_infer import sampling
from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import sampling as kernel
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.plans import Tile
from gptoss_infer.sampling import Draws


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for gpt-oss: 201,088 ids, with and without a mask."""
    kinds = dict.fromkeys(("temperature", "top_p", "min_p", "lowest", "tops", "sums", "raw_tops", "raw_sums"), "*fp32")
    kinds |= dict.fromkeys(("top_k", "seed", "request", "sample", "position", "chosen"), "*i64")
    kinds |= {"allowed": "*i32", "last": "*i32", "near": "*i32", "logprobs": "*fp32", "num_chunks": "i32"}
    kinds |= {"size": "i32", "stride_logits": "i32", "stride_allowed": "i32"}
    forms: list[tuple[str, triton.JITFunction, Tile, dict[str, object]]] = [
        ("statistics", kernel.statistics_kernel, kernel.STATISTICS, {"AGAIN": False, "CHUNK": kernel.CHUNK}),
        ("statistics again", kernel.statistics_kernel, kernel.STATISTICS, {"AGAIN": True, "CHUNK": kernel.CHUNK}),
        ("threshold", kernel.threshold_kernel, kernel.THRESHOLD, {"BLOCKS": 4096, "SEARCHED": kernel.SEARCHED}),
        ("select", kernel.select_kernel, kernel.SELECT, {"BLOCKS": 4096, "CHUNKS": 64}),
    ]
    return [
        Case(
            f"sampling {name}, {logits}{', masked' if mask else ''}",
            function,
            (signature := {
                n: (kinds | {"logits": f"*{logits}"})[n]
                for n in function.arg_names if n not in constants and (mask or n != "allowed")
            }),
            constants | ({} if mask else {"allowed": None}),
            aligned=[n for n, kind in signature.items() if kind[0] == "*" or n in ("size", "stride_logits")],
            options=tile.options,
            keeps_subnormals=False,
        )
        for name, function, tile, constants in forms
        for logits, mask in (("fp32", False), ("bf16", True))
    ]  # fmt: skip


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield the log-probabilities of what is drawn, in batches of so many rows up to 256; another id has another."""
    generator = torch.Generator(device).manual_seed(0)
    for count in sorted({min(count, 256) for count in tokens}):
        logits = 3 * torch.randn(count, config.vocab_size, generator=generator, device=device)
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("warm", 1.0, 0, 1.0),
            ("top-k", 1.0, 50, 0.9),
        ):
            numbers = torch.arange(count, device=device)
            draws = Draws(
                torch.full((count,), temperature, device=device), torch.full_like(numbers, top_k),
                torch.full((count,), top_p, device=device), torch.zeros(count, device=device),
                numbers * 0, numbers, numbers * 0, numbers * 0,
            )  # fmt: skip
            yield Check(
                f"sample {count} rows, {name}",
                [partial(kernel.sample, logits, draws)],
                partial(sampling.sample, logits, draws),
                1e-4,
                moved_bytes=float(logits.nbytes),
                compared=lambda drawn: drawn[1],
            )
