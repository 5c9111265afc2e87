"""An engine whose layers and sampler are Triton kernels, in the interpreter, against the model in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_config, write_tiny
from generation_probes import slopes
from interpreter import interpreted
from torch import Tensor

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.engine import Engine, print_once

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
CONFIG = tiny_config(num_hidden_layers=2, num_local_experts=3)  # a sliding layer, of window 16, and a full one
SMALL = {"page_tokens": 16, "step_tokens": 64, "cache_tokens": 1024}


class Said(NamedTuple):
    texts: list[list[int]]  # prompt and completion of every sample
    logprobs: Tensor  # (samples, tokens)
    calls: list[int]  # of attention, and those that read what several sequences share once


def said(checkpoint: Path, prompts: list[list[int]], n: int = 1, **fields: object) -> Said:
    ids, logprobs, calls = interpreted(
        "generation_probes", "generate", str(checkpoint), prompts, {"n": n, **fields}, SMALL
    )
    texts = [[*prompts[i // n], *completion] for i, completion in enumerate(ids.tolist())]
    return Said(texts, logprobs, calls.tolist())


def judged(checkpoint: Path, dtype: torch.dtype, texts: list[list[int]], count: int) -> Tensor:
    """Log-probabilities (samples, count, V) that whole forwards of the plain model give at the last `count` places."""
    model = gi.load(checkpoint, device="cpu", dtype=dtype)
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text[:-1]]))[0, -count:].float().log_softmax(-1) for text in texts])


def assert_as_near_as_bf16(checkpoint: Path, got: Said) -> Tensor:
    """Return what fp32 says. No more roundings than in plain bf16, but in other places: of few numbers' chance, twice
    its error is allowed. A wrong key, page or angle is off by the spread of log-probabilities."""
    count = got.logprobs.shape[1]
    ids = torch.tensor([text[-count:] for text in got.texts])[..., None]
    exact, rounded = (judged(checkpoint, dtype, got.texts, count) for dtype in (torch.float32, torch.bfloat16))
    expected = exact.gather(2, ids).squeeze(2)
    error = (got.logprobs - expected).square().mean().sqrt()
    assert 0 < error <= 2 * (rounded.gather(2, ids).squeeze(2) - expected).square().mean().sqrt()
    assert error < exact.std() / 20
    return exact


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_tokens_by_kernels_are_the_likeliest_of_the_plain_model(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    got = said(checkpoint, prompts(18, 1), max_tokens=2)
    exact = assert_as_near_as_bf16(checkpoint, got)
    assert (exact.amax(-1) - got.logprobs).abs().max() < exact.std() / 20
    assert got.calls == [4, 0]  # two layers, in the step of the prompts and in the one behind it


@pytest.mark.exhaustive
@pytest.mark.slow
def test_samples_by_kernels_have_the_plain_models_probabilities_whatever_is_cut_batched_or_shared(
    tmp_path: Path,
) -> None:
    """A prompt longer than a step, one token, a window and more; the first one's two samples share 128 tokens."""
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    got = said(checkpoint, prompts(135, 1, 40), 2, max_tokens=4, temperature=1.0, top_p=0.95, seed=3)
    assert_as_near_as_bf16(checkpoint, got)
    assert got.texts[0] != got.texts[1]
    assert got.calls[1] >= 3  # the full layer, in every step in which both are decoded


def test_a_step_whose_tables_stay_in_place_and_have_empty_slots_says_what_any_step_says(tmp_path: Path) -> None:
    """Three sequences in four slots; one of them grows from two pages to three, beyond the window, meanwhile."""
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    plain, static, sizes = interpreted(
        "generation_probes", "decoded_in_slots", str(checkpoint), prompts(31, 1, 5), 3, SMALL
    )
    assert torch.equal(plain, static)
    assert sizes.tolist() == [2]


def test_gradients_of_a_model_by_kernels_are_as_near_to_fp32_as_those_of_plain_bf16(tmp_path: Path) -> None:
    checkpoint = str(write_tiny(tmp_path / "base", CONFIG))
    input_ids = torch.tensor(prompts(54))
    positions = torch.cat([torch.arange(n) for n in (33, 1, 20)])[None]
    exact, rounded = (slopes(checkpoint, dtype, input_ids, positions) for dtype in (torch.float32, torch.bfloat16))
    got = interpreted("generation_probes", "slopes_by_kernels", checkpoint, input_ids, positions)
    assert got.shape == exact.shape
    assert 0 < (got - exact).norm() <= 1.2 * (rounded - exact).norm()
    assert not torch.equal(got, rounded)


def test_pages_that_kernels_cannot_take_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(d: int, dtype: torch.dtype, tokens: int = 64) -> str | None:
        return kernels.why_not_paged(torch.empty(1, 2, tokens, d, dtype=dtype))

    assert why_not(64, torch.bfloat16) == "the model is on cpu"
    monkeypatch.setattr(kernels, "why_no_triton", lambda x: None)
    assert why_not(64, torch.bfloat16) is None
    assert why_not(24, torch.bfloat16) == (
        "there is no kernel for heads of size 24 in torch.bfloat16, in pages of 64 tokens"
    )
    assert why_not(64, torch.float32) is not None
    assert why_not(64, torch.bfloat16, tokens=8) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")
def test_on_a_gpu_an_engine_takes_all_kernels_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    print_once.cache_clear()
    engine = Engine.from_checkpoint(str(checkpoint), device="cuda", dtype=torch.bfloat16)
    assert engine.cache.why_no_kernels is None
    printed = capsys.readouterr().err
    assert "attention: Triton kernels" in printed
    assert "experts: Triton kernels" in printed
    params = gi.SamplingParams(max_tokens=8, temperature=1.0, n=2, logprobs=True, stop_token_ids=())
    texts = prompts(135, 1, 40)
    done = list(engine.generate(texts, params))
    logprobs = torch.tensor([c.logprobs for c in done])
    got = Said([[*texts[c.prompt_index], *c.token_ids] for c in done], logprobs, [])
    assert_as_near_as_bf16(checkpoint, got)
