"""The experts of a layer, and the one function that runs them: forward, and exact gradients without dense weights.

Here: `ExpertLinear` (MXFP4 bytes or dense weights of one projection), `Projection` (with its LoRA factors, if any) and
`Experts`. Not here: the router (`gptoss_infer.model`) and how factors get there (`gptoss_infer.lora`).

Tokens are sorted by expert once. Experts are then taken in chunks: decode the chunk's weights, multiply the chunk's
rows, and go on, so that at most `CHUNK_BYTES` of decoded weights (one expert on a CPU) exist at a time. The backward
pass decodes again. Kept for it are the pre-activations of the SwiGLU and the r-dimensional LoRA products, or nothing at
all with `recompute`; never a sorted copy of the tokens, an expert's output or a weight.

That is plain PyTorch, for a CPU, for other dtypes than bf16, and as the reference. Experts whose bytes are in tiles
(`gptoss_infer.tiled`) compute the same in Triton, without decoded weights: `gptoss_infer.kernels.moe_training`.

Legend: N tokens, k experts per token, M = N k rows (one per token and chosen expert), E experts, C hidden size, I
intermediate size, r LoRA rank, G blocks of 32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss_infer import kernels, mxfp4

ExpertFormat = Literal["mxfp4", "bf16"]
CHUNK_BYTES = 2**28  # decoded expert weights held at a time on a GPU: 8 experts of gpt-oss' gate_up_proj in bf16

CACHED_VALUES = 2**19  # pre-activations worked on at a time on a CPU: 2 MiB of fp32
GPU_VALUES = 2**26  # and on a GPU: fewer launches, 256 MiB


class ExpertLinear(nn.Module):
    """One projection of every expert of a layer: MXFP4 bytes, or dense weights (E, in, out) as in bf16 checkpoints."""

    blocks: Tensor  # uint8 (E, out, G, 16), if MXFP4; in tiles, their words
    scales: Tensor  # uint8 (E, out, G), if MXFP4; in tiles, theirs
    order: kernels.Order | None = None  # of the tiles that blocks and scales were brought into, if they were

    def __init__(self, num_experts: int, in_features: int, out_features: int, experts: ExpertFormat) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        if experts == "mxfp4":
            groups = in_features // mxfp4.BLOCK
            self.register_buffer("blocks", torch.zeros(num_experts, out_features, groups, 16, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(num_experts, out_features, groups, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.zeros(num_experts, in_features, out_features))
        self.format: ExpertFormat | Literal["tiled"] = experts  # tiled: for a GPU, see `gptoss_infer.tiled`
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def projection(self) -> Projection:
        """Return the tensors that `Experts` works with."""
        if self.format == "bf16":
            return Projection(self.weight, None, self.bias)
        return Projection(self.blocks, self.scales, self.bias, tiles=self._tiles(slice(None)))

    def _tiles(self, experts: slice) -> kernels.Tiles | None:
        if self.order is None:
            return None
        sizes = self.out_features, self.in_features
        return kernels.tiles_of(self.blocks[experts], self.scales[experts], sizes, self.order)

    def tile(self) -> None:
        """Bring MXFP4 bytes into the order of the GPU's kernels; they take the place of the blocks.

        Raises: ValueError for a scale byte above `kernels.MAX_TILED_SCALE`.
        """
        assert self.format == "mxfp4", f"experts are {self.format}: only MXFP4 blocks are put into tiles"
        tiles = kernels.tile(self.blocks, self.scales)
        self.blocks, self.scales, self.order, self.format = tiles.words, tiles.scales, tiles.order, "tiled"

    def pair(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the MXFP4 blocks (out, G, 16) and scales (out, G) of one expert, from tiles too."""
        tiles = self._tiles(slice(expert, expert + 1))
        if tiles is None:
            return self.blocks[expert], self.scales[expert]
        blocks, scales = kernels.untile(tiles)
        return blocks[0], scales[0]

    def as_stored(self, blocks: Tensor, expert: int) -> Tensor:
        """Return other blocks for one expert, under its scales, in the form of `self.blocks`."""
        if self.order is None:
            return blocks
        return kernels.tile(blocks.unsqueeze(0), self.pair(expert)[1].unsqueeze(0)).words[0]


