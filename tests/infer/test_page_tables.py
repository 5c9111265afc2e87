"""Tables of pages: the plain attention over them against a softmax written out, and what is found to be shared."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from paged import dense_rows, random_step

import gptoss_infer as gi
from gptoss_infer import page_tables
from gptoss_infer.engine import Engine, SamplingParams
from gptoss_infer.model import rotate
from gptoss_infer.page_tables import MAX_SPLITS, SPLIT_TOKENS, Held, batch_of, shared_beginnings, split_tokens
from gptoss_infer.pages import KernelStep, Step


@pytest.mark.parametrize("window", [None, 1, 20])
def test_plain_attention_over_pages_equals_the_softmax_over_the_tokens_in_them(window: int | None) -> None:
    step = random_step([(0, 1), (15, 1), (40, 1), (0, 7), (16, 20), (33, 1)], heads=(6, 2), d=8, page=16)
    q, keys, values = (x.double() for x in (step.q, step.keys, step.values))
    got = page_tables.attend(q, keys, values, step.sinks, batch_of(step.held, "cpu"), window=window)
    assert torch.allclose(got, dense_rows(step, window), atol=1e-12)


def test_parts_are_whole_pages_and_never_more_than_their_limit() -> None:
    for length in (1, 127, 128, 129, 4096, 4097, 131_072, 2**20):
        size = split_tokens(length)
        assert size % SPLIT_TOKENS == 0
        assert -(-length // size) <= MAX_SPLITS
        assert size == SPLIT_TOKENS or -(-length // (size // 2)) > MAX_SPLITS  # and not fewer than need be


def pages_of(*prompts: list[int]) -> list[list[int]]:
    return [list(prompt) for prompt in prompts]


def test_samples_of_a_prompt_share_its_whole_parts_and_no_other_sequence_does() -> None:
    prompt = list(range(100, 119))  # 304 tokens in pages of 16: two parts of 128 and a rest
    pages = pages_of([*prompt, 1], [*prompt, 2], [*prompt, 3], list(range(200, 220)))
    assert shared_beginnings(pages, [310, 312, 304, 310], 16) == [([0, 1, 2], 256)]


def test_a_part_that_holds_a_new_token_is_not_shared() -> None:
    prompt = list(range(100, 116))  # 256 tokens
    assert shared_beginnings(pages_of(prompt, prompt), [255, 255], 16) == [([0, 1], 128)]
    assert shared_beginnings(pages_of([*prompt, 1], [*prompt, 2]), [256, 256], 16) == [([0, 1], 256)]
    assert shared_beginnings(pages_of(prompt[:8], prompt[:8]), [127, 127], 16) == []


def test_of_nested_beginnings_those_are_taken_that_save_more_reading() -> None:
    system = list(range(8))  # one part
    long_a, long_b = [*system, *range(100, 116)], [*system, *range(200, 216)]  # three parts
    pages = pages_of(long_a, long_a, long_b, long_b, [*system, *range(300, 316)])
    # Two groups of two save 3 parts each; one of all five saves 4.
    assert shared_beginnings(pages, [384] * 5, 16) == [([0, 1], 384), ([2, 3], 384)]
    pages = pages_of(
        *([*system, *range(first, first + 8)] for first in range(100, 800, 100)), [*system, *range(100, 108)]
    )
    # One pair saves 2; all eight save 7.
    assert shared_beginnings(pages, [256] * 8, 16) == [(list(range(8)), 128)]


def test_sequences_whose_parts_have_another_size_share_nothing() -> None:
    prompt = list(range(300))
    assert shared_beginnings(pages_of(prompt, prompt), [4095, 4096], 16) == []
    assert shared_beginnings(pages_of(prompt, prompt), [4096, 4100], 16) == [([0, 1], 4096)]


def test_whatever_is_found_to_be_shared_is_in_the_same_pages_and_in_one_group() -> None:
    dice = random.Random(0)
    for _ in range(50):
        pages: list[list[int]] = []
        for _ in range(dice.randint(1, 12)):
            begin = dice.choice(pages)[: dice.randint(0, 40)] if pages else []
            fresh = 1 + max((page for held in pages for page in held), default=0)
            pages.append([*begin, *range(fresh, fresh + dice.randint(1, 20))])
        own = [dice.randint(16 * (len(held) - 1), 16 * len(held) - 1) for held in pages]
        groups = shared_beginnings(pages, own, 16)
        assert sorted(m for members, _ in groups for m in members) == sorted({m for ms, _ in groups for m in ms})
        for members, tokens in groups:
            assert len(members) > 1
            assert len({tuple(pages[m][: tokens // 16]) for m in members}) == 1
            for m in members:
                assert 0 < tokens <= own[m]
                assert tokens % split_tokens(own[m] + 1) == 0


def test_tables_list_decoding_sequences_and_prompts_apart_with_their_limits() -> None:
    batch = batch_of([Held([5, 6], 20, 0), Held([7], 0, 1, 9), Held([1, 2, 3], 33, 10)], "cpu", page_tokens=16)
    assert batch.decode is not None
    assert batch.prefill is not None
    assert batch.decode.pages.tolist() == [[5, 6, 0], [1, 2, 3]]
    assert batch.decode.own.tolist() == [20, 33]
    assert batch.decode.rows.tolist() == [0, 10]
    assert [x.tolist() for x in batch.prefill] == [[[7]], [0], [1], [9]]
    assert (batch.max_keys, batch.max_new, batch.shared) == (34, 9, None)


def test_both_ways_through_a_step_see_the_same_keys_whatever_the_scheduler_plans(tiny_checkpoint: Path) -> None:
    """The tables that kernels read, and the padded ones of plain PyTorch, over the same pages, in every step."""
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    config, generator = model.config, torch.Generator().manual_seed(0)
    engine = Engine(model, page_tokens=16, step_tokens=64, cache_tokens=512)
    prompts = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in (150, 1, 40)]
    samples = engine.add(prompts, SamplingParams(max_tokens=20, n=2, stop_token_ids=()))
    shared = 0
    while any(len(one.token_ids) < 20 for one in samples):
        chunks = engine.scheduler.plan()
        plain, by_tables = (kind(engine.cache, chunks, model.device) for kind in (Step, KernelStep))
        angles = torch.rand(2, len(plain.positions), config.head_dim // 2, generator=generator)
        for layer, kind in enumerate(engine.cache.kinds):
            q, k, v = (
                torch.randn(len(plain.positions), heads, config.head_dim, generator=generator)
                for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            )
            sinks, window = torch.zeros(config.num_attention_heads), config.sliding_window if kind == "window" else None
            expected = plain.attend(layer, (q, k, v), (angles[0], angles[1]), sinks, window)
            pools, batch = (engine.cache.keys[layer], engine.cache.values[layer]), by_tables.batches[kind]
            got = page_tables.attend(rotate(q, (angles[0], angles[1])), *pools, sinks, batch, window=window)
            assert torch.allclose(got, expected, atol=1e-5)
            kept = pools[1].transpose(1, 2).flatten(0, 1)[by_tables.places[kind].long()]  # (N, K, D)
            assert torch.equal(kept, v)
            shared += batch.shared is not None
        engine.scheduler.advance(chunks)
        for sample in samples:
            if sample.finish_reason is None and sample.missing == 0 and sample in engine.scheduler.running:
                sample.tokens.append(1)
                if len(sample.token_ids) == 20:
                    sample.finish_reason = "length"
                    engine.scheduler.remove(sample)
    assert shared > 10  # the first prompt's two samples, which have eight pages in common
