"""Conversion between layouts: byte-exact renames, exact expansion, and nothing lost on the way; and bf16 to MXFP4."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from oracles import slow_decode
from safetensors.torch import load_file, save_file

from gptoss_infer import rounding
from gptoss_infer.adapter import Target
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.checkpoint.quantize import quantize, summary_lines
from gptoss_infer.config import RopeConfig
from gptoss_infer.errors import DataError, UsageError

SMALL = tiny_config(num_hidden_layers=2, vocab_size=64)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = write_tiny(tmp_path / "base", SMALL)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).write_text(f"this is {name}")
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "MANIFEST.json"}


def test_hf_to_original_to_hf_is_byte_identical_file_by_file(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert files_of(tmp_path / "back") == files_of(small)


def test_config_bytes_come_back_however_they_were_formatted(tmp_path: Path, small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    odd = json.dumps(dict(reversed(config.items())) | {"of_others": "ü"}, indent=7, ensure_ascii=False)
    (small / "config.json").write_text(odd, encoding="utf-8")
    convert(small, tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "config.json").read_text(encoding="utf-8") == odd


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_sharding_does_not_change_a_tensor_in_either_layout(tmp_path: Path, small: Path, limit: int) -> None:
    convert(small, tmp_path / "original", "original", max_shard_bytes=limit)
    convert(tmp_path / "original", tmp_path / "back", "hf", max_shard_bytes=limit)
    expected = random_tensors(SMALL, "mxfp4")
    for directory in (tmp_path / "original", tmp_path / "back"):
        checkpoint = Checkpoint.open(directory)
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


def test_the_original_layout_has_openais_names_and_stacks_q_k_and_v(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original")
    stored = load_file(tmp_path / "original" / "model.safetensors")
    tensors = random_tensors(SMALL, "mxfp4")
    # The names of openai/gpt-oss's reference loader.
    per_layer = (
        "attn.norm.scale", "attn.qkv.weight", "attn.qkv.bias", "attn.sinks", "attn.out.weight", "attn.out.bias",
        "mlp.norm.scale", "mlp.gate.weight", "mlp.gate.bias", "mlp.mlp1_weight.blocks", "mlp.mlp1_weight.scales",
        "mlp.mlp1_bias", "mlp.mlp2_weight.blocks", "mlp.mlp2_weight.scales", "mlp.mlp2_bias",
    )  # fmt: skip
    expected = {f"block.{n}.{name}" for n in range(2) for name in per_layer}
    assert set(stored) == expected | {"embedding.weight", "norm.scale", "unembedding.weight"}
    for kind in ("weight", "bias"):
        parts = [tensors[f"model.layers.1.self_attn.{p}_proj.{kind}"] for p in "qkv"]
        assert torch.equal(stored[f"block.1.attn.qkv.{kind}"], torch.cat(parts))


def test_original_files_of_others_without_our_side_file_convert_to_hf(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original")
    (tmp_path / "original" / "hf_config.json").unlink()
    (tmp_path / "original" / "MANIFEST.json").unlink()
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert Checkpoint.open(tmp_path / "back").config == SMALL
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_a_side_file_of_another_model_is_refused(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original")
    side = tmp_path / "original" / "hf_config.json"
    side.write_text(json.dumps(json.loads(side.read_text()) | {"sliding_window": 17}))
    (tmp_path / "original" / "MANIFEST.json").unlink()
    with pytest.raises(UsageError, match="describe different models"):
        convert(tmp_path / "original", tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("via", ["hf", "original"])
def test_bf16_experts_are_the_exact_values_transposed_and_all_else_keeps_its_bytes(
    tmp_path: Path, small: Path, via: Literal["hf", "original"]
) -> None:
    source = small
    if via == "original":
        convert(small, tmp_path / "original", "original")
        source = tmp_path / "original"
    convert(source, tmp_path / "bf16", "bf16")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    tensors = random_tensors(SMALL, "mxfp4")
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            exact = slow_decode(tensor, tensors[name.replace("_blocks", "_scales")]).transpose(1, 2)
            expanded = stored.pop(name.removesuffix("_blocks"))
            assert expanded.dtype == torch.bfloat16
            assert torch.equal(expanded.float(), exact), name
        elif not name.endswith("_scales"):
            assert torch.equal(stored.pop(name), tensor), name
    assert not stored
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "bf16").iterdir()} == {
        "MANIFEST.json", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip


def test_bf16_expansion_equals_transformers_dequantization(tmp_path: Path, small: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    convert(small, tmp_path / "bf16", "bf16")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    tensors = random_tensors(SMALL, "mxfp4")
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(stored[key], convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"]))


@pytest.mark.parametrize("to", ["hf", "original"])
def test_bf16_experts_are_never_rounded_by_a_conversion(tmp_path: Path, to: Literal["hf", "original"]) -> None:
    source = write_tiny(tmp_path / "base", SMALL, "bf16")
    with pytest.raises(UsageError, match="holds bf16 experts; writing them as MXFP4 rounds"):
        convert(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_what_the_original_config_cannot_express_is_refused_and_nothing_written(tmp_path: Path) -> None:
    config = tiny_config(rope=RopeConfig(factor=8.0, original_max_position_embeddings=64, truncate=True))
    source = write_tiny(tmp_path / "base", config)
    with pytest.raises(DataError, match="cannot express this model"):
        convert(source, tmp_path / "out", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_q_k_and_v_of_different_dtypes_cannot_become_one_tensor(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, small / "model.safetensors")
    with pytest.raises(DataError, match=r"k_proj\.weight is torch\.float32"):
        convert(small, tmp_path / "out", "original")


def test_dtypes_of_single_tensors_survive_both_ways(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    mixed = {name: t.float() if "norm" in name else t.half() if "lm_head" in name else t for name, t in tensors.items()}
    save_file(mixed, small / "model.safetensors", metadata={"format": "pt"})
    convert(small, tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_an_existing_target_is_replaced_only_when_asked(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "out", "original")
    with pytest.raises(UsageError, match="exists"):
        convert(small, tmp_path / "out", "bf16")
    assert Checkpoint.open(tmp_path / "out").layout == "original"
    convert(small, tmp_path / "out", "bf16", overwrite=True)
    assert Checkpoint.open(tmp_path / "out").experts == "bf16"


def test_converting_a_checkpoint_onto_itself_reads_all_before_it_replaces_anything(small: Path) -> None:
    expected = random_tensors(SMALL, "mxfp4")
    convert(small, small, "original", overwrite=True)
    checkpoint = Checkpoint.open(small)
    assert checkpoint.layout == "original"
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


# bf16 to MXFP4

DOWN, GATE_UP = (f"model.layers.1.mlp.experts.{weight}" for weight in ("down_proj", "gate_up_proj"))
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)  # OCP MX v1.0, table 5
RULES: tuple[rounding.Rounding, ...] = ("stochastic", "systematic", "nearest")


def fine_tune(base: Path, target: Path, changes: dict[str, torch.Tensor] | None = None) -> Path:
    """A bf16 checkpoint as a peer would write it: `base` expanded, `changes` added, and no manifest."""
    convert(base, target, "bf16")
    (target / "MANIFEST.json").unlink()
    tensors = load_file(target / "model.safetensors")
    for name, change in (changes or {}).items():
        tensors[name] = (tensors[name].float() + change).bfloat16()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noise(name: str, size: float, experts: list[int]) -> dict[str, torch.Tensor]:
    """A change of some experts of a projection of SMALL, (E, in, out)."""
    shape = (6, 96, 64) if name.endswith("down_proj") else (6, 64, 192)
    change = torch.zeros(shape)
    change[experts] = torch.randn(len(experts), *shape[1:], generator=torch.Generator().manual_seed(3)) * size
    return {name: change}


def experts_of(directory: Path, name: str) -> torch.Tensor:
    """All experts of a projection, (E, out, in), by the specification's rules."""
    checkpoint = Checkpoint.open(directory)
    if checkpoint.experts == "bf16":
        return checkpoint.tensor(name).float().transpose(1, 2)
    return slow_decode(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales"))


@pytest.mark.parametrize("rule", RULES)
def test_bf16_converted_back_like_its_base_is_the_base_byte_for_byte(
    tmp_path: Path, small: Path, rule: rounding.Rounding
) -> None:
    # -0 and scale bytes from one end to the last whose every value bf16 holds, among the random ones.
    tensors = random_tensors(SMALL, "mxfp4")
    tensors[f"{DOWN}_scales"].view(-1)[:253] = torch.arange(253)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    fine_tune(small, tmp_path / "bf16")
    convert(small, tmp_path / "original", "original")
    for number, base in enumerate((small, tmp_path / "original")):
        quantized = quantize(tmp_path / "bf16", tmp_path / f"back{number}", like=base, rule=rule, seed=5)
        assert files_of(tmp_path / f"back{number}") == files_of(small)
        assert not any(kind.weights_changed for kind in quantized.against_base)
        assert "no expert differs from the base's" in "\n".join(summary_lines(quantized))


def test_the_bases_config_is_kept_byte_for_byte_only_if_it_says_the_same(tmp_path: Path, small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    odd = json.dumps(dict(reversed(config.items())), indent=7)
    (small / "config.json").write_text(odd)
    source = fine_tune(small, tmp_path / "bf16")
    quantize(source, tmp_path / "same", like=small)
    assert (tmp_path / "same" / "config.json").read_text() == odd
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"of_peers": 1}))
    quantize(source, tmp_path / "other", like=small)
    written = json.loads((tmp_path / "other" / "config.json").read_text())
    assert written == raw | {"of_peers": 1, "quantization_config": config["quantization_config"]}


