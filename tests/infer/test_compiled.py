"""The compiled model against the PyTorch one over the same cache, against transformers, and itself in other batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import random_adapter, tiny_config, write_tiny
from oracles import transformers_model
from torch import Tensor

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.adapter import Target
from gptoss_infer.compiled import CompiledModel
from gptoss_infer.engine import Engine, SamplingParams
from gptoss_infer.lora import load_adapter
from gptoss_infer.model import GptOss
from gptoss_infer.pages import Step
from gptoss_infer.scheduler import Chunk

CASES: dict[str, dict] = {
    "groups_of_4": {},
    "groups_of_8": {"num_attention_heads": 16, "num_experts_per_tok": 4},
    "groups_of_3": {"num_attention_heads": 9, "num_key_value_heads": 3, "num_experts_per_tok": 1},
    "no_multiple_of_16": {"hidden_size": 96, "intermediate_size": 32, "head_dim": 24, "num_local_experts": 3},
}
WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "router")

if kernels.cpu_kernels() is None:
    pytest.skip("no compiled kernels here; the line above says why", allow_module_level=True)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def logits_of(engine: Engine, texts: list[list[int]], *, compiled: bool, known: int = 1) -> list[Tensor]:
    """What the engine's model says after each text cut after `known` and more tokens, taught the text, (T, V) each."""
    params = SamplingParams(max_tokens=200, stop_token_ids=())
    samples = engine.add([text[:known] for text in texts], params)
    found: list[list[Tensor]] = [[] for _ in texts]
    while samples_left := [s for s in samples if s.finish_reason is None]:
        chunks = engine.scheduler.plan()
        ending = [chunk.sequence for chunk in chunks if chunk.reaches_end]
        with torch.inference_mode():
            logits = _compiled(engine, chunks) if compiled else _plain(engine, chunks)
        engine.scheduler.advance(chunks)
        for sequence, row in zip(ending, logits, strict=True):
            index = next(i for i, sample in enumerate(samples) if sample is sequence)
            found[index].append(row)
            if len(sequence.tokens) == len(texts[index]):
                samples[index].finish_reason = "stop"
                engine.scheduler.remove(sequence)
            else:
                sequence.tokens.append(texts[index][len(sequence.tokens)])
        assert samples_left
    engine.scheduler.forget_prefixes()
    return [torch.stack(rows) for rows in found]


def _compiled(engine: Engine, chunks: list[Chunk]) -> Tensor:
    assert engine.compiled is not None, "the engine would not run compiled kernels here"
    return engine.compiled.logits(engine.compiled.hidden(chunks))


def _plain(engine: Engine, chunks: list[Chunk]) -> Tensor:
    step = Step(engine.cache, chunks, engine.model.device)
    hidden = engine.model.hidden(step.input_ids[None], step.positions[None], step)[0]
    rows = [row for row, chunk in zip(step.last_rows, chunks, strict=True) if chunk.reaches_end]
    return engine.model.lm_head(hidden[rows]).float()


@pytest.fixture(params=CASES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", tiny_config(**CASES[request.param]))


def test_logits_after_prompts_and_after_every_token_are_those_of_transformers(directory: Path) -> None:
    texts = prompts(150, 131, 70, 101)  # beyond window (16), pages and YaRN's original context (64)
    model = gi.load(directory, device="cpu", dtype=torch.float32)
    engine = Engine(model, page_tokens=16, step_tokens=64)
    oracle = transformers_model(directory)
    for text, logits in zip(texts, logits_of(engine, texts, compiled=True, known=60), strict=True):
        with torch.no_grad():
            expected = oracle(input_ids=torch.tensor([text])).logits[0, 59:]
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_adapter_on_everything_gives_the_logits_of_the_model_in_pytorch(directory: Path) -> None:
    model = gi.load(directory, device="cpu", dtype=torch.float32)
    targets = [Target(layer, weight) for layer in range(model.config.num_hidden_layers) for weight in WEIGHTS]
    texts = prompts(40, 25)
    before = logits_of(Engine(model, page_tokens=16), texts, compiled=True)
    load_adapter(model, random_adapter(model.config, targets))
    engine = Engine(model, page_tokens=16)
    plain, compiled = (logits_of(engine, texts, compiled=kind) for kind in (False, True))
    for got, expected, old in zip(compiled, plain, before, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (got - old).abs().max() > 0.1 * expected.abs().max(), "the adapter does nothing"


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> GptOss:
    return gi.load(write_tiny(tmp_path / "base", tiny_config()), device="cpu", dtype=request.param)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_logits_are_the_same_bits_alone_and_among_others_whatever_the_steps_and_threads(model: GptOss) -> None:
    texts = prompts(90, 3, 47, 64, 65, 17, 33)
    crowd = logits_of(Engine(model, page_tokens=16, step_tokens=48), texts, compiled=True, known=20)
    torch.set_num_threads(1)
    for text, expected in zip(texts, crowd, strict=True):
        (alone,) = logits_of(Engine(model, page_tokens=16, step_tokens=1024), [text], compiled=True, known=20)
        assert torch.equal(alone, expected)


def test_bf16_errs_no_more_than_transformers_in_bf16(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "base", tiny_config())
    texts = prompts(120, 119, 118, 117, 116, 115)
    oracle = transformers_model(directory)
    with torch.no_grad():
        exact = torch.cat([oracle(input_ids=torch.tensor([text])).logits[0] for text in texts])
        oracle.bfloat16()
        theirs = torch.cat([oracle(input_ids=torch.tensor([text])).logits[0].float() for text in texts])
    model = gi.load(directory, device="cpu", dtype=torch.bfloat16)
    ours = torch.cat(logits_of(Engine(model), texts, compiled=True))
    errors = [(logits - exact).abs() for logits in (ours, theirs)]
    mean, high = ([f(error) for error in errors] for f in (torch.mean, lambda e: e.flatten()[::7].quantile(0.99)))
    assert mean[0] <= mean[1]
    assert high[0] <= high[1]


def test_an_engine_without_kernels_gives_the_same_greedy_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gi.load(write_tiny(tmp_path / "base", tiny_config()), device="cpu", dtype=torch.float32)
    texts, params = prompts(70, 1, 30), SamplingParams(max_tokens=40, stop_token_ids=())
    with_kernels = [one.token_ids for one in Engine(model, page_tokens=16).generate(texts, params)]
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    engine = Engine(model, page_tokens=16)
    assert engine.compiled is None
    assert [one.token_ids for one in engine.generate(texts, params)] == with_kernels


def test_dense_experts_are_run_by_pytorch_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_tiny(tmp_path / "base", tiny_config(), experts="bf16")
    model = gi.load(directory, device="cpu", dtype=torch.float32, experts="bf16")
    with caplog.at_level(logging.WARNING):
        engine = Engine(model)
    assert engine.compiled is None
    assert len(caplog.messages) == 1
    assert "dense" in caplog.messages[0]
    assert CompiledModel.of(model.double(), engine.cache) is None  # fp64: not offered, and nothing to say
