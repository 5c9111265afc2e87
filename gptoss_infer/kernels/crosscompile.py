"""Compile every kernel for every GPU it is meant for, on a machine without any, and read what it would occupy there.

    python -m gptoss_infer.kernels.crosscompile

prints registers, shared memory and spills per kernel and GPU; exit code 1 if a kernel spills registers to memory, needs
more shared memory than a block has there, or rounds subnormals to zero. Says nothing about results (the interpreter's
tests do) or speed. A new kernel adds its cases to `cases`. Used by tests and by hand; needs Triton, whose NVIDIA
backend carries the tools.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptoss_infer.errors import MachineError, run_command

KIB = 1024
# Shared memory of one block (CUDA C++ Programming Guide, technical specifications per compute capability) or work-group
# (AMD CDNA 3 ISA, local data share).
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as its launcher would ask for it."""

    name: str
    kernel: triton.JITFunction
    signature: Mapping[str, str]  # Triton's types, such as *u8 and i64, of the arguments that are no constants
    constants: Mapping[str, object] = field(default_factory=dict)
    aligned: Sequence[str] = ()  # pointers and sizes that are multiples of 16; without it loads are not vectorised
    options: Mapping[str, object] = field(default_factory=dict)  # num_warps, num_stages, ...


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel occupies."""

    registers: int  # per thread
    shared_bytes: int  # per block
    spilled_bytes: int  # local memory per thread; 0 unless registers did not suffice
    flushes_subnormals: bool

    def complaints(self, target: str) -> list[str]:
        """Return what makes the kernel unfit for `target`; empty if it is fit."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes per thread")
        if self.shared_bytes > SHARED_LIMITS[target]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, {target} has {SHARED_LIMITS[target]}")
        if self.flushes_subnormals:
            found.append("rounds subnormals to zero")
        return found


def cases() -> list[Case]:
    """Return every kernel in every form that is launched."""
    from gptoss_infer.kernels import mxfp4_decode

    return [
        Case(
            f"mxfp4_decode {dtype}",
            mxfp4_decode.decode_kernel,
            {"blocks": "*u8", "scales": "*u8", "words": f"*u{bits}", "num_blocks": "i64"},
            {"WORD_BITS": bits, "TILE": mxfp4_decode.TILE},
            aligned=("blocks", "scales", "words"),
            options=mxfp4_decode.OPTIONS,
        )
        for dtype, bits in (("bf16", 32), ("fp32", 64))
    ]


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
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise MachineError(
            f"{tool} is missing; this Triton came without NVIDIA's tools: pip install --force-reinstall triton"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise MachineError(f"cuobjdump -res-usage printed {text!r}, expected REG:n STACK:n SHARED:n LOCAL:n")
    registers, stack, _, local = map(int, found.groups())
    # Spilled registers are counted as STACK; dynamic shared memory is only in Triton's metadata.
    return Resources(registers, compiled.metadata.shared, stack + local, ".ftz." in compiled.asm["ptx"])


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
        shared_bytes=number("group_segment_fixed_size"),
        spilled_bytes=number("private_segment_fixed_size"),
        flushes_subnormals=number("amdhsa_float_denorm_mode_32") != 3,
    )


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if a kernel is unfit."""
    argparse.ArgumentParser(
        prog="python -m gptoss_infer.kernels.crosscompile",
        description="Compile every kernel for every GPU, without one, and print what it occupies.",
    ).parse_args(argv)
    print(f"triton {triton.__version__}\n{'kernel':<24} {'GPU':<8} {'registers':>9} {'shared':>8} {'spilled':>8}")
    unfit = 0
    for case in cases():
        for target in TARGETS:
            used = compile_case(case, target)
            complaints = used.complaints(target)
            unfit += bool(complaints)
            row = f"{case.name:<24} {target:<8} {used.registers:>9} {used.shared_bytes:>8} {used.spilled_bytes:>8}"
            print("  ".join([row, *complaints]), flush=True)
    return 1 if unfit else 0


def entry() -> NoReturn:
    """Run from the command line."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
