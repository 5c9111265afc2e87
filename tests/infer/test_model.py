"""The model against transformers' GptOssForCausalLM and against itself with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from oracles import slow_decode, transformers_model

import gptoss_infer as gi
from gptoss_infer import mxfp4
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.config import ModelConfig, RopeConfig
from gptoss_infer.loading import expand_experts
from gptoss_infer.model import GptOss, rope_frequencies

CASES = {
    "groups_of_4_top_2": {},
    "groups_of_8_top_4": {"num_attention_heads": 16, "num_key_value_heads": 2, "num_experts_per_tok": 4},
    "groups_of_3_top_1": {"num_attention_heads": 9, "num_key_value_heads": 3, "num_experts_per_tok": 1},
    "plain_rope": {"rope": RopeConfig(factor=1.0, original_max_position_embeddings=1024)},
    "truncated_yarn": {"rope": RopeConfig(factor=8.0, original_max_position_embeddings=64, truncate=True)},
}


@pytest.mark.parametrize("layout", ["hf", "original", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_on_prompts_longer_than_window_and_context(
    tmp_path: Path, case: str, layout: str
) -> None:
    directory = write_tiny(tmp_path / "base", tiny_config(**CASES[case]), "bf16" if layout == "bf16" else "mxfp4")
    input_ids = torch.randint(0, 512, (2, 210), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers_model(directory)(input_ids=input_ids).logits
    if layout == "original":
        if CASES[case].get("rope", RopeConfig()).truncate:
            pytest.skip("the original layout's config cannot say truncate")
        convert(directory, tmp_path / "original", "original")
        directory = tmp_path / "original"
    model = gi.load(directory, device="cpu", dtype=torch.float32, experts="bf16" if layout == "bf16" else "mxfp4")
    with torch.no_grad():
        logits = model(input_ids)
    scale = expected.abs().max()
    assert (logits - expected).abs().max() <= 1e-4 * scale, ((logits - expected).abs().max() / scale).item()


def test_experts_in_mxfp4_and_expanded_give_the_same_logits(tiny_checkpoint: Path) -> None:
    input_ids = torch.arange(40)[None]
    packed = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32, experts="mxfp4")
    dense = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32, experts="bf16")
    assert torch.allclose(packed(input_ids), dense(input_ids), atol=1e-4)


def test_bf16_logits_stay_within_bf16_noise_of_fp32(tiny_checkpoint: Path) -> None:
    input_ids = torch.arange(100)[None]
    exact = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32)(input_ids)
    coarse = gi.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)(input_ids).float()
    # A token on the edge between two experts may take the other one, so the bound holds for most tokens, not for all.
    error = (coarse - exact).abs().amax(-1) / exact.abs().max()
    assert error.median() < 0.05


def test_gradients_through_mxfp4_experts_equal_autograd_through_the_dense_formulation(tiny_checkpoint: Path) -> None:
    packed = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32, experts="mxfp4")
    dense = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32, experts="bf16")
    grads = []
    for model in (packed, dense):
        names = [
            name for name, _ in model.named_parameters() if not name.endswith("_proj.weight") or "experts" not in name
        ]
        for name in names:
            model.get_parameter(name).requires_grad_(True)
        model(torch.arange(60)[None]).logsumexp(-1).sum().backward()
        grads.append({name: model.get_parameter(name).grad for name in names})
    for name, expected in grads[1].items():
        assert torch.allclose(grads[0][name], expected, atol=1e-4 * expected.abs().max().item() + 1e-6), name


def test_yarn_frequencies_match_the_published_values_of_gpt_oss() -> None:
    inverse, concentration = rope_frequencies(64, RopeConfig())
    # From the reference implementation at theta 150000, factor 32, beta 32 and 1, original context 4096.
    published = {0: 1.0, 8: 0.050813275, 9: 0.031705696, 12: 0.0067949595, 17: 0.0001293187, 31: 3.0235114e-07}
    for index, value in published.items():
        assert inverse[index].item() == pytest.approx(value, rel=1e-5)
    assert concentration == pytest.approx(1.3465735902799727, rel=1e-12)


def test_only_experts_that_are_hit_are_computed(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    seen: list[tuple[int, ...]] = []
    decode = mxfp4.decode
    monkeypatch.setattr(mxfp4, "decode", lambda b, s, dtype: seen.append(tuple(b.shape)) or decode(b, s, dtype))
    model(torch.tensor([[7]]))
    config = model.config
    assert len(seen) == 2 * config.num_experts_per_tok * config.num_hidden_layers
    assert all(shape[0] == 1 for shape in seen), "one expert at a time"


def test_published_shapes_give_the_parameter_counts_of_the_model_card() -> None:
    from gptoss_infer.checkpoint.layouts import expected_shapes

    for layers, experts, total in ((24, 32, 20_914_757_184), (36, 128, 116_829_156_672)):
        kinds = ("sliding_attention", "full_attention") * (layers // 2)
        config = ModelConfig(layers, 2880, 2880, experts, 4, 64, 8, 64, 201088, 128, kinds)
        assert sum(torch.Size(s).numel() for s in expected_shapes(config, "bf16").values()) == total
        with torch.device("meta"):
            assert sum(p.numel() for p in GptOss(config, "bf16").parameters()) == total


def test_expanding_experts_transposes_the_square_down_projection(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "square", tiny_config(intermediate_size=64))
    checkpoint = Checkpoint.open(directory)
    name = "model.layers.0.mlp.experts.down_proj"
    expected = slow_decode(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales"))
    assert torch.equal(expand_experts(checkpoint, 0, "down_proj", torch.float32), expected.transpose(1, 2))


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_loading_tells_how_far_it_is_and_ends_at_one(tiny_checkpoint: Path, experts: str) -> None:
    shares: list[float] = []
    gi.load(tiny_checkpoint, device="cpu", experts=experts, progress=shares.append)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1
    assert len(shares) > 20


def test_mapped_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    config = tiny_config(num_local_experts=64, hidden_size=256, intermediate_size=512)
    directory = write_tiny(tmp_path / "base", config)
    before = resident()
    model = gi.load(directory, device="cpu", dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert held > 40e6
    assert resident() - before < held / 4
