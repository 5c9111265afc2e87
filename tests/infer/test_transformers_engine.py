"""transformers behind the engine's interface: the same tokens as transformers' own loop and as our engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from oracles import transformers_model

import gptoss_infer as gi
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.engine import Completion, Engine, SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.transformers_engine import TransformersEngine

GREEDY = SamplingParams(max_tokens=24, stop_token_ids=())
SAMPLED = replace(GREEDY, temperature=1.0, seed=3, n=3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("transformers") / "base", tiny_config())


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> TransformersEngine:
    return TransformersEngine.from_checkpoint(str(checkpoint), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Engine:
    return Engine(gi.load(checkpoint, device="cpu", dtype=torch.float32))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def tokens(completions: Iterator[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def test_greedy_tokens_are_those_of_transformers_own_loop(checkpoint: Path, theirs: TransformersEngine) -> None:
    oracle = transformers_model(checkpoint)
    for prompt, found in zip(prompts(140, 3), tokens(theirs.generate(prompts(140, 3), GREEDY)), strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert found == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, top_p=0.9, top_k=50, logprobs=True)])
def test_prompts_of_any_length_give_the_engines_tokens_for_the_same_seeds(
    theirs: TransformersEngine, ours: Engine, params: SamplingParams
) -> None:
    ragged = prompts(150, 17, 1, 64)
    expected = list(ours.generate(ragged, params))
    found = list(theirs.generate(ragged, params))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [(c.prompt_index, c.sample_index) for c in found] == [(c.prompt_index, c.sample_index) for c in expected]
    for one, other in zip(found, expected, strict=True):
        # float32 logits of about unit size through 3 layers: 2^-24 times some hundred additions
        assert one.logprobs is other.logprobs or one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_sample_does_not_depend_on_its_batch(theirs: TransformersEngine) -> None:
    many = prompts(30, 80, 5)
    expected = tokens(theirs.generate(many, SAMPLED))
    for max_batch in (1, 2):
        assert tokens(TransformersEngine(theirs.model, max_batch=max_batch).generate(many, SAMPLED)) == expected


def test_each_sample_ends_at_its_own_stop_token_or_limit(theirs: TransformersEngine) -> None:
    many = prompts(40, 12, 9)
    free = tokens(theirs.generate(many, GREEDY))
    stop = next(token for i, token in enumerate(free[0]) if i >= 3 and token not in free[0][:i])
    params = [replace(GREEDY, stop_token_ids=(stop,)), replace(GREEDY, max_tokens=2), GREEDY]
    first, second, third = theirs.generate(many, params)
    assert (first.token_ids, first.finish_reason) == (free[0][: free[0].index(stop) + 1], "stop")
    assert (second.token_ids, second.finish_reason) == (free[1][:2], "length")
    assert (third.token_ids, third.finish_reason) == (free[2], "length")


def test_a_model_that_stops_by_itself_does_so_only_where_asked(checkpoint: Path, theirs: TransformersEngine) -> None:
    (prompt,) = prompts(20)
    (free,) = tokens(theirs.generate([prompt], GREEDY))
    theirs.model.generation_config.eos_token_id = free[4]
    try:
        assert tokens(theirs.generate([prompt], GREEDY)) == [free]
    finally:
        theirs.model.generation_config.eos_token_id = None


def test_a_bf16_checkpoint_loads_and_the_original_layout_is_refused_with_the_cure(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "dense", tiny_config(), "bf16")
    engine = TransformersEngine.from_checkpoint(str(dense), device="cpu", dtype=torch.float32)
    expected = Engine.from_checkpoint(str(dense), device="cpu", dtype=torch.float32).generate(prompts(20), GREEDY)
    assert tokens(engine.generate(prompts(20), GREEDY)) == tokens(expected)
    base = write_tiny(tmp_path / "base", tiny_config())
    convert(base, tmp_path / "original", "original")
    with pytest.raises(UsageError, match="convert it --to hf"):
        TransformersEngine.from_checkpoint(str(tmp_path / "original"))


def test_a_prompt_that_cannot_be_run_is_refused(theirs: TransformersEngine) -> None:
    with pytest.raises(UsageError, match=r"prompt 0 holds token ids outside 0\.\.511"):
        next(theirs.generate([[512]], GREEDY))
