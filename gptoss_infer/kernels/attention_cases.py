"""In which forms the attention kernels are launched, and how they are checked on a GPU; see `cases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from gptoss_infer import attention, page_tables
from gptoss_infer.attention import Attended, Blocks
from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import packed_attention, paged_attention
from gptoss_infer.kernels.cases import Case, Check, TensorCores
from gptoss_infer.kernels.plans import Tile
from gptoss_infer.page_tables import Held

ROUNDED = 2**-8  # weights and results are rounded to bf16's 2**-9; the references here compute in fp32
PAGE_TOKENS = 64
MAX_DECODED = 256  # sequences of a decode step
PAGES_BYTES = 2**29  # of keys, and as many of values
SETS_BYTES = 2**28  # that are read in turn for timing: no cache holds them
MAX_SETS = 64


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for gpt-oss: on full and sliding layers, with and without sharing."""
    return [*_packed_cases(target), *_paged_cases(target)]


def _packed_cases(target: str) -> list[Case]:
    kinds = dict.fromkeys(("q", "k", "v", "sinks", "out", "grad", "grad_q", "grad_k", "grad_v"), "*bf16")
    kinds |= {"starts": "*i32", "ends": "*i32", "normalizers": "*fp32", "products": "*fp32"}
    kinds |= dict.fromkeys(("num_tokens", "stride_q", "stride_k", "stride_v", "window"), "i32")
    kernels = packed_attention.forward_kernel, packed_attention.grad_q_kernel, packed_attention.grad_kv_kernel
    found = []
    for kernel, tile in zip(kernels, packed_attention.PLANS[target], strict=True):
        signature = {name: kinds[name] for name in kernel.arg_names if name in kinds}
        found += [
            Case(
                f"packed {kernel.__name__.removesuffix('_kernel')}{' window' if window else ''}",
                kernel,
                signature,
                packed_attention.constants(tile, window, 8, 64),
                aligned=[name for name in signature if name not in ("num_tokens", "window")],
                options=tile.options,
                tensor_cores="wide",
                keeps_subnormals=False,
            )
            for window in (None, 128)
        ]
    return found


