"""The engine against full forwards without a cache, and its samples against the distributions they are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny

import gptoss_infer as gi
from gptoss_infer import engine as engine_module
from gptoss_infer.engine import Engine, SamplingParams, draw
from gptoss_infer.errors import UsageError
from gptoss_infer.model import GptOss

GREEDY = SamplingParams(max_tokens=24, stop_token_ids=())
SAMPLED = replace(GREEDY, temperature=1.0, seed=3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which on a busy machine mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    directory = write_tiny(tmp_path_factory.mktemp("engine") / "base", tiny_config())
    return gi.load(directory, device="cpu", dtype=torch.float32)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def full_logits(model: GptOss, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(tokens, V): what a forward without a cache says about each token of the completion."""
    with torch.no_grad():
        return model(torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]


def test_greedy_tokens_are_the_argmax_of_a_full_forward_for_prompts_of_different_length(model: GptOss) -> None:
    ragged = prompts(1, 90, 40, 17, 5)  # shorter and longer than the window of 16 and YaRN's original context of 64
    for prompt, completion in zip(ragged, Engine(model).generate(ragged, GREEDY), strict=True):
        assert len(completion.token_ids) == 24
        assert completion.token_ids == full_logits(model, prompt, completion.token_ids).argmax(-1).tolist()