def test_without_a_base_values_that_mxfp4_holds_are_written_exactly(tmp_path: Path, small: Path) -> None:
    source = fine_tune(small, tmp_path / "bf16")
    quantized = quantize(source, tmp_path / "out")
    for name in (DOWN, GATE_UP):
        assert torch.equal(experts_of(tmp_path / "out", name), experts_of(small, name))
    assert "down_proj: every value is written exactly" in "\n".join(summary_lines(quantized))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "mxfp4"


def test_without_a_base_no_value_is_further_off_than_the_specification_allows(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "bf16", SMALL, "bf16")
    quantized = quantize(source, tmp_path / "out")
    asked, written = experts_of(source, DOWN).double(), experts_of(tmp_path / "out", DOWN).double()
    # OCP's scale, 2**(floor(log2 amax) - 2), brings a block's largest magnitude to 4..8: the widest half step is 1, and
    # 6 is up to 2 below. The other scale that may be chosen has a least squared error below that.
    blocks = asked.unflatten(-1, (-1, 32))
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    nearest = (blocks.abs() / scale).unsqueeze(-1).sub(GRID).abs().amin(-1)
    allowed = (nearest * scale).square().sum(-1)
    assert bool(((blocks - written.unflatten(-1, (-1, 32))).square().sum(-1) <= allowed).all())
    error = float((written - asked).square().sum() / asked.square().sum()) ** 0.5
    (line,) = [line for line in summary_lines(quantized) if "down_proj" in line]
    # Both layers have the same distribution; theirs together is within a tenth of that of one.
    assert float(re.search(r"error ([\d.]+)%", line)[1]) == pytest.approx(100 * error, rel=0.1)  # type: ignore[index]


