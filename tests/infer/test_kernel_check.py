"""What `python -m gptoss_infer.kernels.check` does on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
from gptoss_infer.errors import MachineError, UsageError
from gptoss_infer.kernels import check
from gptoss_infer.kernels.cases import Check


def test_every_kernels_checks_pass_in_the_interpreter_at_toy_sizes() -> None:
    errors = interpreted("check_probes", "errors", 1, 11)
    assert len(errors) > 15
    assert (errors[:, 0] <= errors[:, 1]).all()
    assert (errors[:, 1] <= 2**-6).all()


def test_a_wrong_result_of_any_kind_exceeds_what_is_allowed() -> None:
    right = torch.arange(6.0)
    for wrong in (right + 1, right[:5], right.where(right != 3, torch.nan)):
        assert check.error_of(Check("", [lambda wrong=wrong: wrong], lambda: right, 0.01)) > 0.01
    assert check.error_of(Check("", [lambda: right], lambda: right, 0)) == 0


def test_a_row_tells_time_and_shares_of_the_measured_rates() -> None:
    rates = check.Rates(bytes_per_s=2e12, flops_per_s=5e14)
    case = Check("moe up, 8 tokens", [], lambda: 0, 0.002, moved_bytes=1e8, flops=2e10)
    assert check.row(case, 0.0015, 100e-6, rates).split() == [
        *["moe", "up,", "8", "tokens", "1.5e-03", "2.0e-03", "100.0"],
        *["1000", "50.0%", "200.0", "40.0%"],
    ]
    assert check.row(Check("route", [], lambda: 0, 0), 0, 2e-6, rates).split()[-4:] == ["-"] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which this would run everything")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(MachineError, match=r"torch sees no GPU.*crosscompile compiles them"):
        check.main([])
    with pytest.raises(UsageError, match="--tokens is 'many'"):
        check.main(["--tokens", "many"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")
def test_on_a_gpu_every_kernel_is_right_at_the_sizes_of_20b() -> None:
    assert check.main([]) == 0