class Projection(NamedTuple):
    """One projection of all experts: y = x W^T + bias + scaling (drop(x) A^T) B^T.

    If `merged`, W holds scaling B A already, rounded: the term is not added again, and A and B get the gradients that
    they would get from it (straight through the rounding).
    """

    weight: Tensor  # MXFP4 blocks uint8 (E, out, G, 16), words of tiles, or dense (E, in, out)
    scales: Tensor | None  # uint8 (E, out, G), or those of tiles; None if dense
    bias: Tensor  # (E, out)
    a: Tensor | None = None  # (E, r, in)
    b: Tensor | None = None  # (E, out, r)
    scaling: float = 1.0
    dropout: float = 0.0
    merged: bool = False
    tiles: kernels.Tiles | None = None  # weight and scales, if they are in tiles

    def adapted(self) -> kernels.Adapted:
        """Return what a GPU's kernels read of experts in tiles."""
        assert self.tiles is not None, "the experts were not put into tiles"
        return kernels.Adapted(self.tiles, self.bias, self.a, self.b, self.scaling, self.dropout, self.merged)

    def dense(self, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the weights of some experts, (n, in, out), decoded if need be."""
        if self.scales is None:
            return self.weight[experts]
        assert self.tiles is None, "the experts were put into tiles for a GPU's kernels: load the model again"
        return kernels.decode(self.weight[experts], self.scales[experts], dtype).mT


class Routing(NamedTuple):
    """Which row holds what, rows being (token, chosen expert) pairs sorted by expert."""

    slots: Tensor  # int64 (M,): the choice n k + j that each row is
    tokens: Tensor  # int64 (M,): the token n of each row
    rows: Tensor  # int64 (N, k): the row of each choice
    counts: list[int]  # (E,) rows per expert
    chosen: Tensor  # int64 (N, k)

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Routing:
        """Sort the choices int64 (N, k) by expert, tokens in order within each."""
        flat = chosen.reshape(-1)
        slots = flat.argsort(stable=True)  # (M,)
        rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
        counts = torch.bincount(flat, minlength=num_experts).tolist()
        return cls(slots, slots // chosen.shape[1], rows.view_as(chosen), counts, chosen)

    def chunks(self, size: int) -> Iterator[tuple[slice, slice, list[int]]]:
        """Yield (experts, rows, counts) of `size` experts at a time, leaving out those without a token."""
        ends = [0, *accumulate(self.counts)]
        for first in range(0, len(self.counts), size):
            last = min(first + size, len(self.counts))
            if ends[first] < ends[last]:
                yield slice(first, last), slice(ends[first], ends[last]), self.counts[first:last]


class Activation(NamedTuple):
    """The constants of gpt-oss' clamped SwiGLU."""

    alpha: float
    limit: float


class Shown(NamedTuple):
    """What an observer sees of a forward pass: some rows of some experts, sorted by expert."""

    experts: slice
    counts: list[int]  # rows of each of them
    x: Tensor  # (N, C), all tokens
    tokens: Tensor  # int64 (m,), which of them each row is
    gate: Tensor  # (m, I)
    up: Tensor  # (m, I)
    hidden: Tensor  # (m, I), what down_proj reads

    @property
    def inputs(self) -> Tensor:
        """What gate_up_proj reads, (m, C)."""
        return self.x.index_select(0, self.tokens)


class Experts(nn.Module):
    """The experts of one layer."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: Activation, experts: ExpertFormat
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = ExpertLinear(num_experts, hidden_size, 2 * intermediate_size, experts)
        self.down_proj = ExpertLinear(num_experts, intermediate_size, hidden_size, experts)

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        routing: Routing,
        *,
        recompute: bool = False,
        show: Callable[[Shown], None] | None = None,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, (N, C).

        Differentiable in `x`, `weights`, the LoRA factors, and biases and dense weights if they require a gradient.
        Every sum has a fixed order: results are reproducible bit for bit on a CPU.

        Args:
            x: (N, C). weights: (N, k), the softmax over the chosen.
            recompute: keep no pre-activations for the backward pass; it multiplies by gate_up once more.
            show: is called for every chunk of experts with a token.
        """
        projections = self.gate_up_proj.projection(), self.down_proj.projection()
        if projections[0].tiles is None:
            return run_plain(x, weights, routing, projections, self.activation, recompute=recompute, show=show)
        adapted = projections[0].adapted(), projections[1].adapted()
        shown = _shown(x, routing, show)
        return kernels.run_trained(x, weights, routing, adapted, self.activation, recompute=recompute, show=shown)


def _shown(
    x: Tensor, routing: Routing, show: Callable[[Shown], None] | None
) -> Callable[[Tensor, Tensor], None] | None:
    """Return what takes all rows' pre-activations (M, 2 I) and hidden values (M, I) to an observer."""
    if show is None:
        return None
    every = slice(0, len(routing.counts))
    return lambda pre, hidden: show(
        Shown(every, routing.counts, x, routing.tokens, *gate_and_up(pre, halves=False), hidden)
    )


def run_plain(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    projections: tuple[Projection, Projection],
    activation: Activation,
    *,
    recompute: bool = False,
    show: Callable[[Shown], None] | None = None,
) -> Tensor:
    """Run gate_up and down as `Experts.forward` says, in plain PyTorch."""
    tensors = [t for p in projections for t in (p.weight, p.scales, p.bias, p.a, p.b)]
    lora = tuple((p.scaling, p.dropout, p.merged) for p in projections)
    return _RunExperts.apply(x, weights, _Options(routing, activation, recompute, show, lora), *tensors)


class _Options(NamedTuple):
    routing: Routing
    activation: Activation
    recompute: bool
    show: Callable[[Shown], None] | None
    lora: tuple[tuple[float, float, bool], ...]  # scaling, dropout and merged of gate_up, of down


class _RunExperts(torch.autograd.Function):
    """See `Experts.forward`; tensors are weight, scales, bias, a, b of gate_up, then of down."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, options: _Options, *tensors: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        gate_up, down = _linears(options, tensors, x.dtype)
        routing = options.routing
        keep = any(ctx.needs_input_grad)
        results = x.new_empty(len(routing.slots), x.shape[1])  # (M, C)
        saved: list[Tensor | None] = []
        for experts, rows, counts in routing.chunks(_chunk_size(gate_up, x)):
            real_counts = counts
            counts, filling = _filled(counts, x)
            inputs = x.index_select(0, F.pad(routing.tokens[rows], (0, filling)))  # (m, C)
            masks = gate_up.dropout_mask(inputs), down.dropout_mask(inputs)
            pre, low_in = gate_up.forward(inputs, experts, counts, masks[0])  # (m, 2 I), (m, r)
            hidden = swiglu(pre, options.activation, gate_up.halves)  # (m, I)
            if options.show is not None:
                parts = (part[: len(part) - filling] for part in (*gate_and_up(pre, gate_up.halves), hidden))
                options.show(Shown(experts, real_counts, x, routing.tokens[rows], *parts))
            y, low_out = down.forward(hidden, experts, counts, masks[1])  # (m, C), (m, r)
            results[rows] = y[: len(y) - filling]
            if keep:
                saved += [*masks] if options.recompute else [*masks, pre, low_in, low_out]
        if keep:
            ctx.options, ctx.num_tensors = options, len(tensors)
            ctx.save_for_backward(x, weights, *tensors, *saved)
        return weighted_sum(results, routing.rows, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weights, *rest = ctx.saved_tensors
        options, tensors, saved = ctx.options, rest[: ctx.num_tensors], iter(rest[ctx.num_tensors :])
        gate_up, down = _linears(options, tensors, x.dtype)
        routing = options.routing
        gate_up.open_gradients(ctx.needs_input_grad[3:8])
        down.open_gradients(ctx.needs_input_grad[8:13])
        slopes = weights.new_empty(len(routing.slots))  # (M,): to the weight of each row
        grad_inputs = x.new_empty(len(routing.slots), x.shape[1])  # (M, C)
        of_rows = weights.reshape(-1)[routing.slots].unsqueeze(1)  # (M, 1)
        for experts, rows, counts in routing.chunks(_chunk_size(gate_up, x)):
            counts, filling = _filled(counts, x)
            tokens = F.pad(routing.tokens[rows], (0, filling))
            inputs = x.index_select(0, tokens)  # (m, C)
            masks = next(saved), next(saved)
            if options.recompute:
                pre, low_in = gate_up.forward(inputs, experts, counts, masks[0])
            else:
                pre, low_in = next(saved), next(saved)
            hidden = swiglu(pre, options.activation, gate_up.halves)  # (m, I)
            low_out = down.low_rank(hidden, experts, counts, masks[1]) if options.recompute else next(saved)
            # The result of a row is w (W h + b): its gradient to w needs W h + b, which is not kept, but
            # g (W h + b) = (g W) h + g b, and g W is needed anyway.
            upstream = grad.index_select(0, tokens)  # (m, C), not yet times w
            scale = F.pad(of_rows[rows], (0, 0, 0, filling))  # (m, 1), 0 for what fills up
            grad_hidden = down.grad_input(upstream, experts, counts, masks[1])  # (m, I), times w below
            slope = row_dot(grad_hidden, hidden).add_(row_dot(upstream, down.row_bias(experts, counts)))
            slopes[rows] = slope[: len(slope) - filling].to(slopes.dtype)
            down.add_gradients(upstream * scale, hidden, low_out, experts, counts, masks[1])
            grad_pre = swiglu_backward(grad_hidden.mul_(scale), pre, options.activation, gate_up.halves)
            if ctx.needs_input_grad[0]:
                grad_input = gate_up.grad_input(grad_pre, experts, counts, masks[0])
                grad_inputs[rows] = grad_input[: len(grad_input) - filling]
            gate_up.add_gradients(grad_pre, inputs, low_in, experts, counts, masks[0])
        grad_x = weighted_sum(grad_inputs, routing.rows, None) if ctx.needs_input_grad[0] else None
        return grad_x, slopes[routing.rows], None, *gate_up.gradients(), *down.gradients()


def _linears(options: _Options, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[_Linear, _Linear]:
    gate_up, down = (
        Projection._make((*of, *constants, None))  # in no tiles
        for of, constants in ((tensors[:5], options.lora[0]), (tensors[5:], options.lora[1]))
    )
    # Decoding can put gate and up in halves, which are cheaper to work on than alternating columns; dense weights are
    # used where they lie.
    return _Linear(gate_up, dtype, halves=gate_up.scales is not None), _Linear(down, dtype, halves=False)


def _chunk_size(gate_up: _Linear, x: Tensor) -> int:
    """Return how many experts are worked on at a time: one on a CPU, where its rows stay in cache."""
    if not kernels.on_gpu(x):
        return 1
    return max(1, CHUNK_BYTES // (gate_up.num_weights * x.element_size()))


def _filled(counts: list[int], x: Tensor) -> tuple[list[int], int]:
    """Return the counts of a chunk filled up to one of a few sizes, and how many rows that adds.

    On a CPU, oneDNN compiles a bf16 product anew for every number of rows, which takes longer than the product; the
    numbers of an expert's tokens are never the same twice. Filling adds 6% to the rows of 256 tokens, on average.
    """
    if kernels.on_gpu(x) or x.dtype != torch.bfloat16:
        return counts, 0
    (count,) = counts
    step = next((step for step, most in ((1, 8), (8, 32), (16, 128), (32, 512), (64, 2048)) if count <= most), 256)
    size = -(-count // step) * step
    return [size], size - count


class _Linear:
    """A projection during one pass: products of a chunk's rows, grouped by expert, and the gradients collected."""

    def __init__(self, projection: Projection, dtype: torch.dtype, *, halves: bool) -> None:
        self.p, self.dtype, self.halves = projection, dtype, halves
        self.bias = self._ordered(projection.bias).to(dtype)  # (E, out)
        self.num_weights = projection.weight[0].numel() * (1 if projection.scales is None else 2)  # of one expert
        self.a = self.b = None
        if projection.a is not None and projection.b is not None:
            self.a = padded(projection.a.to(dtype), 1)  # (E, r, in)
            scaled = self._ordered(projection.b) * projection.scaling
            self.b = padded(scaled.to(dtype), 2)  # (E, out, r), times scaling

    def _ordered(self, x: Tensor) -> Tensor:
        """Bring (E, out, ...) from the checkpoint's order, gate and up alternating, into halves, if that is used."""
        return torch.cat([x[:, 0::2], x[:, 1::2]], dim=1) if self.halves else x

    def weights(self, experts: slice) -> Tensor:
        """Return (n, in, out) in `dtype`."""
        if not self.halves:
            return self.p.dense(experts, self.dtype)
        assert self.p.scales is not None, "only decoded weights are put in halves"
        assert self.p.tiles is None, "the experts were put into tiles for a GPU's kernels: load the model again"
        blocks, scales = self.p.weight[experts], self.p.scales[experts]
        blocks = blocks.unflatten(1, (-1, 2)).transpose(1, 2)  # (n, 2, I, G, 16)
        scales = scales.unflatten(1, (-1, 2)).transpose(1, 2)
        return kernels.decode(blocks, scales, self.dtype).flatten(1, 2).mT

    def dropout_mask(self, like: Tensor) -> Tensor | None:
        """Return a fresh mask (m, in) of 0 and 1 / (1 - p) for the input of the LoRA term; None without dropout."""
        if self.a is None or self.p.dropout == 0:
            return None
        keep = 1 - self.p.dropout
        return like.new_empty(len(like), self.a.shape[2]).bernoulli_(keep).div_(keep)

    def forward(
        self, x: Tensor, experts: slice, counts: list[int], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(m, in) -> (m, out) with bias and LoRA, and the LoRA product (m, r)."""
        weights, low = self.weights(experts), self.low_rank(x, experts, counts, mask)
        if low is not None and not self.p.merged:
            assert self.b is not None
            # One product over both, and so one rounding. Added to a y that is bf16 already, what is less than half of
            # its last place would be lost: 87% of a delta of 0.02% of the weights, 45% of one of 0.1%.
            x, weights = torch.cat([x, low], 1), torch.cat([weights.mT, self.b[experts]], 2).mT
        return grouped_mm(x, weights, counts, self.bias[experts]), low

    def low_rank(self, x: Tensor, experts: slice, counts: list[int], mask: Tensor | None) -> Tensor | None:
        """(m, in) -> drop(x) A^T (m, r); None without factors."""
        if self.a is None:
            return None
        return grouped_mm(x if mask is None else x * mask, self.a[experts].mT, counts)

    def row_bias(self, experts: slice, counts: list[int]) -> Tensor:
        """Return the bias of each row, (m, out); one row if all are alike."""
        if len(counts) == 1:
            return self.bias[experts]
        repeats = torch.tensor(counts, device=self.bias.device)
        return self.bias[experts].repeat_interleave(repeats, dim=0, output_size=sum(counts))

    def grad_input(self, grad: Tensor, experts: slice, counts: list[int], mask: Tensor | None) -> Tensor:
        """(m, out) -> (m, in)."""
        result = grouped_mm(grad, self.weights(experts).mT, counts)
        if self.a is not None and self.b is not None and not self.p.merged:
            low = grouped_mm(grad, self.b[experts], counts)  # (m, r)
            if mask is None:
                add_grouped_mm(result, low, self.a[experts], counts)
            else:
                result.add_(grouped_mm(low, self.a[experts], counts).mul_(mask))
        return result

    def open_gradients(self, needed: Sequence[bool]) -> None:
        """Prepare to collect gradients; `needed` is of weight, scales, bias, a, b."""
        weight, _, bias, a, b = needed

        def zeros(wanted: bool, like: Tensor | None) -> Tensor | None:
            return torch.zeros_like(like) if wanted and like is not None else None

        self.grad_weight, self.grad_bias = zeros(weight, self.p.weight), zeros(bias, self.bias)
        self.grad_a, self.grad_b = zeros(a, self.a), zeros(b, self.b)

    def add_gradients(
        self, grad: Tensor, x: Tensor, low: Tensor | None, experts: slice, counts: list[int], mask: Tensor | None
    ) -> None:
        """Collect the gradients to everything that needs one, from the gradient (m, out) to the result."""
        if self.grad_weight is not None:
            self.grad_weight[experts] = grouped_outer(x, grad, counts)
        if self.grad_bias is not None:
            self.grad_bias[experts] = torch.stack([part.sum(0) for part in grad.split(counts)])
        if self.grad_b is not None and low is not None:
            self.grad_b[experts] = grouped_outer(grad, low, counts)
        if self.grad_a is not None and self.b is not None:
            back = grouped_mm(grad, self.b[experts], counts)  # (m, r)
            self.grad_a[experts] = grouped_outer(back, x if mask is None else x * mask, counts)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients to weight, scales, bias, a, b, in their own order and dtypes."""
        grad_a = grad_b = grad_bias = None
        if self.grad_bias is not None:
            grad_bias = self._original(self.grad_bias).to(self.p.bias.dtype)
        if self.grad_a is not None and self.p.a is not None:
            grad_a = self.grad_a[:, : self.p.a.shape[1]].to(self.p.a.dtype)
        if self.grad_b is not None and self.p.b is not None:
            grad_b = self.grad_b[..., : self.p.b.shape[2]]
            grad_b = self._original(grad_b).to(self.p.b.dtype).mul_(self.p.scaling)
        return self.grad_weight, None, grad_bias, grad_a, grad_b

    def _original(self, x: Tensor) -> Tensor:
        """Undo `_ordered`."""
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if self.halves else x


def padded(x: Tensor, dim: int) -> Tensor:
    """Fill a LoRA rank up with zeros to a multiple of 8 on a GPU, whose grouped products need 16-byte strides."""
    missing = -x.shape[dim] % 8 if kernels.on_gpu(x) else 0
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def grouped_mm(x: Tensor, weights: Tensor, counts: list[int], bias: Tensor | None = None) -> Tensor:
    """Multiply the next counts[e] rows of x (m, K) by weights[e], of (n, K, L), and add bias[e]; return (m, L)."""
    if len(counts) == 1:
        return x @ weights[0] if bias is None else torch.addmm(bias[0], x, weights[0])
    if kernels.on_gpu(x) and x.dtype == torch.bfloat16:
        y = F.grouped_mm(x, weights, offs=_offsets(counts, x.device))
    else:
        y = torch.cat([part @ weights[e] for e, part in enumerate(x.split(counts))])
    if bias is not None:
        repeats = torch.tensor(counts, device=x.device)
        y += bias.repeat_interleave(repeats, dim=0, output_size=len(x))
    return y


def add_grouped_mm(y: Tensor, x: Tensor, weights: Tensor, counts: list[int]) -> None:
    """y += grouped_mm(x, weights), in place."""
    if len(counts) == 1:
        y.addmm_(x, weights[0])
    else:
        y.add_(grouped_mm(x, weights, counts))


def grouped_outer(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """Return (n, P, Q): for each expert, left^T right over its rows, of (m, P) and (m, Q)."""
    if len(counts) == 1:
        return (left.mT @ right).unsqueeze(0)
    if kernels.on_gpu(left) and left.dtype == torch.bfloat16:
        return F.grouped_mm(left.mT, right, offs=_offsets(counts, left.device))
    pairs = zip(left.split(counts), right.split(counts), strict=True)
    return torch.stack([a.mT @ b for a, b in pairs])


def _offsets(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def weighted_sum(results: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return (N, C): the sum of the rows (N, k) of results (M, C), times weights (N, k) if given."""
    if results.dtype == torch.float64 or len(rows) == 0:
        picked = results[rows]  # (N, k, C)
        return (picked if weights is None else picked * weights.unsqueeze(-1)).sum(1)
    return F.embedding_bag(rows, results, per_sample_weights=weights, mode="sum")  # gathers and sums in one pass


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of rows (m,) in fp32 or better; b may have one row for all of a's."""
    dtype = torch.promote_types(torch.float32, a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    return a @ b[0] if len(b) == 1 else torch.linalg.vecdot(a, b)


def gate_and_up(pre: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Split (m, 2 I) into gate and up, (m, I) each: halves, or even and odd columns as checkpoints have them."""
    width = pre.shape[1] // 2
    return (pre[:, :width], pre[:, width:]) if halves else (pre[:, 0::2], pre[:, 1::2])


def swiglu(pre: Tensor, activation: Activation, halves: bool = False) -> Tensor:
    """(m, 2 I) -> (m, I): the gate is clamped above, up on both sides; computed in fp32 or better."""
    dtype = torch.promote_types(torch.float32, pre.dtype)
    result = pre.new_empty(len(pre), pre.shape[1] // 2)
    for rows in _cached_rows(pre):
        gate, up = (half.to(dtype, copy=True) for half in gate_and_up(pre[rows], halves))
        gate.clamp_(max=activation.limit).mul_(activation.alpha)
        up.clamp_(-activation.limit, activation.limit).add_(1).mul_(1 / activation.alpha)
        # gate * sigmoid(alpha gate) is silu(alpha gate) / alpha.
        result[rows] = F.silu(gate, inplace=True).mul_(up)
    return result


def swiglu_backward(grad: Tensor, pre: Tensor, activation: Activation, halves: bool = False) -> Tensor:
    """Return the gradient (m, 2 I) to `pre` from that to `swiglu` (m, I); nothing passes a clamp."""
    dtype = torch.promote_types(torch.float32, pre.dtype)
    limit, alpha = activation.limit, activation.alpha
    result = torch.empty_like(pre)
    for rows in _cached_rows(pre):
        gate, up = (half.to(dtype, copy=True) for half in gate_and_up(pre[rows], halves))
        over, beyond = _above(gate, limit), _above(up.abs(), limit)
        upstream = grad[rows].to(dtype)
        scaled = gate.clamp_(max=limit).mul_(alpha)
        slope = torch.ops.aten.silu_backward(up.clamp_(-limit, limit).add_(1).mul_(upstream), scaled)
        of_up = F.silu(scaled, inplace=True).mul_(upstream).mul_(1 / alpha)
        grad_gate, grad_up = gate_and_up(result[rows], halves)
        grad_gate.copy_(slope if over is None else slope.masked_fill_(over, 0))
        grad_up.copy_(of_up if beyond is None else of_up.masked_fill_(beyond, 0))
    return result


def _above(x: Tensor, limit: float) -> Tensor | None:
    """Return where x exceeds the limit, or None if it nowhere does: looking is cheaper than masking (CPU)."""
    if x.device.type == "cpu" and not bool(x.amax() > limit):
        return None
    return x > limit


def _cached_rows(x: Tensor) -> Iterator[slice]:
    """Yield slices of rows that stay in a core's cache between one elementwise operation and the next."""
    size = max(1, (GPU_VALUES if kernels.on_gpu(x) else CACHED_VALUES) // x.shape[1])
    for start in range(0, len(x), size):
        yield slice(start, start + size)