def test_prompts_longer_than_a_prefill_chunk_give_the_same_tokens(
    model: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    ragged = prompts(70, 33, 32, 31, 1)
    whole = [completion.token_ids for completion in Engine(model).generate(ragged, GREEDY)]
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK_TOKENS", 16)
    assert [completion.token_ids for completion in Engine(model).generate(ragged, GREEDY)] == whole


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_raw_distribution_in_a_full_forward(model: GptOss, temperature: float) -> None:
    ragged = prompts(60, 3)
    params = replace(SAMPLED, temperature=temperature, top_p=0.9, logprobs=True)
    for prompt, completion in zip(ragged, Engine(model).generate(ragged, params), strict=True):
        expected = full_logits(model, prompt, completion.token_ids).log_softmax(-1)
        expected = expected[torch.arange(24), completion.token_ids]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_logprobs_are_absent_unless_asked_for(model: GptOss) -> None:
    (completion,) = Engine(model).generate(prompts(3), GREEDY)
    assert completion.logprobs is None


def test_samples_depend_neither_on_batch_size_nor_on_neighbours(model: GptOss) -> None:
    mine = prompts(20)[0]
    alone = next(Engine(model, max_batch=1).generate([mine], SAMPLED)).token_ids
    crowd = [*prompts(80, 2), mine, *prompts(35, 50)]
    for max_batch in (1, 2, 3, 8):
        together = list(Engine(model, max_batch=max_batch).generate(crowd, SAMPLED))
        assert together[2].token_ids == alone, max_batch


def test_a_neighbour_that_ends_early_changes_nothing_for_the_others(model: GptOss) -> None:
    ragged = prompts(30, 12, 44)
    expected = [completion.token_ids for completion in Engine(model).generate(ragged, SAMPLED)]
    params = [replace(SAMPLED, max_tokens=tokens) for tokens in (24, 2, 9)]
    got = [completion.token_ids for completion in Engine(model).generate(ragged, params)]
    assert got == [expected[0], expected[1][:2], expected[2][:9]]


def test_n_samples_differ_and_the_same_seed_gives_them_again(model: GptOss) -> None:
    params = replace(SAMPLED, n=4)
    first = list(Engine(model).generate(prompts(10), params))
    again = list(Engine(model, max_batch=3).generate(prompts(10), params))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({tuple(c.token_ids) for c in first}) == 4
    other = next(Engine(model).generate(prompts(10), replace(SAMPLED, seed=99)))
    assert other.token_ids != first[0].token_ids


def test_sample_i_of_n_is_the_single_sample_of_seed_plus_i(model: GptOss) -> None:
    many = list(Engine(model).generate(prompts(10), replace(SAMPLED, n=3)))
    for i, completion in enumerate(many):
        (single,) = Engine(model).generate(prompts(10), replace(SAMPLED, seed=SAMPLED.seed + i))
        assert single.token_ids == completion.token_ids


def test_completions_come_in_prompt_order_n_each(model: GptOss) -> None:
    completions = list(Engine(model, max_batch=4).generate(prompts(3, 9, 5), replace(SAMPLED, max_tokens=2, n=3)))
    assert [(c.prompt_index, c.sample_index) for c in completions] == [(p, s) for p in range(3) for s in range(3)]


def test_a_stop_token_ends_the_sample_and_is_part_of_it(model: GptOss) -> None:
    (prompt,) = prompts(10)
    free = next(Engine(model).generate([prompt], GREEDY)).token_ids
    stop = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    (completion,) = Engine(model).generate([prompt], replace(GREEDY, stop_token_ids=(511, stop)))
    assert completion.token_ids == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"


def test_max_tokens_and_the_end_of_the_context_end_a_sample_by_length(model: GptOss) -> None:
    context = model.config.max_position_embeddings
    assert context == 512
    completions = Engine(model).generate(prompts(8, context - 2), replace(GREEDY, max_tokens=5))
    assert [(len(c.token_ids), c.finish_reason) for c in completions] == [(5, "length"), (2, "length")]


def test_a_stop_token_at_the_last_place_counts_as_stop(model: GptOss) -> None:
    (prompt,) = prompts(10)
    free = next(Engine(model).generate([prompt], GREEDY)).token_ids
    params = replace(GREEDY, max_tokens=1, stop_token_ids=(free[0],))
    assert next(Engine(model).generate([prompt], params)).finish_reason == "stop"


def test_streaming_yields_the_tokens_that_generate_returns(model: GptOss) -> None:
    (prompt,) = prompts(25)
    (completion,) = Engine(model).generate([prompt], SAMPLED)
    assert list(Engine(model).stream(prompt, SAMPLED)) == completion.token_ids


def test_a_bf16_checkpoint_and_bf16_activations_generate(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "dense", tiny_config(), "bf16")
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine.from_checkpoint(str(directory), device="cpu", dtype=dtype)
        (completion,) = engine.generate(prompts(20), GREEDY)
        assert len(completion.token_ids) == 24


def frequencies(probabilities: list[float], *, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Shares of 4,000 draws; the standard deviation of a share is below 0.008."""
    logits = torch.tensor(probabilities).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(probabilities))
    for _ in range(4000):
        counts[draw(logits, temperature, top_p, generator)] += 1
    return counts / 4000


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [0, 1, 0, 0]),
        (0.49, [0, 1, 0, 0]),
        (0.51, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
        (0.74, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
        (0.76, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        (0.91, [0.15, 0.5, 0.1, 0.25]),
        (1.0, [0.15, 0.5, 0.1, 0.25]),
    ],
)
def test_the_nucleus_is_the_smallest_set_of_likely_tokens_that_reaches_top_p(
    top_p: float, expected: list[float]
) -> None:
    got = frequencies([0.15, 0.5, 0.1, 0.25], top_p=top_p)
    assert got.tolist() == pytest.approx(expected, abs=0.03)  # 4 standard deviations
    assert all(share == 0 for share, wanted in zip(got.tolist(), expected, strict=True) if wanted == 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.1, 0.25])
    expected = probabilities ** (1 / temperature)
    got = frequencies(probabilities.tolist(), temperature=temperature)
    assert got.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)


def test_temperature_0_takes_the_most_likely_token_whatever_top_p_says() -> None:
    assert frequencies([0.15, 0.5, 0.1, 0.25], temperature=0, top_p=0.1).tolist() == [0, 1, 0, 0]


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    got = frequencies([0.0, 0.5, 0.0, 0.5])
    assert got[0] == got[2] == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[]], "prompt 0 is empty"),
        ([[1], [512]], r"prompt 1 holds token ids outside 0\.\.511"),
        ([[-1]], "prompt 0 holds token ids outside"),
        ([[1] * 512], "prompt 0 has 512 tokens; the context holds 512"),
    ],
    ids=["empty", "too large", "negative", "too long"],
)
def test_a_prompt_that_cannot_be_run_is_refused_with_its_number(
    model: GptOss, bad: list[list[int]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        list(Engine(model).generate(bad, GREEDY))


def test_parameters_that_mean_nothing_are_refused(model: GptOss) -> None:
    for change in (
        {"max_tokens": 0},
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ):
        with pytest.raises(UsageError, match="must be"):
            SamplingParams(**change)
    with pytest.raises(UsageError, match="2 prompts but 1 sampling parameters"):
        list(Engine(model).generate(prompts(3, 3), [GREEDY]))
