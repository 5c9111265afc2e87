"""CPU kernels in C++: products of bf16 and of MXFP4, experts, attention over pages, whole layers. Inference only.

Why: torch's bf16 products with few rows reach a fraction of the memory's speed, decoding MXFP4 in torch is 30 times
slower than reading it, and calling some 20 functions a layer costs more than a small layer's arithmetic. Here are the
launchers; `build` compiles what they call. Each has the results of a plain PyTorch formulation, named in its docstring,
to the rounding of the dtype: sums are fp32 and rounded once, where the formulation may round in between.

Sums have a fixed order that depends on nothing but the shapes of a row: a row's result is the same bits alone or among
others, for any number of threads. Tensors are contiguous, all of them bf16 or all fp32 unless said otherwise.

Legend: N tokens, C hidden size, I intermediate size, E experts, k experts per token, G blocks of 32 weights, H query
heads, K key/value heads, D head size, r LoRA rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, Structure, byref
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer.kernels.cpu import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class LowRank(NamedTuple):
    """LoRA factors; the product is (x A^T) B^T."""

    a: Tensor  # (r, in), of experts (E, r, in)
    b: Tensor  # (out, r), of experts (E, out, r), times its scaling


class Affine(NamedTuple):
    """x W^T + bias, and the LoRA term if there is one."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)
    lora: LowRank | None = None


class Packed(NamedTuple):
    """One projection of all experts in MXFP4, and the LoRA term if there is one."""

    blocks: Tensor  # uint8 (E, out, G, 16)
    scales: Tensor  # uint8 (E, out, G)
    bias: Tensor  # (E, out)
    lora: LowRank | None = None


class Layer(NamedTuple):
    """The tensors of a layer. Norms are fp32."""

    input_norm: Tensor
    post_norm: Tensor
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    router: Affine
    sinks: Tensor
    gate_up: Packed
    down: Packed
    keys: Tensor  # pools of pages: (pages, K, page_tokens, D)
    values: Tensor
    window: int  # 0: full


class Pages(NamedTuple):
    """Pages of B sequences in the layers of one kind."""

    pages: Tensor  # int64 (B, P)
    first_pages: Tensor  # int64 (B,): which page of its sequence the first of these is


class Places(NamedTuple):
    """Where the N new tokens of a step are."""

    sequences: Tensor  # int64 (N,): which of the B sequences each continues
    positions: Tensor  # int64 (N,): its place there


class Shape(NamedTuple):
    """The numbers of a model."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    eps: float
    alpha: float
    limit: float


class _Affine(Structure):
    _fields_ = [*((name, _POINTER) for name in ("weight", "bias", "a", "b")), ("n", _LONG), ("rank", _LONG)]

    @classmethod
    def of(cls, affine: Affine) -> _Affine:
        factors, rank = _pointers(affine.lora)
        return cls(_at(affine.weight), _at(affine.bias), *factors, affine.weight.shape[0], rank)


class _Projection(Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("blocks", "scales", "bias", "a", "b")),
        *((name, _LONG) for name in ("out", "in", "rank")),
    ]

    @classmethod
    def of(cls, packed: Packed) -> _Projection:
        factors, rank = _pointers(packed.lora)
        _, out, groups = packed.scales.shape
        return cls(_at(packed.blocks), _at(packed.scales), _at(packed.bias), *factors, out, 32 * groups, rank)


class _Layer(Structure):
    _fields_ = [
        ("input_norm", _POINTER), ("post_norm", _POINTER),
        *((name, _Affine) for name in ("q", "k", "v", "o", "router")),
        ("sinks", _POINTER), ("gate_up", _Projection), ("down", _Projection),
        ("keys", _POINTER), ("values", _POINTER), ("window", _LONG),
    ]  # fmt: skip

    @classmethod
    def of(cls, layer: Layer) -> _Layer:
        convert: dict[type, Callable] = {Affine: _Affine.of, Packed: _Projection.of, int: int}
        return cls(*(convert.get(type(part), _at)(part) for part in layer))


class _Shape(Structure):
    _fields_ = [(name, _FLOAT if name in ("eps", "alpha", "limit") else _LONG) for name in Shape._fields]


class _Pages(Structure):
    _fields_ = [("pages", _POINTER), ("first_pages", _POINTER), ("num_pages", _LONG)]

    @classmethod
    def of(cls, pages: Pages) -> _Pages:
        return cls(_at(pages.pages), _at(pages.first_pages), pages.pages.shape[1])


class _Step(Structure):
    _fields_ = [
        ("num_tokens", _LONG), ("page_tokens", _LONG),
        *((name, _POINTER) for name in ("sequences", "positions", "cos", "sin")),
        ("full", _Pages), ("window", _Pages),
    ]  # fmt: skip


def _at(x: Tensor | None) -> int | None:
    """Return where a tensor's elements are."""
    if x is None:
        return None
    assert x.is_contiguous(), f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}"
    return x.data_ptr()


