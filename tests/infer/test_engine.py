"""The engine against full forwards without a cache, and its samples against the distributions they are drawn from."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from oracles import transformers_model

import gptoss_infer as gi
from gptoss_infer import engine as engine_module
from gptoss_infer.engine import Engine, SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.model import GptOss

GREEDY = SamplingParams(max_tokens=24, stop_token_ids=())
SAMPLED = replace(GREEDY, temperature=1.0, seed=3)


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


def test_completions_can_be_had_in_the_order_in_which_they_end(model: GptOss) -> None:
    lengths = (24, 3, 12, 1, 7)
    params = [replace(SAMPLED, max_tokens=length) for length in lengths]
    asked = prompts(9, 70, 20, 5, 33)
    found = list(Engine(model, max_batch=5).as_completed(asked, params))
    assert [lengths[one.prompt_index] for one in found] == sorted(lengths)
    assert sorted(found, key=lambda one: one.prompt_index) == list(Engine(model).generate(asked, params))


def test_what_waits_for_a_place_joins_while_a_long_sample_goes_on(model: GptOss) -> None:
    params = [replace(GREEDY, max_tokens=length) for length in (20, 2, 2, 2, 2)]
    engine = Engine(model, max_batch=2)
    order = [one.prompt_index for one in engine.as_completed(prompts(9, 9, 9, 9, 9), params)]
    assert order == [1, 2, 3, 4, 0], "the first of two places is taken to the end, the other one four times"


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


def run(engine: Engine, many: list[list[int]], params: SamplingParams) -> list[tuple[list[int], list[float]]]:
    return [(c.token_ids, c.logprobs or []) for c in engine.generate(many, replace(params, logprobs=True))]


def all_pages_are_free(engine: Engine) -> bool:
    engine.scheduler.forget_prefixes()
    pools = engine.scheduler.full, engine.scheduler.window
    return all(pool.num_free == pool.size for pool in pools)


def test_prompts_longer_than_a_step_give_the_same_tokens(model: GptOss) -> None:
    ragged = prompts(170, 33, 32, 31, 1)
    whole = [tokens for tokens, _ in run(Engine(model), ragged, GREEDY)]
    small = Engine(model, step_tokens=16, max_batch=8, page_tokens=16)
    assert [tokens for tokens, _ in run(small, ragged, GREEDY)] == whole


def test_samples_that_share_pages_are_those_that_share_nothing(model: GptOss) -> None:
    start = prompts(100)[0]
    many = [start + end for end in prompts(1, 7, 30)]
    expected = [
        next(Engine(model).generate([prompt], replace(SAMPLED, seed=s))) for prompt in many for s in range(3, 7)
    ]
    engine = Engine(model, page_tokens=16)
    got = list(engine.generate(many, replace(SAMPLED, n=4)))
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    # 96 tokens of the beginning are whole pages. The first of 12 computes them, and what follows it once for 4.
    assert engine.scheduler.num_reused >= 11 * 96
    again = list(engine.generate(many, replace(SAMPLED, n=4)))
    assert [c.token_ids for c in again] == [c.token_ids for c in expected], "kept pages were written"


def test_a_cache_that_is_too_small_for_all_computes_samples_again_and_gives_the_same(model: GptOss) -> None:
    many = prompts(60, 50, 40, 30)
    expected = run(Engine(model), many, SAMPLED)
    engine = Engine(model, cache_tokens=176, page_tokens=16, step_tokens=64)
    got = run(engine, many, SAMPLED)
    assert engine.scheduler.num_preempted > 0
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    assert all_pages_are_free(engine)


@pytest.mark.parametrize(("dtype", "cache_tokens"), [(torch.float32, None), (torch.bfloat16, 320)])
def test_deterministic_results_are_bitwise_the_same_alone_and_among_32_others(
    tmp_path: Path, dtype: torch.dtype, cache_tokens: int | None
) -> None:
    model = gi.load(write_tiny(tmp_path / "base", tiny_config()), device="cpu", dtype=dtype)
    mine = prompts(75)[0]
    others = prompts(*range(1, 64, 2))
    params = replace(SAMPLED, max_tokens=12)
    alone = run(Engine(model, deterministic=True, page_tokens=16, step_tokens=32), [mine], params)
    options = {"page_tokens": 16, "step_tokens": 32, "max_batch": 32, "cache_tokens": cache_tokens}
    engine = Engine(model, deterministic=True, **options)
    crowd = run(engine, [*others[:16], mine, *others[16:]], params)
    assert crowd[16] == alone[0]  # tokens, and log probabilities to the last bit
    assert (engine.scheduler.num_preempted > 0) == (cache_tokens is not None)
    assert all_pages_are_free(engine)


def test_closing_a_generator_cancels_what_is_left_and_frees_its_pages(model: GptOss) -> None:
    engine = Engine(model, page_tokens=16)
    completions = engine.generate(prompts(40, 30, 20), replace(GREEDY, n=2))
    next(completions)
    completions.close()
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert all_pages_are_free(engine)


def test_a_cancelled_sample_keeps_its_tokens_and_changes_nothing_for_the_others(model: GptOss) -> None:
    engine = Engine(model)
    expected = [tokens for tokens, _ in run(engine, prompts(30, 20), SAMPLED)]
    first, second = engine.add(prompts(30, 20), SAMPLED)
    for _ in range(5):
        engine.step()
    engine.cancel([first])
    while second.finish_reason is None:
        engine.step()
    assert first.completion().finish_reason == "cancelled"
    assert first.token_ids == expected[0][:5]
    assert second.token_ids == expected[1]
    assert all_pages_are_free(engine)


def test_samples_that_come_later_join_those_that_run(model: GptOss) -> None:
    expected = [tokens for tokens, _ in run(Engine(model), prompts(30, 20), SAMPLED)]
    engine = Engine(model)
    (first,) = engine.add(prompts(30, 20)[:1], SAMPLED)
    for _ in range(7):
        engine.step()
    (second,) = engine.add(prompts(30, 20)[1:], SAMPLED)
    grown = engine.step()
    assert grown == [first, second]
    while second.finish_reason is None:
        engine.step()
    assert [first.token_ids, second.token_ids] == expected
    assert engine.step() == []


def test_a_request_that_could_outgrow_the_cache_is_refused_before_anything_is_queued(model: GptOss) -> None:
    engine = Engine(model, cache_tokens=64, page_tokens=16)
    with pytest.raises(UsageError, match="prompt 1 may grow to 74 tokens; the cache holds 64"):
        engine.add(prompts(5, 50), GREEDY)
    assert not engine.scheduler.waiting


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}, {"num_key_value_heads": 1}], ids=str)
def test_256_greedy_tokens_are_those_of_transformers(tmp_path: Path, changes: dict[str, int]) -> None:
    directory = write_tiny(tmp_path / "base", tiny_config(**changes))
    many = prompts(140, 3)
    oracle = transformers_model(directory)
    completions = Engine(gi.load(directory, device="cpu", dtype=torch.float32)).generate(
        many, replace(GREEDY, max_tokens=256)
    )
    for prompt, completion in zip(many, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False, pad_token_id=0
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_a_cache_takes_no_memory_until_it_is_used(model: GptOss) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    before = resident_bytes()
    engine = Engine(model, cache_tokens=2**22)
    held = sum(t.nbytes for t in (*engine.cache.keys, *engine.cache.values))
    assert held > 2**28
    assert resident_bytes() - before < held / 8


def test_completions_that_end_in_somebody_elses_step_are_not_waited_for(model: GptOss) -> None:
    engine = Engine(model, page_tokens=16, cache_tokens=1024)
    iterator = engine.as_completed(prompts(9, 12), [replace(GREEDY, max_tokens=n) for n in (8, 3)])
    assert next(iterator).prompt_index == 1
    list(engine.generate(prompts(5), replace(GREEDY, max_tokens=20)))
    assert [one.prompt_index for one in iterator] == [0]


def test_a_step_that_fails_while_it_draws_can_be_made_again(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [one.token_ids for one in Engine(model).generate(prompts(9, 33), SAMPLED)]
    engine, draw = Engine(model), engine_module.draw_next
    calls = []

    def failing(*arguments: object) -> None:
        calls.append(0)
        if len(calls) % 3 == 0:
            raise MemoryError
        draw(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "draw_next", failing)
    samples = engine.add(prompts(9, 33), SAMPLED)
    while any(one.finish_reason is None for one in samples):
        with suppress(MemoryError):
            engine.step()
    assert [one.token_ids for one in samples] == expected
    assert not engine.scheduler.running


@pytest.mark.parametrize("fields", [{"seed": 2**63}, {"seed": 2**63 - 1, "n": 2}, {"seed": -(2**63) - 1}])
def test_seeds_that_no_generator_holds_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must fit in 64 bits"):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_a_model_that_was_moved_under_an_engine_is_refused_and_other_dtypes_are_not_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gi.load(write_tiny(tmp_path / "base", tiny_config()), device="cpu", dtype=torch.bfloat16)
    engine = Engine(model, cache_tokens=1024)
    if engine.compiled is None:
        pytest.skip("no compiled kernels here")
    model.float()
    with pytest.raises(UsageError, match="make another engine"):
        engine.add(prompts(5), GREEDY)
    model.bfloat16()
    model.model.layers[1].mlp.router.float()
    assert Engine(model, cache_tokens=1024).compiled is None
    assert "weights of torch.bfloat16, torch.float32" in caplog.text
