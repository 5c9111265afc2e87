"""Which steps have a graph, and that the tables it reads are those of a step's own; run by kernels elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.engine import Engine, SamplingParams
from gptoss_infer.graphs import SLOTS, Graphs, Size, StaticStep, why_no_graphs
from gptoss_infer.pages import KernelStep
from gptoss_infer.scheduler import Chunk

PARAMS = SamplingParams(max_tokens=40, stop_token_ids=())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("graphs") / "base", tiny_config())


@pytest.fixture
def engine(directory: Path) -> Engine:
    model = gi.load(directory, device="cpu", dtype=torch.float32)
    return Engine(model, max_batch=6, page_tokens=16, step_tokens=64, cache_tokens=2048)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def planned(engine: Engine) -> list[Chunk]:
    """The next step's chunks, which are computed then."""
    chunks = engine.scheduler.plan()
    logits = engine._logits(chunks, None)
    engine.scheduler.advance(chunks)
    ending = [chunk.sequence for chunk in chunks if chunk.reaches_end]
    for sequence, row in zip(ending, logits, strict=True):
        sequence.tokens.append(int(row.argmax()))
    return chunks


def test_tables_in_place_hold_what_a_steps_own_hold(engine: Engine) -> None:
    """As sequences grow over pages and beyond the window, in more slots than sequences, again and again."""
    device, num_compared = torch.device("cpu"), 0
    samples = engine.add(prompts(31, 1, 70, 16, 5), PARAMS)
    static = StaticStep(engine.cache, Size(8, 8), device)
    with torch.inference_mode():
        for number in range(36):
            if number == 20:
                engine.cancel(samples[2:3])
            chunks = engine.scheduler.plan()
            if all(chunk.length == 1 for chunk in chunks):
                own, count = KernelStep(engine.cache, chunks, device), len(chunks)
                static.fill(chunks)
                assert torch.equal(static.input_ids[:count], own.input_ids.int())
                assert torch.equal(static.positions[:count], own.positions.int())
                assert static.real.tolist() == [True] * count + [False] * (8 - count)
                for kind in ("full", "window"):
                    assert static.places[kind].tolist() == own.places[kind].tolist() + [-1] * (8 - count)
                    ours, theirs = static.batches[kind].decode, own.batches[kind].decode
                    assert ours is not None
                    assert theirs is not None
                    assert torch.equal(ours.own[:count], theirs.own)
                    assert torch.equal(ours.rows[:count], theirs.rows)
                    width = theirs.pages.shape[1]
                    assert torch.equal(ours.pages[:count, :width], theirs.pages)
                num_compared += 1
            engine.scheduler.advance(chunks)
            for chunk in chunks:
                if chunk.reaches_end:
                    chunk.sequence.tokens.append(number)
    assert num_compared > 30


def test_parts_of_the_one_copy_begin_at_multiples_of_16_bytes(engine: Engine) -> None:
    for size in (Size(1, 1), Size(2, 3), Size(24, 8)):
        step = StaticStep(engine.cache, size, torch.device("cpu"))
        tables = [step.input_ids, step.positions, *step.places.values()]
        tables += [part for batch in step.batches.values() if batch.decode for part in batch.decode[:2]]
        assert {(table.data_ptr() - step.input_ids.data_ptr()) % 16 for table in tables} == {0}


def test_sizes_are_the_smallest_that_hold_a_step() -> None:
    assert [Size.of(*counts) for counts in ((1, 1), (3, 5), (17, 8), (128, 9))] == [(1, 1), (4, 8), (24, 8), (128, 16)]
    assert list(SLOTS) == sorted(SLOTS)


def test_steps_that_read_prompts_or_share_a_beginning_have_no_graph(directory: Path) -> None:
    engine = Engine(gi.load(directory, device="cpu", dtype=torch.float32), page_tokens=16, cache_tokens=4096)
    graphs = Graphs(engine.model, engine.cache, record=lambda run: lambda: torch.zeros(128, 1))
    with torch.inference_mode():
        text = prompts(135)[0]
        engine.add([text, text, *prompts(4)], PARAMS)
        chunks = engine.scheduler.plan()
        assert graphs.logits(chunks) is None, "reads prompts"
        for _ in range(6):  # the second sequence waits for what the first one leaves
            planned(engine)
        chunks = engine.scheduler.plan()
        assert graphs.logits(chunks) is None, "two sequences share 128 tokens, which are read once for both"
        assert graphs.logits(chunks[1:]) is not None
        assert list(graphs._recorded) == [Size(2, 16)]


def test_where_there_are_no_graphs_the_reason_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = why_no_graphs(engine.model, engine.cache)
    assert found == "attention runs in plain PyTorch: the model is on cpu"
    monkeypatch.setattr(engine.cache, "why_no_kernels", None)
    assert why_no_graphs(engine.model, engine.cache) == (
        "experts run in plain PyTorch, whose host waits for the routing"
    )
    monkeypatch.setenv("GPTOSS_CUDA_GRAPHS", "0")
    assert why_no_graphs(engine.model, engine.cache) == "GPTOSS_CUDA_GRAPHS=0 is set"
    assert kernels.why_no_triton(engine.model.lm_head.weight) == "the model is on cpu"