def _tensors(parts: object) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, without their parameters."""
    if isinstance(parts, Tensor):
        yield parts.detach()
    elif isinstance(parts, (tuple, list)):
        for part in parts:
            yield from _tensors(part)


def _pointers(lora: LowRank | None) -> tuple[tuple[int | None, int | None], int]:
    if lora is None:
        return (None, None), 0
    return (_at(lora.a), _at(lora.b)), lora.b.shape[-1]


_SIGNATURES = {
    "linear": [_INT, _POINTER, _LONG, _LONG, POINTER(_Affine), _POINTER, _INT, _INT],
    "experts": [
        _INT, *[_POINTER] * 3, *[_LONG] * 3, POINTER(_Projection), POINTER(_Projection), _FLOAT, _FLOAT, _POINTER, _INT
    ],
    "attention": [_INT, *[_POINTER] * 7, POINTER(_Pages), _LONG, _POINTER, *[_LONG] * 5, _POINTER, _INT],
    "rms_norm": [_INT, _POINTER, _POINTER, _FLOAT, _LONG, _LONG, _POINTER, _INT],
    "rotate": [_INT, *[_POINTER] * 3, *[_LONG] * 3, _INT],
    "top_k": [_POINTER, *[_LONG] * 3, _POINTER, _POINTER],
    "argmax": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "layers": [_INT, POINTER(_Shape), POINTER(_Layer), POINTER(_Step), _POINTER, _INT],
}  # fmt: skip


class Kernels:
    """The compiled functions."""

    def __init__(self, target: Sequence[str] = build.THIS_CPU) -> None:
        """Compile or find them. Raises: MachineError if that cannot be, with the reason."""
        self.library = library = build.load(target)
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"gptoss_{name}")
            function.argtypes, function.restype = signature, None
        self.level = "AVX512_BF16" if library.gptoss_level() == 2 else f"vectors of {library.gptoss_lanes()} floats"

    def linear(self, x: Tensor, affine: Affine, dtype: torch.dtype | None = None) -> Tensor:
        """As F.linear, (N, in) -> (N, out); in fp32 if `dtype` says so."""
        n, k = x.shape
        assert affine.weight.shape[1] == k, f"x has {k} features, the weight {affine.weight.shape[1]}"
        y = x.new_empty(n, affine.weight.shape[0], dtype=dtype)
        self.library.gptoss_linear(
            DTYPES[x.dtype], _at(x), n, k, byref(_Affine.of(affine)), _at(y), y.dtype == torch.float32,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        gate_up: Packed,
        down: Packed,
        activation: tuple[float, float],
    ) -> Tensor:
        """As `gptoss_infer.experts.Experts.forward`.

        Args:
            x: (N, C). weights: fp32 (N, k). chosen: int64 (N, k). activation: alpha and limit of the SwiGLU.
        Returns: (N, C).
        """
        assert x.shape[1] == down.scales.shape[1] == 32 * gate_up.scales.shape[2], "C of x and the projections differ"
        assert gate_up.scales.shape[1] == 64 * down.scales.shape[2], "I of the projections differs"
        out = torch.empty_like(x)
        self.library.gptoss_experts(
            DTYPES[x.dtype], _at(x), _at(chosen), _at(weights), *chosen.shape, len(gate_up.bias),
            byref(_Projection.of(gate_up)), byref(_Projection.of(down)), *activation, _at(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        pools: tuple[Tensor, Tensor],
        places: Places,
        pages: Pages,
        window: int,
    ) -> Tensor:
        """As `gptoss_infer.pages.Step.attend`.

        Args:
            q: (N, H, D). k, v: (N, K, D). sinks: (H,).
            pools: keys and values, (pages, K, page_tokens, D); k and v are written there.
            window: keys that a token sees, its own included; 0 for all.
        Returns: (N, H, D).
        """
        n, h, d = q.shape
        _, kv, page_tokens, _ = pools[0].shape
        out = torch.empty_like(q)
        self.library.gptoss_attention(
            DTYPES[q.dtype], _at(q), _at(k), _at(v), *map(_at, places), *map(_at, pools), byref(_Pages.of(pages)),
            page_tokens, _at(sinks), n, h, kv, d, window, _at(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `gptoss_infer.model.RMSNorm`: (N, C), fp32 (C,) -> (N, C)."""
        out = torch.empty_like(x)
        self.library.gptoss_rms_norm(
            DTYPES[x.dtype], _at(x), _at(weight), eps, *x.shape, _at(out), torch.get_num_threads()
        )
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """As `gptoss_infer.model.rotate`, in place: (N, heads, D) by fp32 (N, D / 2)."""
        self.library.gptoss_rotate(DTYPES[x.dtype], _at(x), _at(cos), _at(sin), *x.shape, torch.get_num_threads())

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the softmax over the k largest logits, fp32 (N, k), and which they are, int64 (N, k): fp32 (N, E).

        As `topk` and `softmax`; of equal logits the first counts as larger.
        """
        n, num_experts = logits.shape
        weights, chosen = logits.new_empty(n, k), logits.new_empty(n, k, dtype=torch.int64)
        self.library.gptoss_top_k(_at(logits), n, num_experts, k, _at(chosen), _at(weights))
        return weights, chosen

    def argmax(self, logits: Tensor) -> Tensor:
        """Return where each row's largest value is, the first of equals: fp32 (B, V) -> int64 (B,)."""
        out = logits.new_empty(len(logits), dtype=torch.int64)
        self.library.gptoss_argmax(_at(logits), *logits.shape, _at(out), torch.get_num_threads())
        return out


class Layers:
    """All layers of a model, to be run in one call."""

    def __init__(self, kernels: Kernels, shape: Shape, layers: Sequence[Layer]) -> None:
        """Take the tensors as they are now: one that is replaced later is not seen."""
        self._run, self._shape = kernels.library.gptoss_layers, _Shape(*shape)
        self._page_tokens = layers[0].keys.shape[2]
        self._layers = (_Layer * len(layers))(*map(_Layer.of, layers))
        self._held = list(_tensors(layers))  # keeps alive what is pointed to, also if a parameter gets other data

    def run_(self, x: Tensor, angles: tuple[Tensor, Tensor], places: Places, full: Pages, window: Pages) -> None:
        """Take x (N, C) through the layers, in place, as `gptoss_infer.model.Layer` does one by one.

        Args:
            angles: their cosines and sines, fp32 (N, D / 2). full, window: pages in the layers of each kind.
        """
        pages = _Pages.of(full), _Pages.of(window)
        step = _Step(len(x), self._page_tokens, *map(_at, places), *map(_at, angles), *pages)
        self._run(DTYPES[x.dtype], byref(self._shape), self._layers, byref(step), _at(x), torch.get_num_threads())