@pytest.mark.parametrize("rule", RULES)
def test_a_fine_tune_of_one_expert_touches_only_the_blocks_that_it_changed(
    tmp_path: Path, small: Path, rule: rounding.Rounding
) -> None:
    change = noise(DOWN, 0.05, [3])
    change[DOWN][3, :32] = 0  # the first block of each row
    attention = "model.layers.0.self_attn.q_proj.weight"
    change[attention] = torch.ones(128, 64)
    source = fine_tune(small, tmp_path / "bf16", change)
    quantized = quantize(source, tmp_path / "out", like=small, rule=rule)
    theirs, tuned = load_file(small / "model.safetensors"), load_file(source / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, tuned.get(name, theirs[name]) if name != f"{DOWN}_blocks" else tensor), name
    changed = (written[f"{DOWN}_blocks"] != theirs[f"{DOWN}_blocks"]).any(-1)  # (E, out, G)
    assert changed.nonzero()[:, 0].unique().tolist() == [3]
    assert not changed[3, :, 0].any()
    kinds = {kind.name: kind for kind in quantized.against_base}
    assert {name for name, kind in kinds.items() if kind.weights_changed} == {"experts.down_proj", "attention"}
    down = kinds["experts.down_proj"]
    assert (down.experts_changed, down.experts, down.blocks_changed) == (1, 12, int(changed.sum()))
    assert (down.scales_changed, down.blocks) == (0, 12 * 64 * 3)
    assert down.values_changed == int((experts_of(tmp_path / "out", DOWN) != experts_of(small, DOWN)).sum())
    assert kinds["attention"].values_changed == int((tuned[attention] != theirs[attention]).sum())


