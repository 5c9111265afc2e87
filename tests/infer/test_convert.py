"""Conversion between layouts: byte-exact renames, exact expansion, and nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from oracles import slow_decode
from safetensors.torch import load_file, save_file

from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.convert import convert
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
