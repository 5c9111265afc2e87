"""What `inspect` reports, against numbers worked out by hand and files changed on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from safetensors.torch import save_file

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


def test_layers_and_expert_formats_that_only_one_side_has_are_listed(tmp_path: Path, small: Path) -> None:
    deeper = write_tiny(tmp_path / "deeper", tiny_config(num_hidden_layers=2, vocab_size=64))
    comparison = compare(Checkpoint.open(small), Checkpoint.open(deeper))
    assert len(comparison.missing) == 19
    assert all(name.startswith("model.layers.1.") for name in comparison.missing)
    dense = write_tiny(tmp_path / "dense", SMALL, "bf16")
    comparison = compare(Checkpoint.open(dense), Checkpoint.open(small))
    assert [name.rpartition(".")[2] for name in comparison.added] == ["gate_up_proj", "down_proj"]
    assert "--to bf16 first" in "\n".join(comparison_lines(comparison))


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
