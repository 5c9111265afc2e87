"""Compile every kernel for every GPU it is meant for, on a machine without any, and read what it would occupy there.

    python -m gptoss_infer.kernels.crosscompile

prints registers, shared memory, spills and matrix instructions per kernel and GPU; exit code 1 if a kernel spills
registers to memory, needs more shared memory or registers than it may have there, lacks the matrix instructions that it
was written for, or rounds subnormals to zero. Says nothing about results (the interpreter's tests do) or speed. A new
kernel's module adds itself to `cases.MODULES`. Used by tests and by hand; needs Triton, whose NVIDIA backend carries
the tools.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptoss_infer.errors import MachineError, run_command
from gptoss_infer.kernels.cases import Case, cases

KIB = 1024
# Shared memory of one block (CUDA C++ Programming Guide, technical specifications per compute capability) or work-group
# (AMD CDNA 3 ISA, local data share).
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
MATRIX_INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "sm_80": {"none": (), "any": ("HMMA",), "wide": ("HMMA",)},
    "sm_90": {"none": (), "any": ("HGMMA", "HMMA"), "wide": ("HGMMA",)},
    "sm_100": {"none": (), "any": ("UTCHMMA", "HMMA"), "wide": ("UTCHMMA",)},
    "gfx942": {"none": (), "any": ("v_mfma",), "wide": ("v_mfma",)},
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel occupies."""

    registers: int  # per thread
    shared_bytes: int  # per block
    spilled_bytes: int  # local memory per thread; 0 unless registers did not suffice
    flushes_subnormals: bool
    matrix_instructions: Mapping[str, int] = field(default_factory=dict)  # how many of each kind the code has

    def fitting(self, target: str, num_warps: int) -> int:
        """Return how many blocks fit on one multiprocessor (compute unit) by registers and by shared memory."""
        registers = -(-self.registers // 8) * 8  # as they are allocated
        if target.startswith("gfx"):  # four SIMDs of 512 registers per lane
            return min(4 * (512 // registers) // num_warps, SHARED_LIMITS[target] // max(self.shared_bytes, 1))
        per_block = self.shared_bytes + KIB  # one KiB is the system's
        return min(65536 // (registers * 32 * num_warps), (SHARED_LIMITS[target] + KIB) // per_block)

    def complaints(self, case: Case, target: str) -> list[str]:
        """Return what makes the kernel unfit for `target`; empty if it is fit."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes per thread")
        if self.shared_bytes > SHARED_LIMITS[target]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, {target} has {SHARED_LIMITS[target]}")
        if (fitting := self.fitting(target, int(str(case.options.get("num_warps", 4))))) < case.blocks:
            found.append(f"only {fitting} of {case.blocks} blocks fit on a multiprocessor")
        if self.flushes_subnormals and case.keeps_subnormals:
            found.append("rounds subnormals to zero")
        wanted = MATRIX_INSTRUCTIONS[target][case.tensor_cores]
        if wanted and not any(self.matrix_instructions.get(kind) for kind in wanted):
            found.append(f"has no {' or '.join(wanted)}")
        return found


def compile_case(case: Case, target: str) -> Resources:
    """Compile for one of `TARGETS`; an exception of Triton's compiler means that it cannot."""
    order = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature) | dict.fromkeys(case.constants, "constexpr"),
        constexprs=dict(case.constants),
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(case.options))
    return _nvidia(compiled) if TARGETS[target].backend == "cuda" else _amd(compiled)


def _nvidia(compiled: Any) -> Resources:  # triton.compiler.CompiledKernel, whose attributes are untyped
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise MachineError(f"cuobjdump -res-usage printed {text!r}, expected REG:n STACK:n SHARED:n LOCAL:n")
    registers, stack, _, local = map(int, found.groups())
    # Spilled registers are counted as STACK; dynamic shared memory is only in Triton's metadata.
    return Resources(
        registers,
        compiled.metadata.shared,
        stack + local,
        ".ftz." in compiled.asm["ptx"],
        Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    """Return what one of the NVIDIA tools that Triton carries prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise MachineError(
            f"{path} is missing; this Triton came without NVIDIA's tools: pip install --force-reinstall triton"
        )
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:?\s+(\d+)", text)
        if found is None:
            raise MachineError(
                f"{key} is not in the AMD assembly that triton {triton.__version__} makes; read it another way"
            )
        return int(found.group(1))

    return Resources(
        registers=number("vgpr_count"),
        shared_bytes=compiled.metadata.shared,  # asked for at launch: the assembly's group_segment_fixed_size is 0
        spilled_bytes=number("private_segment_fixed_size"),
        flushes_subnormals=number("amdhsa_float_denorm_mode_32") != 3,
        matrix_instructions=Counter(re.findall(r"\b(v_mfma)_", text)),
    )


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if a kernel is unfit."""
    argparse.ArgumentParser(
        prog="python -m gptoss_infer.kernels.crosscompile",
        description="Compile every kernel for every GPU, without one, and print what it occupies.",
    ).parse_args(argv)
    print(
        f"triton {triton.__version__}\n{'kernel':<32} {'GPU':<7} {'registers':>9} {'shared':>7} {'spilled':>7}  matrix"
    )
    unfit = 0
    pairs = [(target, number) for target in TARGETS for number in range(len(cases(target)))]
    # Compiling keeps one core busy for seconds a kernel. Spawned, since a fork would inherit torch's threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for row, complaints in pool.map(_row, *zip(*pairs, strict=True)):
            unfit += bool(complaints)
            print("  ".join([row, *complaints]), flush=True)
    return 1 if unfit else 0


def _row(target: str, number: int) -> tuple[str, list[str]]:
    """Return a line of the table, and what makes the kernel unfit."""
    case = cases(target)[number]
    used = compile_case(case, target)
    matrix = " ".join(f"{count} {kind}" for kind, count in used.matrix_instructions.items()) or "-"
    row = f"{case.name:<32} {target:<7} {used.registers:>9} {used.shared_bytes:>7} {used.spilled_bytes:>7}  {matrix}"
    return row, used.complaints(case, target)


def entry() -> NoReturn:
    """Run from the command line."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
