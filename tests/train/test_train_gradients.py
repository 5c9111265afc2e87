"""Losses and gradients of every trainable tensor against a dense formulation: merged weights, one document at a time.

The formulation is written here with plain torch: W + scaling B A for every expert, every expert on every token, a full
score matrix, the whole softmax over the vocabulary, and autograd in fp64.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, write_tiny
from oracles import slow_decode
from safetensors.torch import load_file, save_file

import gptoss_infer as gi
from gptoss_infer import experts as experts_module
from gptoss_infer.adapter import ATTENTION, EXPERTS, ROUTER, Target
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.lora import all_targets, attach, factors_of
from gptoss_infer.model import GptOss, rope_frequencies
from gptoss_train.data import Sample, pack
from gptoss_train.loss import Unembedding

CONFIG = tiny_config(num_experts_per_tok=2)
TARGETS = all_targets(CONFIG.num_hidden_layers, (*ATTENTION, *EXPERTS, ROUTER))
SCALING = 2.0
# Window edges (16), one token, more than a block of queries.
LENGTHS = [1, 15, 16, 17, 140]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("gradients") / "base")


def write_base(directory: Path) -> Path:
    """A random checkpoint whose expert 2 is never among the best and whose SwiGLU clamps often bite."""
    write_tiny(directory, CONFIG)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(CONFIG.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        tensors[f"{prefix}router.bias"][2] = -100
        tensors[f"{prefix}experts.gate_up_proj_bias"] *= 4
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def samples(seed: int = 1) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, CONFIG.vocab_size, (length + 1,), generator=generator)
        labels = (torch.rand(length + 1, generator=generator) < 0.5).to(torch.uint8)
        labels[-1] = 1
        made.append(Sample(ids, labels))
    return made


def attached(base: Path, dtype: torch.dtype, experts: str = "mxfp4", dropout: float = 0.0) -> GptOss:
    """Our model with random factors, which are fp32 (fp64 for fp64)."""
    model = gi.load(base, device="cpu", dtype=dtype, experts=experts)
    attach(model, TARGETS, rank=4, alpha=4 * SCALING, dropout=dropout, rslora=False)
    generator = torch.Generator().manual_seed(2)
    for pair in factors_of(model, TARGETS).values():
        for parameter in pair:
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = value.to(torch.promote_types(torch.float32, dtype))
    return model.train()


def our_loss(model: GptOss, seed: int = 1, **options: object) -> torch.Tensor:
    batch = pack(samples(seed))
    labelled = batch.channels > 0
    hidden = model.hidden(batch.input_ids[None], batch.positions[None], **options)[0]
    losses = Unembedding.of(model.lm_head.weight).losses(hidden[labelled], batch.targets[labelled])
    return losses.sum() / len(losses)


def dense_gradients(base: Path, dtype: torch.dtype, seed: int = 1) -> dict[tuple[Target, str], torch.Tensor]:
    checkpoint = Checkpoint.open(base)
    tensors = {}
    for name in checkpoint.names():
        if name.endswith("_blocks"):
            blocks, scales = checkpoint.tensor(name), checkpoint.tensor(name.replace("_blocks", "_scales"))
            tensors[name.removesuffix("_blocks")] = slow_decode(blocks, scales).to(dtype)  # (E, out, in)
        elif not name.endswith("_scales"):
            tensors[name] = checkpoint.tensor(name).to(dtype)
    wide = torch.promote_types(torch.float32, dtype)
    leaves = {}
    for target, pair in factors_of(attached(base, dtype), TARGETS).items():
        for side, value in zip("AB", pair, strict=True):
            leaves[target, side] = value.detach().clone().to(wide).requires_grad_(True)
    total, labels = torch.zeros((), dtype=wide), 0
    for sample in samples(seed):
        logits = dense_logits(sample.token_ids[:-1].long(), tensors, leaves, dtype)
        labelled = sample.channels[1:] > 0
        total = total + F.cross_entropy(
            logits.to(wide)[labelled], sample.token_ids[1:].long()[labelled], reduction="sum"
        )
        labels += int(labelled.sum())
    (total / labels).backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def dense_logits(ids: torch.Tensor, tensors: dict, leaves: dict, dtype: torch.dtype) -> torch.Tensor:
    wide, d = torch.promote_types(torch.float32, dtype), CONFIG.head_dim
    inverse, scale = rope_frequencies(d, CONFIG.rope)
    angles = torch.arange(len(ids)).unsqueeze(1).float() * inverse
    cos, sin = (angles.cos() * scale).to(dtype).unsqueeze(1), (angles.sin() * scale).to(dtype).unsqueeze(1)
    distance = torch.arange(len(ids)).unsqueeze(1) - torch.arange(len(ids))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x.to(wide)
        return (y * (y.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).rsqrt() * tensors[name].to(wide)).to(
            dtype
        )

    def merged(layer: int, weight: str, name: str) -> torch.Tensor:
        a, b = (leaves[Target(layer, weight), side] for side in "AB")
        return (tensors[name].to(wide) + SCALING * (b @ a)).to(dtype)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = tensors["model.embed_tokens.weight"][ids]
    for layer, kind in enumerate(CONFIG.layer_types):
        p = f"model.layers.{layer}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v, o = (merged(layer, f"{n}_proj", f"{p}self_attn.{n}_proj.weight") for n in "qkvo")
        q, k, v = (
            F.linear(h, w, tensors[f"{p}self_attn.{n}_proj.bias"]).unflatten(-1, (-1, d))
            for n, w in zip("qkv", (q, k, v), strict=True)
        )
        groups = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
        k, v = rotated(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", rotated(q), k).to(wide) * d**-0.5
        window = CONFIG.sliding_window if kind == "sliding_attention" else len(ids)
        scores = scores.masked_fill(~((distance >= 0) & (distance < window)), -torch.inf)
        sinks = tensors[f"{p}self_attn.sinks"].to(wide).view(-1, 1, 1).expand(-1, len(ids), 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(dtype)
        attended = torch.einsum("hts,shd->thd", weights, v).flatten(1)
        x = x + F.linear(attended, o, tensors[f"{p}self_attn.o_proj.bias"])
        h = norm(x, p + "post_attention_layernorm.weight")
        router = F.linear(h, merged(layer, ROUTER, f"{p}mlp.router.weight"), tensors[f"{p}mlp.router.bias"])
        top, chosen = router.topk(CONFIG.num_experts_per_tok)
        gates = torch.zeros_like(router).scatter(1, chosen, top.to(wide).softmax(-1).to(dtype))  # (T, E)
        e = p + "mlp.experts."
        pre = torch.einsum("tc,eoc->teo", h, merged(layer, "gate_up_proj", e + "gate_up_proj"))
        pre = pre + tensors[e + "gate_up_proj_bias"]
        gate, up = pre[..., 0::2].clamp(max=CONFIG.swiglu_limit), pre[..., 1::2]
        up = up.clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit)
        inner = gate * torch.sigmoid(CONFIG.swiglu_alpha * gate) * (up + 1)
        out = (
            torch.einsum("tei,eoi->teo", inner, merged(layer, "down_proj", e + "down_proj"))
            + tensors[e + "down_proj_bias"]
        )
        x = x + (out * gates.unsqueeze(-1)).sum(1)
    return norm(x, "model.norm.weight") @ tensors["lm_head.weight"].T


def our_gradients(model: GptOss, **options: object) -> dict[tuple[Target, str], torch.Tensor]:
    our_loss(model, **options).backward()
    pairs = factors_of(model, TARGETS)
    return {(target, side): f.grad for target, pair in pairs.items() for side, f in zip("AB", pair, strict=True)}


@pytest.fixture(scope="module")
def exact(base: Path) -> dict[tuple[Target, str], torch.Tensor]:
    return dense_gradients(base, torch.float64)


OPTIONS: list[dict[str, object]] = [
    {}, {"recompute": "experts"}, {"recompute": "layers"}, {"recompute": "layers", "offload": True},
]  # fmt: skip


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_fp64_every_gradient_is_that_of_the_dense_formulation_to_1e_9(
    base: Path, exact: dict, options: dict[str, object], experts: str
) -> None:
    got = our_gradients(attached(base, torch.float64, experts), **options)
    for key, expected in exact.items():
        assert expected.norm() > 0, f"{key}: nothing to compare"
        assert (got[key] - expected).norm() <= 1e-9 * expected.norm(), key


def test_in_fp32_every_gradient_is_that_of_the_dense_formulation_to_1e_5(base: Path, exact: dict) -> None:
    got = our_gradients(attached(base, torch.float32))
    for key, expected in exact.items():
        assert (got[key] - expected).norm() <= 1e-5 * expected.norm(), key


def test_in_bf16_the_gradients_err_no_more_than_those_of_the_dense_bf16_formulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every expert is chosen: else a token on the edge between two may take the other one, by chance in either
    # formulation, and a few such tokens outweigh all rounding.
    every = replace(CONFIG, num_experts_per_tok=CONFIG.num_local_experts)
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", every)
    base = write_base(tmp_path / "base")

    def error(gradients: dict, exact: dict) -> float:
        # Factors of expert 2, whose weight is next to nothing, have next to no gradient; the norm is over all experts.
        return float(torch.stack([(gradients[k].double() - e).norm() / e.norm() for k, e in exact.items()]).mean())

    ours, dense = [], []
    for seed in range(6):  # one draw of tokens tells little: a few of them are at the edge of a clamp
        exact = dense_gradients(base, torch.float64, seed)
        ours.append(error(our_gradients(attached(base, torch.bfloat16), seed=seed), exact))
        dense.append(error(dense_gradients(base, torch.bfloat16, seed), exact))
    print(f"mean relative error in bf16: ours {statistics.mean(ours):.5f}, dense {statistics.mean(dense):.5f}")
    assert statistics.mean(ours) <= 1.05 * statistics.mean(dense), (ours, dense)


def test_working_through_several_experts_at_a_time_changes_nothing(
    base: Path, exact: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "_chunk_size", lambda gate_up, x: 4)
    got = our_gradients(attached(base, torch.float64))
    for key, expected in exact.items():
        assert (got[key] - expected).norm() <= 1e-9 * expected.norm(), key


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_with_dropout_the_gradient_is_the_slope_of_the_loss_under_the_same_mask(
    base: Path, options: dict[str, object]
) -> None:
    model = attached(base, torch.float64, dropout=0.3)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return our_loss(model, **options)

    loss().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(6)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum(float((p.grad * v).sum()) for p, v in zip(parameters, along, strict=True))
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p += sign * step * v
            values.append(float(loss()))
            for p, v in zip(parameters, along, strict=True):
                p -= sign * step * v
    # A central difference errs by step^2 and by 1e-16 / step.
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_the_frozen_bytes_are_never_written(base: Path) -> None:
    model = attached(base, torch.float32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    our_loss(model).backward()
    optimizer.step()
    assert before, "MXFP4 bytes are buffers"
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
