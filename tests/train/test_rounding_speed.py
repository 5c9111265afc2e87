"""`gptoss-train study --speed`: what it times, what its ratios are of, and what one call adds to memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch

from gptoss_infer.rounding import Rounding
from gptoss_train import peers
from gptoss_train import rounding_speed as module
from gptoss_train.rounding_speed import Call, lines, rounding_speed

SHAPES = ((96, 1024), (64, 512))
ROUNDING = {"encode", "encode like", *(f"merge {rule}" for rule in get_args(Rounding))}
DECODING = {"decode bf16", "decode bf16 transposed", "decode fp32", "decode fp32 transposed"}
PAGES = {"pages bf16", "pages fp32"}
MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_without_peers_ours_is_timed_and_their_columns_are_left_out(
    without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    without("torchao", "modelopt", "transformers")
    result = rounding_speed(SHAPES, threads=1, rounds=2)
    for shape in SHAPES:
        for memory, calls in (("recycled", ROUNDING | DECODING), ("fresh", DECODING | PAGES)):
            rows = [row for row in result["rows"] if row["shape"] == list(shape) and row["memory"] == memory]
            assert [row["call"] for row in rows if row["times_faster"]] == []
            assert sorted(row["call"] for row in rows) == sorted(calls)
            assert all(row["ms"] > 0 for row in rows)
    assert result["versions"] == {"torch": torch.__version__}
    assert json.loads(json.dumps(result)) == result
    table = "\n".join(lines(result))
    assert "96 x 1024" in table
    assert not any(package in table for package in ("torchao", "modelopt", "transformers"))
    said = capsys.readouterr()
    assert said.out == ""
    for package in ("torchao", "nvidia-modelopt", "transformers"):
        assert said.err.count(f"{package} cannot be imported") == 1


def test_whole_models_are_so_many_times_their_experts(without: Callable[..., None]) -> None:
    without("torchao", "modelopt", "transformers")
    result = rounding_speed(((64, 512),), threads=1, rounds=1)
    (one,) = [row for row in result["rows"] if row["call"] == "encode"]
    for model, experts in (("20b", 24 * 32), ("120b", 36 * 128)):
        (row,) = [row for row in result["models"] if row["model"] == model and row["call"] == "encode"]
        assert row["computed"]
        assert row["minutes"] == pytest.approx(experts * one["ms"] / 60_000)
        assert row["cpu_minutes"] == pytest.approx(experts * one["cpu_ms"] / 60_000)
        assert row["mxfp4_gb"] == pytest.approx(experts * 64 * 512 * 17 / 32 / 1e9), "17 bytes for 32 weights"
        assert row["bf16_gb"] == pytest.approx(experts * 64 * 512 * 2 / 1e9)


def test_a_ratio_is_the_peers_median_over_ours_by_the_clock_and_by_cpu_time() -> None:
    def work(asleep_ms: float, busy_ms: float) -> Callable[[], None]:
        def run() -> None:
            time.sleep(asleep_ms / 1e3)
            end = time.process_time() + busy_ms / 1e3
            while time.process_time() < end:
                pass

        return run

    calls = [Call("peer", work(30, 10), 0), Call("ours", work(0, 20), 0, ("peer",))]
    peer, ours = module._rows((1, 32), "recycled", calls, 3, {})
    assert peer["times_faster"] == peer["times_less_cpu"] == {}
    assert ours["times_faster"] == {"peer": pytest.approx(peer["ms"] / ours["ms"])}
    assert ours["times_less_cpu"] == {"peer": pytest.approx(peer["cpu_ms"] / ours["cpu_ms"])}
    assert peer["ms"] >= 40
    assert 20 <= ours["cpu_ms"] < 40, "one call, not the sum of three"
    assert 10 <= peer["cpu_ms"] < 20, "sleep is not work"


def test_the_peak_of_a_call_is_its_result_and_what_it_frees_again() -> None:
    def call(kept_mib: int, freed_mib: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            kept, freed = (torch.empty(mib * MIB, dtype=torch.uint8).fill_(1) for mib in (kept_mib, freed_mib))
            del freed
            return kept

        return run

    peak = module._peak_in_fork(Call("", call(24, 40), 0), Call("", call(1, 1), 0), 1)
    assert peak == pytest.approx(64, abs=1.5)  # Linux counts resident pages of a thread in batches of up to 256 KiB


def test_fresh_memory_is_paged_in_by_every_call_and_recycled_memory_is_not() -> None:
    size = 8 * MIB
    calls = [Call("a", lambda: torch.empty(size, dtype=torch.uint8).fill_(1), size)]
    fresh = module._take_turns(calls, 3, fresh=True)["a"].faults
    assert fresh >= size / (2 * MIB), "at least one per page, and there is none larger than 2 MiB"
    assert module._take_turns(calls, 3, fresh=False)["a"].faults < fresh / 2


def test_decoders_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "transformers_decode", lambda: lambda blocks, scales, dtype: torch.zeros(1, 64, 32))
    with pytest.raises(ValueError, match="transformers decodes to other bf16 values"):
        module._decoding_calls((32, 64))


@pytest.mark.slow
def test_the_command_times_experts_of_the_real_size(finish: Callable[..., str]) -> None:
    output = finish("study", "--speed", "--threads", "1", "--rounds", "1", "--json")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert {tuple(row["shape"]) for row in result["rows"]} == {(5760, 2880), (2880, 2880)}
    decoded = {row["call"]: row for row in result["rows"] if row["shape"] == [5760, 2880]}
    for name in ("decode bf16", "decode fp32", "transformers bf16"):
        assert decoded[name]["peak_mib"] >= decoded[name]["result_mib"]
    (size,) = {row["mxfp4_gb"] for row in result["models"] if row["model"] == "20b"}
    assert size == pytest.approx(24 * 32 * 3 * 2880 * 2880 * 17 / 32 / 1e9)
