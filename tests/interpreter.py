"""Run Triton kernels on CPU tensors: a worker process that interprets every kernel, with bf16 arithmetic put right.

    interpreted("gptoss_infer.kernels.mxfp4_decode", "decode", blocks, scales, torch.bfloat16)

Triton decides when a kernel is defined whether it will be compiled or interpreted, so both cannot be in one process,
and the suite's own process also cross-compiles. Tensors travel as safetensors bytes. Races, wrong masks and alignment
are not seen here: programs run one after the other.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor


def interpreted(module: str, function: str, *arguments: object) -> Any:
    """Return what `module.function(*arguments)` returns in the worker; what it raises is raised here.

    That is a tensor, or for a tuple the list of its tensors.
    """
    tensors = {str(i): argument for i, argument in enumerate(arguments) if isinstance(argument, Tensor)}
    rest = {i: argument for i, argument in enumerate(arguments) if not isinstance(argument, Tensor)}
    packed = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
    answer = _worker().submit(_call, module, function, packed, rest).result(timeout=300)
    results = safetensors.torch.load(answer)
    return results["result"] if "result" in results else [results[str(i)] for i in range(len(results))]


@functools.cache
def _worker() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_start)


def _start() -> None:
    assert "triton" not in sys.modules, "triton was imported before it could be told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # overflow to infinity is what the kernels mean
    patch_bfloat16()


def _call(module: str, function: str, packed: bytes, rest: dict[int, object]) -> bytes:
    arguments: dict[int, object] = {int(key): tensor for key, tensor in safetensors.torch.load(packed).items()} | rest
    result = getattr(importlib.import_module(module), function)(*(arguments[i] for i in range(len(arguments))))
    if isinstance(result, Tensor):
        return safetensors.torch.save({"result": result.contiguous()})
    tensors = [part for part in result if isinstance(part, Tensor)]
    return safetensors.torch.save({str(i): part.contiguous() for i, part in enumerate(tensors)})


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bf16 bit patterns of fp32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def patch_bfloat16() -> None:
    """Make the interpreter compute bf16 as hardware does: in fp32, rounded to nearest even.

    As of Triton 3.9 it keeps bf16 as uint16 bit patterns, on which its arithmetic, comparisons and dot work as on
    integers, and it truncates conversions from fp32 (triton-lang/triton issue 11584: not supported). Reductions are
    left as they are: a kernel casts to fp32 before tl.sum, which it should do anyway.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def exact(handle: Any) -> Any:
        return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

    cast_impl, create_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    binary_op, unary_op = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    create_dot = InterpreterBuilder.create_dot

    def cast(self: Any, src: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not is_bf16(src):
            return TensorHandle(narrow(cast_impl(self, src, tl.float32).data), tl.bfloat16)
        return cast_impl(self, exact(src), to)

    def fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        if to.scalar == tl.bfloat16 and rounding == ir.ROUNDING_MODE.RTNE:
            return cast(self, src, to)
        return create_fp_to_fp(self, src, to, rounding)

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (is_bf16(lhs) and is_bf16(rhs)):
            return binary_op(self, lhs, rhs, op)
        output = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(output, tl.int1) if output.dtype == np.bool_ else TensorHandle(narrow(output), tl.bfloat16)

    def unary(self: Any, arg: Any, op: Any) -> Any:
        return TensorHandle(narrow(op(widen(arg.data))), tl.bfloat16) if is_bf16(arg) else unary_op(self, arg, op)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return create_dot(self, exact(a), exact(b), d, *options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast, fp_to_fp
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary, unary
    InterpreterBuilder.create_dot = dot