def test_nearest_writes_the_element_of_the_bases_grid_that_is_nearest_to_the_fine_tune(
    tmp_path: Path, small: Path
) -> None:
    source = fine_tune(small, tmp_path / "bf16", noise(GATE_UP, 0.1, [0, 5]))
    quantize(source, tmp_path / "out", like=small, rule="nearest")
    asked, written = experts_of(source, GATE_UP).double(), experts_of(tmp_path / "out", GATE_UP).double()
    scales = Checkpoint.open(small).tensor(f"{GATE_UP}_scales").double()
    scale = torch.exp2(scales - 127).repeat_interleave(32, -1)
    nearest = (asked.abs() / scale).unsqueeze(-1).sub(GRID).abs().amin(-1) * scale
    assert torch.equal((written - asked).abs(), nearest)
    assert bool((written != experts_of(small, GATE_UP).double()).any())


def test_experts_are_rounded_under_the_names_of_an_export_so_that_both_write_the_same(
    tmp_path: Path, small: Path
) -> None:
    source = fine_tune(small, tmp_path / "bf16", noise(DOWN, 0.05, [2, 4]))
    asked, theirs, base = experts_of(source, DOWN), experts_of(small, DOWN), Checkpoint.open(small)
    for rule in RULES:
        quantize(source, tmp_path / rule, like=small, rule=rule, seed=9)
        for expert in range(6):
            name = f"{Target(1, 'down_proj').module}.{expert}"
            delta = asked[expert] - theirs[expert]
            expected = rounding.merge(base.expert_blocks(1, "down_proj", expert), delta, rule, seed=9, name=name)
            assert torch.equal(Checkpoint.open(tmp_path / rule).expert_blocks(1, "down_proj", expert)[0], expected)


def test_the_same_seed_gives_the_same_bytes_in_any_shards_and_another_seed_others(tmp_path: Path, small: Path) -> None:
    source = fine_tune(small, tmp_path / "bf16", noise(DOWN, 0.05, [0, 1, 2, 3, 4, 5]))
    for name, seed, limit in (("a", 1, 10**9), ("b", 1, 10**9), ("sharded", 1, 20_000), ("other", 2, 10**9)):
        quantize(source, tmp_path / name, like=small, seed=seed, max_shard_bytes=limit)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    one, sharded, other = (Checkpoint.open(tmp_path / name) for name in ("a", "sharded", "other"))
    assert all(torch.equal(one.tensor(name), sharded.tensor(name)) for name in one.names())
    differing = [name for name in one.names() if not torch.equal(one.tensor(name), other.tensor(name))]
    assert differing == [f"{DOWN}_blocks"]


