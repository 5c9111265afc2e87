"""What `inspect` reports, against numbers worked out by hand and files changed on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from safetensors.torch import load_file, save_file

from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.checkpoint.inspect import (
    compare,
    comparison_lines,
    inspect,
    summary_lines,
    table_lines,
    tensor_table,
)
from gptoss_infer.errors import DataError

SMALL = tiny_config(num_hidden_layers=1, vocab_size=64)
# By hand: embedding and head 2 * 64 * 64; norms 3 * 64; q 128 * 64 + 128; k and v 2 * (32 * 64 + 32); o 64 * 128 + 64;
# sinks 8; router 6 * 64 + 6; experts 6 * (192 * 64 + 192 + 64 * 96 + 64).
PARAMETERS = 8192 + 192 + 8320 + 4160 + 8256 + 8 + 390 + 6 * (12288 + 192 + 6144 + 64)
EXPERT_BYTES = 6 * (192 * 64 + 64 * 96) // 32 * 17


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small", SMALL)


def test_parameters_and_bytes_are_those_counted_by_hand_in_every_layout(tmp_path: Path, small: Path) -> None:
    dense = 2 * (PARAMETERS - 6 * (12288 + 6144))
    for to in ("hf", "original"):
        convert(small, tmp_path / to, to)
        _, summary = inspect(tmp_path / to)
        assert (summary.layout, summary.experts, summary.manifest) == (to, "mxfp4", "verified")
        assert summary.parameters == PARAMETERS
        assert summary.bytes_by_dtype == {"BF16": dense, "U8": EXPERT_BYTES}
    convert(small, tmp_path / "bf16", "bf16")
    _, summary = inspect(tmp_path / "bf16")
    assert (summary.experts, summary.parameters) == ("bf16", PARAMETERS)
    assert summary.bytes_by_dtype == {"BF16": 2 * PARAMETERS}


def test_the_table_lists_every_tensor_as_it_is_stored(small: Path) -> None:
    table = {row.name: row for row in tensor_table(Checkpoint.open(small))}
    tensors = random_tensors(SMALL, "mxfp4")
    assert table.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert table[name].shape == tuple(tensor.shape)
        assert table[name].num_bytes == tensor.numel() * tensor.element_size()
    assert len(list(table_lines(list(table.values())))) == len(tensors)


def test_a_checkpoint_equals_itself_and_its_other_layout(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original")
    for other in (small, tmp_path / "original"):
        comparison = compare(Checkpoint.open(small), Checkpoint.open(other))
        assert (comparison.identical, comparison.differing) == (22, [])
        assert "identical: all 22 tensors" in "\n".join(comparison_lines(comparison))


def test_a_change_of_one_bit_is_reported_with_its_tensor_and_both_hashes(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    tensors[name][2, 3, 1, 7] ^= 16
    other = write_tiny(tmp_path / "other", SMALL)
    save_file(tensors, other / "model.safetensors")
    comparison = compare(Checkpoint.open(other), Checkpoint.open(small))
    (difference,) = comparison.differing
    assert (difference.name, difference.changed, difference.elements) == (name, 1, tensors[name].numel())
    assert difference.sha256 != difference.base_sha256
    assert comparison.identical == 21


def test_a_changed_sign_of_zero_or_nan_payload_is_a_difference(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    tensors["model.norm.weight"][:2] = torch.tensor([0.0, float("nan")])
    save_file(tensors, small / "model.safetensors")
    assert not compare(Checkpoint.open(small), Checkpoint.open(small)).differing
    tensors["model.norm.weight"][0] = -0.0
    other = write_tiny(tmp_path / "other", SMALL)
    save_file(tensors, other / "model.safetensors")
    assert [d.changed for d in compare(Checkpoint.open(other), Checkpoint.open(small)).differing] == [1]


def test_another_dtype_is_a_difference_even_where_values_are_equal(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    other = write_tiny(tmp_path / "other", SMALL)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, other / "model.safetensors")
    comparison = compare(Checkpoint.open(other), Checkpoint.open(small))
    assert [(d.name, d.changed) for d in comparison.differing] == [("model.norm.weight", None)]
    assert "another dtype or shape" in "\n".join(comparison_lines(comparison))


def test_layers_that_only_one_side_has_are_listed(tmp_path: Path, small: Path) -> None:
    deeper = write_tiny(tmp_path / "deeper", tiny_config(num_hidden_layers=2, vocab_size=64))
    comparison = compare(Checkpoint.open(small), Checkpoint.open(deeper))
    assert len(comparison.missing) == 19
    assert all(name.startswith("model.layers.1.") for name in comparison.missing)


def test_experts_of_other_shapes_in_another_format_are_listed_as_missing_and_added(tmp_path: Path, small: Path) -> None:
    wider = write_tiny(tmp_path / "wider", tiny_config(num_hidden_layers=1, vocab_size=64, num_local_experts=7), "bf16")
    comparison = compare(Checkpoint.open(wider), Checkpoint.open(small))
    assert [name.rpartition(".")[2] for name in comparison.added] == ["gate_up_proj", "down_proj"]
    assert len(comparison.missing) == 4
    assert comparison.weights == []


GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{weight}" for weight in ("gate_up_proj", "down_proj"))


def edited(directory: Path, tensors: dict[str, torch.Tensor], experts: str = "mxfp4") -> Checkpoint:
    write_tiny(directory, SMALL, experts)
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_experts_blocks_codes_scales_and_values_that_differ_are_counted(
    tmp_path: Path, small: Path, layout: Literal["hf", "original"]
) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    blocks, scales = tensors[f"{DOWN}_blocks"], tensors[f"{DOWN}_scales"]
    blocks[1, 0, 0, 0] = 0x21
    blocks[4, 63, 2, 15] = 0x21
    blocks[4, 63, 1, 3] = 0x80
    blocks[5, 7, 1] = 0x11  # a block of halves at scale s ...
    base = edited(tmp_path / "base", tensors)
    blocks[1, 0, 0, 0] = 0x43  # two codes of a byte
    blocks[4, 63, 2, 15] = 0x31  # one
    blocks[4, 63, 1, 3] = 0x08  # two, both zeros: no value
    blocks[5, 7, 1] = 0x22  # ... is one of ones at s - 1
    scales[5, 7, 1] -= 1
    tensors["model.layers.0.mlp.router.bias"][2] += 1
    edited(tmp_path / "ours", tensors)
    convert(tmp_path / "ours", tmp_path / "form", layout)
    comparison = compare(Checkpoint.open(tmp_path / "form"), base)
    (weight,) = comparison.weights
    assert (weight.name, weight.which_experts, weight.experts) == (DOWN, [1, 4, 5], 6)
    assert (weight.blocks_changed, weight.blocks) == (4, 6 * 64 * 3)
    assert (weight.codes_changed, weight.values_changed, weight.values) == (2 + 1 + 2 + 32, 3, 6 * 64 * 96)
    assert weight.scales_changed == 1
    kinds = {kind.name: kind for kind in comparison.kinds}
    assert {name for name, kind in kinds.items() if kind.weights_changed} == {"router", "experts.down_proj"}
    assert (kinds["router"].values_changed, kinds["router"].values) == (1, 6 * 64 + 6)
    text = "\n".join(comparison_lines(comparison))
    assert f"{DOWN}: blocks 0.347%, codes 0.1%, values 0.00814%, scales 0.0868%; experts 1, 4-5" in text
    assert f"{'router':<20}  1 of 2 changed: values 0.256%" in text
    assert "experts.gate_up_proj  0 of 1 changed\n" in text


def test_unchanged_scales_are_said_to_be_so(tmp_path: Path, small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    tensors[f"{GATE_UP}_blocks"] ^= 1
    comparison = compare(edited(tmp_path / "ours", tensors), Checkpoint.open(small))
    text = "\n".join(comparison_lines(comparison))
    assert f"{GATE_UP}: blocks 100%, codes 50%, values 50%, scales the same; experts all" in text


def test_kinds_count_every_parameter_once(tmp_path: Path, small: Path) -> None:
    other = write_tiny(tmp_path / "other", SMALL, seed=1)
    kinds = compare(Checkpoint.open(other), Checkpoint.open(small)).kinds
    assert sum(kind.values for kind in kinds) == PARAMETERS
    assert [kind.name for kind in kinds] == [
        "embedding", "attention", "norms", "router", "experts.gate_up_proj", "experts.down_proj", "experts' biases",
        "unembedding",
    ]  # fmt: skip


def test_bf16_experts_are_compared_with_an_mxfp4_base_by_value(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "bf16", "bf16")
    base = Checkpoint.open(small)
    comparison = compare(Checkpoint.open(tmp_path / "bf16"), base)
    assert (comparison.weights, comparison.missing, comparison.added) == ([], [], [])
    assert "bf16 here and mxfp4 there, so compared by value: all are equal" in "\n".join(comparison_lines(comparison))

    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    down = tensors[DOWN]  # (E, in, out)
    down[down == 0] = 0.0  # -0 is as good
    down[2, 31, 5] += 1  # the last of a block,
    down[2, 32, 5] += 1  # and the first of the next
    down[3, 95, 63] += 1
    for ours in (edited(tmp_path / "ours", tensors, "bf16"), base):
        comparison = compare(*((ours, base) if ours is not base else (base, Checkpoint.open(tmp_path / "ours"))))
        (weight,) = comparison.weights
        assert (weight.name, weight.which_experts) == (DOWN, [2, 3])
        assert (weight.blocks_changed, weight.values_changed) == (3, 3)
        assert weight.codes_changed is weight.scales_changed is None
        text = "\n".join(comparison_lines(comparison))
        assert f"{DOWN}: blocks 0.26%, values 0.00814%; experts 2-3" in text
        assert "experts.down_proj     1 of 1 changed, 2 of 6 experts" in text


def test_two_bf16_checkpoints_differ_by_their_bytes_and_their_experts_by_value(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, "bf16")
    tensors[GATE_UP][0, 0, 0] = 0.0
    base = edited(tmp_path / "base", tensors, "bf16")
    tensors[GATE_UP][0, 0, 0] = -0.0
    tensors[DOWN][5] += 1
    comparison = compare(edited(tmp_path / "ours", tensors, "bf16"), base)
    assert [(d.name, d.changed) for d in comparison.differing] == [(GATE_UP, 1), (DOWN, 96 * 64)]
    assert [(w.name, w.which_experts) for w in comparison.weights] == [(DOWN, [5])]
    assert f"{GATE_UP}: 1 of 73,728 elements" in "\n".join(comparison_lines(comparison))


def test_inputs_beyond_the_last_whole_block_are_a_block_too(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, vocab_size=64, intermediate_size=40)
    base = write_tiny(tmp_path / "base", config, "bf16")
    tensors = random_tensors(config, "bf16")
    tensors[DOWN][0, 31:33, 0] += 1
    tensors[DOWN][0, 39, 0] += 1
    other = write_tiny(tmp_path / "other", config, "bf16")
    save_file(tensors, other / "model.safetensors")
    (weight,) = compare(Checkpoint.open(other), Checkpoint.open(base)).weights
    assert (weight.blocks_changed, weight.blocks, weight.values_changed) == (2, 6 * 64 * 2, 3)


def test_damage_is_an_error_and_no_report(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "copy", "hf")
    (tmp_path / "copy" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json has sha256"):
        inspect(tmp_path / "copy")


def test_a_missing_manifest_and_a_square_down_proj_are_pointed_out(tmp_path: Path) -> None:
    square = tiny_config(num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    _, summary = inspect(write_tiny(tmp_path / "square", square, "bf16"))
    text = "\n".join(summary_lines(summary))
    assert "absent: flipped bits would go unseen" in text
    assert "no shape can tell whether it is transposed" in text