def _paged_cases(target: str) -> list[Case]:
    tensors = dict.fromkeys(("q", "keys", "values", "sinks", "out"), "*bf16")
    tensors |= dict.fromkeys(("pages", "own", "rows", "lengths", "done", "tokens", "members"), "*i32")
    tensors |= {"parts": "*fp32", "sums": "*fp32"}
    numbers = dict.fromkeys(("max_pages", "stride_page", "window", "max_members", "tiles", "num_splits"), "i32")
    plan, cuts = paged_attention.PLANS[target], paged_attention.CUTS
    decode, prefill = paged_attention.decode_kernel, paged_attention.prefill_kernel

    def case(name: str, kernel: object, tile: Tile, tensor_cores: TensorCores, **more: object) -> Case:
        arguments: list[str] = kernel.arg_names  # type: ignore[attr-defined]
        fixed: dict[str, object] = {**paged_attention.constants(8, 64, PAGE_TOKENS, tile), **cuts, **more}
        fixed = {name: value for name, value in fixed.items() if name in arguments}
        signature = {name: (tensors | numbers)[name] for name in arguments if name not in fixed}
        aligned = [name for name in signature if name in tensors or name == "stride_page"]
        return Case(
            f"paged {name}", kernel, signature, fixed, aligned, tile.options, tensor_cores=tensor_cores,
            keeps_subnormals=False, blocks=4 if kernel is decode else 1,
        )  # fmt: skip

    return [
        case("prefill", prefill, plan.prefill, "wide", WINDOWED=False),
        case("prefill window", prefill, plan.prefill, "wide", WINDOWED=True),
        case("decode", decode, plan.decode, "any", WINDOWED=False, done=None),
        case("decode behind shared", decode, plan.decode, "any", WINDOWED=False),
        case("decode window", decode, plan.decode, "any", WINDOWED=True, done=None),
        case("shared", paged_attention.shared_kernel, plan.shared, "wide"),
        case("merge", paged_attention.merge_kernel, paged_attention.MERGE, "none"),
    ]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield training's passes for packs of so many tokens; a step of so many sequences; a prompt's chunk of so many."""
    generator = torch.Generator(device).manual_seed(0)
    for count in tokens:
        for window in (None, config.sliding_window):
            yield from _packed_checks(config, count, window, generator)
    pages = _Pages(config, generator)
    for count in tokens:
        for window in (None, config.sliding_window):
            if count <= MAX_DECODED:
                yield pages.decode(count, window)
            if count > 1:
                yield pages.prefill(count, window)
    yield pages.shared(8)
    yield pages.alone_and_among_others()


def _packed_checks(config: ModelConfig, count: int, window: int | None, generator: torch.Generator) -> Iterator[Check]:
    """Yield forward and backward over a pack of one long document and two short ones."""
    h, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    short = count // 8
    lengths = [length for length in (short, count - 2 * short, short) if length]
    firsts = torch.tensor([0, *accumulate(lengths[:-1])])
    starts = firsts.repeat_interleave(torch.tensor(lengths))
    blocks = Blocks(starts, generator.device)
    q, grad = _randn(generator, 2, count, h, d)
    k, v = _randn(generator, 2, count, kv, d)
    sinks = _randn(generator, h)
    seen = torch.arange(count) - starts + 1
    pairs = h * int(seen.clamp(max=window or count).sum())
    name = f"{count} tokens{'' if window is None else ', window'}"
    forward = partial(packed_attention.packed_forward, q, k, v, sinks, blocks, window=window)
    wide = q.float(), k.float(), v.float()
    yield Check(
        f"packed attention, {name}",
        [forward],
        partial(attention.packed_forward, *wide, sinks, blocks, window=window),
        ROUNDED,
        moved_bytes=2.0 * (q.nbytes + k.nbytes),
        flops=4.0 * d * pairs,
        compared=lambda results: results[0],
    )
    out, normalizers = forward()
    exact = attention.packed_forward(*wide, sinks, blocks, window=window)
    yield Check(
        f"packed attention backward, {name}",
        [partial(packed_attention.packed_backward, grad, Attended(q, k, v, out, normalizers), blocks, window=window)],
        partial(attention.packed_backward, grad.float(), Attended(*wide, *exact), blocks, window=window),
        1.5 * ROUNDED,
        moved_bytes=4.0 * q.nbytes + 4 * k.nbytes,
        flops=10.0 * d * pairs,
        compared=lambda results: torch.cat([x.double().flatten() for x in results[:3]]),
    )


class _Pages:
    """Random pages, and checks of steps over some of them."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        self.config, self.generator, self.device = config, generator, generator.device
        self.context = 8 * config.sliding_window  # tokens before the new ones
        page_bytes = 2 * config.num_key_value_heads * PAGE_TOKENS * config.head_dim
        self.num_pages = PAGES_BYTES // page_bytes if self.device.type != "cpu" else 64
        shape = (self.num_pages, config.num_key_value_heads, PAGE_TOKENS, config.head_dim)
        self.keys, self.values = _randn(generator, *shape), _randn(generator, *shape)
        self.sinks = _randn(generator, config.num_attention_heads)

    def decode(self, count: int, window: int | None) -> Check:
        """Sequences of one new token each, at about the same length."""
        sequences = [(self.context - n % 70, 1) for n in range(count)]
        return self._check(f"decode {count} sequences", sequences, window)

    def prefill(self, count: int, window: int | None) -> Check:
        """A chunk of one prompt, behind what came before."""
        return self._check(f"prefill {count} tokens", [(self.context - 7, count)], window)

    def _check(self, name: str, sequences: list[tuple[int, int]], window: int | None) -> Check:
        d, kv = self.config.head_dim, self.config.num_key_value_heads
        limit = window or 2**31
        read = sum(min(own + length, limit + length - 1) for own, length in sequences)
        steps = [self._step(sequences, window) for _ in range(_num_sets(4 * read * kv * d))]
        pairs = sum(min(own + i + 1, limit) for own, length in sequences for i in range(length))
        return Check(
            f"paged attention, {name}{'' if window is None else ', window'}",
            [partial(paged_attention.paged_attention, *step, window=window) for step in steps],
            partial(_exact, *steps[0], window=window),
            ROUNDED,
            moved_bytes=4.0 * read * kv * d + 2.0 * steps[0][0].nbytes,
            flops=4.0 * self.config.num_attention_heads * d * pairs,
        )

    def _step(
        self, sequences: list[tuple[int, int]], window: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, page_tables.Batch]:
        """Return what `paged_attention` takes, but the window. More pages than there are come twice."""
        free = torch.randperm(self.num_pages, generator=self.generator, device=self.device).tolist()
        held: list[Held] = []
        row = 0
        for own, length in sequences:
            skipped = 0 if window is None else max(0, own - window + 1) // PAGE_TOKENS
            count = -(-(own + length) // PAGE_TOKENS) - skipped
            pages = [free[(row + len(held) + n) * 17 % len(free)] for n in range(count)]
            held.append(Held(pages, own - skipped * PAGE_TOKENS, row, length))
            row += length
        q = _randn(self.generator, row, self.config.num_attention_heads, self.config.head_dim)
        return q, self.keys, self.values, self.sinks, page_tables.batch_of(held, self.device)

    def shared(self, count: int) -> Check:
        """Samples of one prompt."""
        d, num_common = self.config.head_dim, self.context // PAGE_TOKENS
        moved_bytes = 4.0 * (self.context + 6 * count) * self.config.num_key_value_heads * d
        steps = []
        for number in range(_num_sets(moved_bytes)):
            first = number * (num_common + count) % (self.num_pages - num_common - count)
            common = list(range(first, first + num_common))
            held = [Held([*common, first + num_common + n], self.context + 5, n) for n in range(count)]
            batch = page_tables.batch_of(held, self.device, page_tokens=PAGE_TOKENS)
            assert batch.shared is not None, "nothing is shared"
            q = _randn(self.generator, count, self.config.num_attention_heads, d)
            steps.append((q, self.keys, self.values, self.sinks, batch))
        return Check(
            f"paged attention, decode {count} samples of a prompt",
            [partial(paged_attention.paged_attention, *step, window=None) for step in steps],
            partial(_exact, *steps[0], window=None),
            ROUNDED,
            moved_bytes=moved_bytes,
        )

    def alone_and_among_others(self) -> Check:
        """The last of some sequences, compared with itself alone."""
        q, keys, values, sinks, _ = self._step([(9 + 31 * n, 1) for n in range(5)], None)
        held = [Held(list(range(n, n + 4)), 9 + 31 * n, n) for n in range(5)]
        last = page_tables.batch_of([held[-1]._replace(row=0)], self.device)
        attend = partial(paged_attention.paged_attention, window=None)
        return Check(
            "paged attention, a sequence as among five",
            [lambda: attend(q[4:].contiguous(), keys, values, sinks, last)],
            lambda: attend(q, keys, values, sinks, page_tables.batch_of(held, self.device))[4:],
            0,
        )


def _num_sets(moved_bytes: float) -> int:
    return max(1, min(MAX_SETS, int(SETS_BYTES // moved_bytes)))


def _exact(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, batch: page_tables.Batch, *, window: int | None
) -> Tensor:
    """The reference, of the same bf16 values, in fp32."""
    used = torch.cat([s.pages.flatten() for s in (batch.decode, batch.prefill) if s is not None]).long().unique()

    def widened(pool: Tensor) -> Tensor:
        return torch.zeros(pool.shape, device=pool.device).index_copy_(0, used, pool[used].float())

    return page_tables.attend(q.float(), widened(keys), widened(values), sinks.float(), batch, window=window)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).bfloat16()
