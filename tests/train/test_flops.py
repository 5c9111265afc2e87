"""FLOPs against hand-worked numbers, published totals, and torch's own counter on a dense formulation written here."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gptoss_infer.adapter import ATTENTION, EXPERTS
from gptoss_infer.config import ModelConfig
from gptoss_train.devices import peak_flops
from gptoss_train.flops import LoraShape, Recompute, forward_flops, mfu, num_pairs, step_flops


def published(layers: int, experts: int) -> ModelConfig:
    """The published shapes of gpt-oss-20b (24 layers, 32 experts) and 120b (36, 128)."""
    return tiny_config(
        num_hidden_layers=layers, hidden_size=2880, intermediate_size=2880, num_local_experts=experts,
        num_experts_per_tok=4, num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
        sliding_window=128,
    )  # fmt: skip


# ---- by hand

TINY = ModelConfig(
    num_hidden_layers=2, hidden_size=4, intermediate_size=3, num_local_experts=5, num_experts_per_tok=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=2, vocab_size=7, sliding_window=2,
    layer_types=("sliding_attention", "full_attention"),
)  # fmt: skip


def test_forward_of_a_tiny_model_is_the_number_worked_out_by_hand() -> None:
    """Documents of 3 and 1 tokens, 2 labels, rank 1 on q_proj and down_proj of one layer."""
    flops = forward_flops(TINY, [3, 1], 2, LoraShape(1, ("q_proj",), ("down_proj",), 1))
    # q 4x4, k 4x2, v 4x2, o 4x4: 48 multiply-adds, 4 tokens, 2 layers
    assert flops.attention_projections == 2 * 48 * 4 * 2
    # pairs: full 1+2+3 and 1, window of 2 1+2+2 and 1: 13; two products of 2 heads of size 2
    assert flops.attention_scores == 2 * (2 * 13 * 4)
    # gate_up 4x6 and down 3x4: 36 multiply-adds, 2 experts, 4 tokens, 2 layers
    assert flops.experts == 2 * 36 * 2 * 4 * 2
    assert flops.router == 2 * 4 * 5 * 4 * 2
    assert flops.unembedding == 2 * 4 * 7 * 2
    # q: 4+4 once a token; down: 3+4 for each of 2 experts
    assert flops.lora == 2 * (8 + 2 * 7) * 4
    assert flops.recomputed == 0
    assert flops.total == 768 + 208 + 1152 + 320 + 112 + 176


@pytest.mark.parametrize(
    ("recompute", "repeated"),
    [
        ("none", 104),  # Q K^T: one of the two products of 208
        ("experts", 104 + 768 + 48),  # and gate_up: 24 of the experts' 36 parts of 1152; and down's A: 3, 8 times
        ("layers", 104 + 768 + 208 + 1152 + 320 + 176),  # and everything but the unembedding
    ],
)
def test_a_step_of_a_tiny_model_is_the_number_worked_out_by_hand(recompute: Recompute, repeated: int) -> None:
    flops = step_flops(TINY, [3, 1], 2, LoraShape(1, ("q_proj",), ("down_proj",), 1), recompute)
    assert flops == (2 * 768, 3 * 208, 2 * 1152, 2 * 320, 2 * 112, 3 * 176, repeated)
    assert flops.useful == 2 * (768 + 1152 + 320 + 112) + 3 * (208 + 176)
    assert flops.total == flops.useful + repeated


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 50])
def test_pairs_are_those_of_the_mask(tokens: int) -> None:
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert num_pairs(tokens, "full_attention", 16) == causal.sum()
    assert num_pairs(tokens, "sliding_attention", 16) == causal.triu(-15).sum()


def test_packed_documents_cost_as_much_as_each_on_its_own() -> None:
    lora = LoraShape(8, ATTENTION, EXPERTS, 3)
    together = step_flops(tiny_config(), [40, 7, 1], 48, lora, "layers")
    alone = [step_flops(tiny_config(), [n], n, lora, "layers") for n in (40, 7, 1)]
    assert together == tuple(sum(parts) for parts in zip(*alone, strict=True))


# ---- published totals


@pytest.mark.parametrize(
    ("layers", "experts", "tokens", "gflop"),
    [(24, 32, 4096, 7.64), (24, 32, 8192, 8.04), (24, 32, 32768, 10.5), (36, 128, 4096, 10.9)],
)
def test_forward_per_token_agrees_with_totals_worked_out_elsewhere(
    layers: int, experts: int, tokens: int, gflop: float
) -> None:
    """From 3.607 and 5.131 billion weights in products, flash attention, windows counted."""
    per_token = forward_flops(published(layers, experts), [tokens], tokens).total / tokens / 1e9
    assert per_token == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "experts", "tokens", "gflop"),
    [(24, 32, 4096, 15.7), (24, 32, 8192, 800 / 47.3), (24, 32, 32768, 800 / 33.1), (36, 128, 4096, 800 / 35.6)],
)
def test_useful_operations_of_a_frozen_step_agree_with_totals_worked_out_elsewhere(
    layers: int, experts: int, tokens: int, gflop: float
) -> None:
    """Those of "4 N + attention", most of them given as thousands of tokens per second at 800 TFLOP/s."""
    flops = step_flops(published(layers, experts), [tokens], tokens, None, "layers")
    assert flops.useful / tokens / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize(("layers", "experts", "billions"), [(24, 32, 3.607), (36, 128, 5.131)])
def test_a_frozen_step_costs_four_operations_per_weight_and_token_and_recomputing_two_more(
    layers: int, experts: int, billions: float
) -> None:
    config, tokens = published(layers, experts), 4096
    plain, repeating = (step_flops(config, [tokens], tokens, None, recompute) for recompute in ("none", "layers"))
    assert (plain.useful - plain.attention_scores) / tokens / 4e9 == pytest.approx(billions, rel=1e-3)
    unembedding = 201088 * 2880 / 1e9  # not in the layers, so not repeated
    repeated = repeating.recomputed - plain.recomputed - plain.attention_scores // 3
    assert repeated / tokens / 2e9 == pytest.approx(billions - unembedding, rel=1e-3)


# ---- torch's counter on a dense formulation

FULL = tiny_config(layer_types=("full_attention",) * 3, vocab_size=96)


class Weights:
    """Frozen random weights, and factors that train for what `lora` adapts; experts share theirs, at equal cost."""

    def __init__(self, config: ModelConfig, lora: LoraShape | None) -> None:
        c, i = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.config = config
        shapes = {"q_proj": (q, c), "k_proj": (kv, c), "v_proj": (kv, c), "o_proj": (c, q)}
        shapes |= {"gate_up_proj": (2 * i, c), "down_proj": (c, i), "router": (config.num_local_experts, c)}
        self.base = {name: torch.randn(shape) for name, shape in shapes.items()}
        self.factors = {}
        for name in (*lora.dense, *lora.experts) if lora else ():
            out, into = shapes[name]
            a, b = torch.randn(lora.rank if lora else 0, into), torch.randn(out, lora.rank if lora else 0)
            self.factors[name] = (a.requires_grad_(), b.requires_grad_())

    def project(self, x: Tensor, name: str, adapted: bool) -> Tensor:
        y = F.linear(x, self.base[name])
        if adapted and name in self.factors:
            a, b = self.factors[name]
            y = y + F.linear(F.linear(x, a), b)
        return y

    def layer(self, x: Tensor, adapted: bool) -> Tensor:
        """(T, C) -> (T, C): attention over all T x T pairs, then k experts for each token."""
        config, t = self.config, x.shape[0]
        q, k, v = (
            self.project(x, name, adapted).view(t, -1, config.head_dim).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )  # (H or K, T, D)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)  # (H, T, D)
        x = x + self.project(mixed.transpose(0, 1).reshape(t, -1), "o_proj", adapted)
        weights, chosen = F.linear(x, self.base["router"]).topk(config.num_experts_per_tok)  # (T, k)
        rows = x[:, None].expand(-1, chosen.shape[1], -1).reshape(-1, x.shape[1])  # (T k, C)
        gate, up = self.project(rows, "gate_up_proj", adapted).chunk(2, -1)
        out = self.project(F.silu(gate) * up, "down_proj", adapted).view(t, chosen.shape[1], -1)
        return x + (out * weights.softmax(-1)[..., None]).sum(1)


def counted(config: ModelConfig, tokens: int, labels: int, lora: LoraShape | None, repeat: bool | None) -> int:
    """Operations that torch counts: forward (`repeat` None), or with backward, whose layers run twice or not."""
    weights = Weights(config, lora)
    unembedding = torch.randn(config.vocab_size, config.hidden_size)
    x = torch.randn(tokens, config.hidden_size).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        for n in range(config.num_hidden_layers):
            adapted = lora is not None and n < lora.num_layers
            # The re-entrant checkpoint repeats a layer to its end; the other stops at the last tensor it needs.
            x = checkpoint(weights.layer, x, adapted, use_reentrant=True) if repeat else weights.layer(x, adapted)
        loss = F.linear(x[tokens - labels :], unembedding).logsumexp(-1).sum()
        if repeat is not None:
            loss.backward()
    return counter.get_total_flops()


LORAS = [
    None,
    LoraShape(4, ATTENTION, EXPERTS, 3),
    LoraShape(3, ("k_proj", "o_proj"), (), 3),
    LoraShape(5, (), ("gate_up_proj",), 2),
]


@pytest.mark.parametrize(("lora", "tokens"), [*itertools.product(LORAS, [1, 13, 48])])
def test_forward_is_what_torch_counts_on_a_dense_formulation(lora: LoraShape | None, tokens: int) -> None:
    labels = tokens // 2
    flops = forward_flops(FULL, [tokens], labels, lora)
    square = flops.attention_scores * tokens**2 // num_pairs(tokens, "full_attention", 1)  # it masks nothing
    expected = counted(FULL, tokens, labels, lora, None)
    assert flops.total - flops.attention_scores + square == expected


@pytest.mark.parametrize(("lora", "tokens", "repeat"), [*itertools.product(LORAS, [1, 13, 48], [False, True])])
def test_a_step_is_what_torch_counts_on_a_dense_formulation(lora: LoraShape | None, tokens: int, repeat: bool) -> None:
    labels = (tokens + 1) // 2
    flops = step_flops(FULL, [tokens], labels, lora, "layers" if repeat else "none")
    one_product = flops.attention_scores // 6
    # Dense attention keeps its scores: backward repeats none, but a repeated forward has its two products.
    products = 6 + 2 * repeat
    square = products * one_product * tokens**2 // num_pairs(tokens, "full_attention", 1)
    expected = counted(FULL, tokens, labels, lora, repeat)
    assert flops.total - (products + 1) * one_product + square == expected


def test_repeating_the_experts_first_half_is_what_torch_counts_for_gate_up_and_the_first_factor_of_down() -> None:
    lora = LoraShape(4, ATTENTION, EXPERTS, 2)
    weights, x = Weights(FULL, lora), torch.randn(13, FULL.hidden_size)
    rows = x.repeat_interleave(FULL.num_experts_per_tok, 0)
    with FlopCounterMode(display=False) as counter:
        for n in range(3):
            weights.project(rows, "gate_up_proj", adapted=n < lora.num_layers)
            if n < lora.num_layers:
                torch.mm(torch.randn(len(rows), FULL.intermediate_size), torch.randn(FULL.intermediate_size, lora.rank))
    experts, none = (step_flops(FULL, [13], 5, lora, recompute) for recompute in ("experts", "none"))
    assert experts.total - none.total == counter.get_total_flops()
    assert experts.useful == none.useful


# ---- refusals, peaks, utilisation


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="a length of 0"):
        forward_flops(TINY, [3, 0], 0)
    with pytest.raises(ValueError, match="num_labels is 4, expected 0 to the number of tokens, 3"):
        forward_flops(TINY, [3], 4)
    with pytest.raises(ValueError, match="num_layers is 3, the model has 2"):
        forward_flops(TINY, [3], 3, LoraShape(1, ATTENTION, (), 3))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307.4), ("AMD Instinct MI300X OAM", 1307.4),
    ],
)  # fmt: skip
def test_peaks_are_dense_bf16_of_the_data_sheets(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu", "", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H200 NVL",
        "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-16GB",
    ],
)  # fmt: skip
def test_a_device_of_another_speed_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_utilisation_of_known_runs_is_the_published_one() -> None:
    """NeMo AutoModel, full pre-training of 20b at 4096 tokens on H100: 13,058 tokens/s per GPU printed as 28.2%.

    Training all weights costs three forward passes, where ours repeats nothing and counts 2.
    """
    forward = forward_flops(published(24, 32), [4096], 4096)
    trained = forward._replace(**{part: 3 * value for part, value in forward._asdict().items()})
    assert mfu(trained, 4096 / 13_058, 989e12) == pytest.approx(0.282, rel=0.08)  # they count attention differently


def test_recomputing_does_not_raise_the_utilisation() -> None:
    config = published(24, 32)
    rates = {
        mfu(step_flops(config, [4096], 100, None, recompute), 1.0, 989.4e12)
        for recompute in ("none", "experts", "layers")
    }
    assert len(rates) == 1