def test_a_change_smaller_than_half_a_step_is_kept_on_average_and_nearest_warns_that_it_is_lost(
    tmp_path: Path, small: Path
) -> None:
    # The smallest scale of the random ones is 2**-7, half its smallest step 2**-9; bf16 has at least 2**-11 for its
    # values below 1/16, so this change is written into most small weights of the fine-tune.
    change = {name: torch.full(shape, 2.0**-10) for name, shape in ((DOWN, (6, 96, 64)), (GATE_UP, (6, 64, 192)))}
    source = fine_tune(small, tmp_path / "bf16", change)
    lost = "\n".join(summary_lines(quantize(source, tmp_path / "nearest", like=small, rule="nearest")))
    assert "warning: 0% of experts.down_proj's delta was written" in lost
    quantized = quantize(source, tmp_path / "stochastic", like=small)
    asked, written, base = (experts_of(path, DOWN).double() for path in (source, tmp_path / "stochastic", small))
    delta = asked - base
    kept = float(((written - base) * delta).sum() / delta.square().sum())
    (down,) = [one for one in quantized.survival if one.name == "experts.down_proj"]
    assert down.kept == pytest.approx(kept, rel=1e-9)
    # A draw with probability p of a step s has variance s² p (1 - p) < s d, here s <= 2**-3 * 2 (scale 2**-3, step 2).
    assert abs(kept - 1) < 5 * (0.25 * float(delta.abs().pow(3).sum())) ** 0.5 / float(delta.square().sum())


def test_a_base_that_is_not_the_fine_tunes_is_warned_of(tmp_path: Path, small: Path) -> None:
    stranger = write_tiny(tmp_path / "stranger", SMALL, seed=1)
    quantized = quantize(fine_tune(small, tmp_path / "bf16"), tmp_path / "out", like=stranger)
    assert "is this the base it came from" in "\n".join(summary_lines(quantized))


def test_tokens_that_a_fine_tune_added_do_not_matter_to_its_experts(tmp_path: Path, small: Path) -> None:
    source = fine_tune(small, tmp_path / "bf16")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, source / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"vocab_size": 72}))
    quantized = quantize(source, tmp_path / "out", like=small)
    assert Checkpoint.open(tmp_path / "out").config.vocab_size == 72
    assert [k.name for k in quantized.against_base if k.weights_changed] == ["embedding", "unembedding"]
    assert torch.equal(experts_of(tmp_path / "out", DOWN), experts_of(small, DOWN))


@pytest.mark.parametrize("changes", [{"num_local_experts": 8}, {"num_hidden_layers": 3}, {"sliding_window": 17}])
def test_a_base_of_another_architecture_is_refused_with_the_fields_that_differ(
    tmp_path: Path, small: Path, changes: dict[str, int]
) -> None:
    other = write_tiny(tmp_path / "other", tiny_config(**{"num_hidden_layers": 2, "vocab_size": 64} | changes))
    source = fine_tune(small, tmp_path / "bf16")
    with pytest.raises(UsageError, match=f"is no base of .*differ in {next(iter(changes))}"):
        quantize(source, tmp_path / "out", like=other)
    assert not (tmp_path / "out").exists()


def test_what_is_no_fine_tune_or_no_base_is_refused(tmp_path: Path, small: Path) -> None:
    source = fine_tune(small, tmp_path / "bf16")
    with pytest.raises(UsageError, match=r"holds MXFP4 experts already.* Use --to hf"):
        quantize(small, tmp_path / "out", like=small)
    with pytest.raises(UsageError, match="holds bf16 experts, which have no scales to keep"):
        quantize(source, tmp_path / "out", like=source)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        quantize(source, tmp_path / "out", like=small)
    quantize(source, tmp_path / "out", like=small, overwrite=True)
    assert Checkpoint.open(tmp_path / "out").experts == "mxfp4"


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_naming_tensor_and_expert(
    tmp_path: Path, small: Path, like: bool, value: float
) -> None:
    change = noise(GATE_UP, 0.0, [])
    change[GATE_UP][4, 7, 9] = value
    source = fine_tune(small, tmp_path / "bf16", change)
    with pytest.raises(DataError, match=rf"{re.escape(GATE_UP)}, expert 4: 1 of 12288 values are NaN or infinite"):
        quantize(source, tmp_path / "out", like=small if like else None)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "bf16"}


def test_a_base_whose_scale_is_nan_is_an_error_naming_tensor_and_expert(tmp_path: Path, small: Path) -> None:
    source = fine_tune(small, tmp_path / "bf16")
    tensors = random_tensors(SMALL, "mxfp4")
    tensors[f"{DOWN}_scales"][2, 0, 0] = 255
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(DataError, match=rf"{re.escape(DOWN)}, expert 2: .* scale bytes of 253 or more"):
        quantize(source, tmp_path / "out", like=small)
