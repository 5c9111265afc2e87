"""Triton attention over pages, in the interpreter: against a softmax written out row by row, and alone among others."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from paged import RandomStep, dense_rows, random_step
from torch import Tensor

from gptoss_infer import page_tables
from gptoss_infer.page_tables import Held

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")
GROUPS = [(6, 2), (8, 1)]  # groups of 3 and 8
# (keys before, new tokens) of each sequence. Pages have 16 tokens, parts 128, tiles of queries 32.
DECODE = [(0, 1), (16, 1), (127, 1), (128, 1), (260, 1)]
PREFILL = [(0, 5), (15, 33), (0, 32), (40, 3)]
MIXED = [(0, 1), (30, 20), (64, 1), (0, 40), (16, 1)]


def run(step: RandomStep, window: int | None, share: bool = False) -> Tensor:
    held = [tuple(one) for one in step.held]
    return interpreted("attention_launches", "paged", *step[1:], held, window, share)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """fp32: sums of some hundred terms, each rounded by 6e-8. bf16: weights and results are rounded by 2^-9."""
    assert got.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    assert (got.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("sequences", "window"), [(DECODE, None), (PREFILL, None), (MIXED, 18)], ids=str)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_every_row_equals_the_softmax_over_the_keys_it_sees(
    heads: tuple[int, int], sequences: list[tuple[int, int]], window: int | None
) -> None:
    step = random_step(sequences, heads=heads, d=16, page=16)
    assert_near(run(step, window), dense_rows(step, window), torch.float32)


@pytest.mark.parametrize("window", [None, 128])
def test_in_bf16_with_the_sizes_of_gpt_oss_rows_are_as_near_as_its_rounding_allows(window: int | None) -> None:
    step = random_step([(0, 1), (191, 1), (63, 30)], heads=(8, 1), d=64, page=64, dtype=torch.bfloat16)
    assert_near(run(step, window), dense_rows(step, window), torch.bfloat16)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 15, 16, 17, 128], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_length_around_pages_windows_and_parts(window: int | None, dtype: torch.dtype) -> None:
    borders = [own for border in (16, 32, 128, 256) for own in (border - 2, border - 1, border)]
    step = random_step([*((own, 1) for own in borders), (1, 2), (127, 18)], heads=(3, 1), d=16, page=16, dtype=dtype)
    assert_near(run(step, window), dense_rows(step, window), dtype)


@pytest.mark.parametrize("window", [None, 20])
def test_a_sequence_yields_the_same_bits_alone_and_among_others(window: int | None) -> None:
    step = random_step([(5, 1), (150, 1), (40, 1), (10, 37), (0, 3)], heads=(6, 2), d=16, page=16)
    together = run(step, window)
    for pages, own, row, length in step.held:
        rows = slice(row, row + length)
        alone = run(step._replace(held=[Held(pages, own, 0, length)], q=step.q[rows].contiguous()), window)
        assert torch.equal(alone, together[rows])


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("num_sequences", [1, 2, 7, 64])
def test_batches_of_any_size(num_sequences: int) -> None:
    sequences = [(37 * n % 200, 1) for n in range(num_sequences)]
    step = random_step(sequences, heads=(3, 1), d=16, page=16)
    got = run(step, None)
    assert_near(got, dense_rows(step, None), torch.float32)
    pages, own, row, _ = step.held[-1]
    alone = run(step._replace(held=[Held(pages, own, 0)], q=step.q[row : row + 1].contiguous()), None)
    assert torch.equal(alone[0], got[row])


def shared_step(dtype: torch.dtype, heads: tuple[int, int] = (6, 2)) -> RandomStep:
    """Three samples of a prompt of 300 tokens, two of one that has its first 130 in common, and one by itself."""
    step = random_step(
        [(299, 1), (301, 1), (290, 1), (270, 1), (265, 1), (140, 1)], heads=heads, d=16, page=16, dtype=dtype
    )
    pages = [list(one.pages) for one in step.held]
    pages[1][:18] = pages[2][:18] = pages[0][:18]
    pages[3][:8] = pages[0][:8]
    pages[4][:16] = pages[3][:16]
    return step._replace(held=[one._replace(pages=held) for one, held in zip(step.held, pages, strict=True)])


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_keys_that_sequences_share_are_read_once_to_the_same_result(heads: tuple[int, int]) -> None:
    step = shared_step(torch.float32, heads)
    batch = page_tables.batch_of(step.held, "cpu", page_tokens=16)
    assert batch.shared is not None
    assert batch.shared.done.tolist() == [256, 256, 256, 256, 256, 0]
    shared = run(step, None, share=True)
    assert_near(shared, dense_rows(step, None), torch.float32)
    assert (shared - run(step, None)).abs().max() <= 1e-6  # of values of about 0.1, in another order at most


def test_more_members_than_a_tile_holds_are_taken_in_turn() -> None:
    base = random_step([(130, 1)] * 12, heads=(3, 1), d=16, page=16)  # 5 members of 3 heads fit into 16 rows
    first = base.held[0].pages
    step = base._replace(held=[one._replace(pages=[*first[:8], *one.pages[8:]]) for one in base.held])
    assert_near(run(step, None, share=True), dense_rows(step, None), torch.float32)


def test_a_slot_without_a_sequence_yields_zeros_and_reads_nothing() -> None:
    step = random_step([(20, 1), (33, 1)], heads=(6, 2), d=16, page=16)
    empty = step._replace(held=[Held([0], -1, 0), step.held[1]])  # page 0 may hold NaN
    for window in (None, 16):
        got = run(empty, window)
        assert torch.equal(got[0], torch.zeros_like(got[0]))
        assert torch.equal(got[1], run(step, window)[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 128])
def test_on_a_gpu_rows_are_right_and_do_not_depend_on_the_batch(window: int | None) -> None:
    from gptoss_infer.kernels import paged_attention

    sequences = [(0, 1), (63, 1), (64, 1), (700, 1), (5000, 1), (0, 300), (129, 77)]
    step = random_step(sequences, heads=(64, 8), d=64, page=64, dtype=torch.bfloat16)
    pools = [x.cuda() for x in (step.keys, step.values, step.sinks)]

    def run_on_gpu(q: Tensor, held: list[Held]) -> Tensor:
        batch = page_tables.batch_of(held, "cuda")
        return paged_attention.paged_attention(q.cuda(), *pools, batch, window=window).cpu()

    together = run_on_gpu(step.q, step.held)
    doubled = (x.double() for x in (step.q, step.keys, step.values))
    expected = page_tables.attend(*doubled, step.sinks, page_tables.batch_of(step.held, "cpu"), window=window)
    assert_near(together, expected, torch.bfloat16)
    for pages, own, row, length in step.held:
        rows = slice(row, row + length)
        assert torch.equal(run_on_gpu(step.q[rows].contiguous(), [Held(pages, own, 0, length)]), together[rows])


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_shared_beginnings_give_the_same_up_to_rounding() -> None:
    from gptoss_infer.kernels import paged_attention

    step = shared_step(torch.bfloat16, (64, 8))
    on_gpu = [x.cuda() for x in step[1:]]
    got = paged_attention.paged_attention(*on_gpu, page_tables.batch_of(step.held, "cuda", page_tokens=16), window=None)
    assert_near(got.cpu(), dense_rows(step, None), torch.bfloat16)
