"""Every kernel compiles for every GPU, without one, and the tool that says so can tell fit from unfit."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
from gptoss_infer.kernels import crosscompile, mxfp4_decode  # need triton
from gptoss_infer.kernels.cases import TARGETS, Case, cases


@pytest.mark.parametrize("target", TARGETS)
def test_the_decode_kernel_compiles_for_every_gpu_and_is_fit_for_it(target: str) -> None:
    for case in mxfp4_decode.cases(target):
        used = crosscompile.compile_case(case, target)
        assert used.complaints(case, target) == []
        assert used.registers > 0


@pytest.mark.parametrize(("target", "limit"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8})])
def test_a_kernel_that_holds_too_much_is_reported_as_spilling(target: str, limit: dict[str, object]) -> None:
    from kernel_probes import spilling_kernel

    options = {"num_warps": 1, "enable_fp_fusion": False} | limit
    case = Case("", spilling_kernel, {"x": "*fp32", "out": "*fp32"}, {"SIZE": 8192}, options=options)
    used = crosscompile.compile_case(case, target)
    assert used.spilled_bytes > 0
    assert "spills" in used.complaints(case, target)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_matrix_product_counts_matrix_instructions_and_a_kernel_without_any_is_reported(target: str) -> None:
    from kernel_probes import dot_kernel, spilling_kernel

    signature = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    product = Case("", dot_kernel, signature, {"SIZE": 64}, aligned=tuple(signature), tensor_cores="wide")
    used = crosscompile.compile_case(product, target)
    assert sum(used.matrix_instructions.values()) >= 1
    assert used.complaints(product, target) == []
    none = Case("", spilling_kernel, {"x": "*fp32", "out": "*fp32"}, {"SIZE": 128}, tensor_cores="any")
    used = crosscompile.compile_case(none, target)
    assert not used.matrix_instructions
    assert "has no" in used.complaints(none, target)[0]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_product_of_32_rows_is_reported_to_lack_the_wide_instructions(target: str) -> None:
    from kernel_probes import dot_kernel

    signature = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    small = Case("", dot_kernel, signature, {"SIZE": 32}, aligned=tuple(signature), tensor_cores="wide")
    used = crosscompile.compile_case(small, target)
    assert used.matrix_instructions.get("HMMA")
    assert "has no" in used.complaints(small, target)[0]


def test_too_much_shared_memory_too_few_blocks_and_flushed_subnormals_are_reported() -> None:
    used = crosscompile.Resources(registers=129, shared_bytes=200 * 1024, spilled_bytes=0, flushes_subnormals=True)
    case = Case("", None, {}, options={"num_warps": 4}, blocks=2)
    assert len(used.complaints(case, "sm_80")) == 3
    assert used.complaints(case, "sm_90") == ["only 1 of 2 blocks fit on a multiprocessor", "rounds subnormals to zero"]


@pytest.mark.parametrize(
    ("target", "registers", "shared_kib", "num_warps", "blocks"),
    [
        ("sm_90", 128, 0, 4, 4),  # 65,536 registers: 4 * 128 threads * 128
        ("sm_90", 129, 0, 4, 3),  # allocated in eights
        ("sm_90", 32, 56, 4, 4),  # 228 KiB, of which each block takes one more
        ("sm_80", 32, 81, 8, 2),  # 164 KiB
        ("gfx942", 128, 0, 4, 4),  # 4 SIMDs with 512 registers per lane: 4 waves each
        ("gfx942", 32, 20, 4, 3),  # 64 KiB
    ],
)
def test_the_number_of_blocks_on_a_multiprocessor_follows_from_registers_and_shared_memory(
    target: str, registers: int, shared_kib: int, num_warps: int, blocks: int
) -> None:
    used = crosscompile.Resources(registers, shared_kib * 1024, 0, flushes_subnormals=False)
    assert used.fitting(target, num_warps) == blocks


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_is_fit_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert crosscompile.main([]) == 0
    rows = re.findall(r"^(\S.*?) +(sm_\d+|gfx942) +(\d+) +(\d+) +0  ", capsys.readouterr().out, re.MULTILINE)
    wanted = {(case.name, target) for target in TARGETS for case in cases(target)}
    assert {row[:2] for row in rows} == wanted
