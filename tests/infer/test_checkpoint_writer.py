"""What is written equals what the safetensors library writes, and a copy without edits equals its source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_infer.checkpoint import Checkpoint, TensorSpec, rewrite_checkpoint, write_checkpoint
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.config import to_hf_json

SMALL = tiny_config(num_hidden_layers=1, vocab_size=64)
INDEX = "model.safetensors.index.json"


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_one_file_is_byte_identical_to_the_safetensors_librarys(tmp_path: Path, experts: str) -> None:
    tensors = random_tensors(SMALL, experts)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # every dtype that a checkpoint may hold
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    write_checkpoint(tmp_path, to_hf_json(SMALL, quantized=True), specs_of(tensors), tensors.__getitem__)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_stay_within_the_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    limit = 30_000
    write_checkpoint(
        tmp_path, to_hf_json(SMALL, quantized=True), specs_of(tensors), tensors.__getitem__, max_shard_bytes=limit
    )
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    found = {}
    for path in shards:
        content = load_file(path)
        assert len(content) == 1 or sum(t.numel() * t.element_size() for t in content.values()) <= limit
        found |= {name: (path.name, tensor) for name, tensor in content.items()}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert all(torch.equal(found[name][1], tensor) for name, tensor in tensors.items())
    reopened = Checkpoint.open(tmp_path)
    assert all(torch.equal(reopened.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_may_come_in_parts_and_without_being_contiguous(tmp_path: Path) -> None:
    whole = torch.randn(6, 5)
    (tmp_path / "parts").mkdir()

    def parts(name: str) -> Iterator[Tensor]:
        return iter((whole.T.contiguous().T[:2], whole[2:]))

    write_checkpoint(tmp_path / "parts", {}, [TensorSpec("w", (6, 5), torch.float32)], parts)
    assert torch.equal(load_file(tmp_path / "parts" / "model.safetensors")["w"], whole)


def test_values_that_are_not_as_announced_are_a_bug_that_is_caught(tmp_path: Path) -> None:
    spec = TensorSpec("w", (6, 5), torch.float32)
    with pytest.raises(AssertionError, match=r"got torch\.float64, announced torch\.float32"):
        write_checkpoint(tmp_path, {}, [spec], lambda name: torch.zeros(6, 5, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"wrote 100 bytes, announced \(6, 5\)"):
        write_checkpoint(tmp_path, {}, [spec], lambda name: torch.zeros(5, 5))


@pytest.mark.parametrize("kind", ["single", "sharded", "original", "bf16"])
def test_a_rewritten_copy_without_edits_is_byte_identical_file_by_file(tmp_path: Path, kind: str) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "README.md"):
        (source / name).write_text(f"this is {name}")
    if kind != "single":
        to = {"sharded": "hf", "original": "original", "bf16": "bf16"}[kind]
        convert(source, tmp_path / kind, to, max_shard_bytes=30_000)
        source = tmp_path / kind
        (source / "MANIFEST.json").unlink()
    (tmp_path / "copy").mkdir()
    seen = []
    rewrite_checkpoint(Checkpoint.open(source), tmp_path / "copy", lambda name, values: seen.append(name) or values)
    assert files_of(tmp_path / "copy") == files_of(source)
    assert sorted(seen) == sorted(Checkpoint.open(source).stored)


def test_a_header_that_others_wrote_is_kept_with_its_metadata(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    save_file(random_tensors(SMALL, "mxfp4"), source / "model.safetensors", metadata={"format": "pt", "by": "others"})
    (tmp_path / "copy").mkdir()
    rewrite_checkpoint(Checkpoint.open(source), tmp_path / "copy", lambda name, values: values)
    with safe_open(tmp_path / "copy" / "model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt", "by": "others"}


def test_an_edit_changes_the_bytes_of_its_tensor_and_no_others(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    (tmp_path / "copy").mkdir()
    edited = "model.layers.0.self_attn.q_proj.weight"
    rewrite_checkpoint(
        Checkpoint.open(source), tmp_path / "copy", lambda name, values: values * 2 if name == edited else values
    )
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "copy"))
    assert torch.equal(after.pop(edited), before.pop(edited) * 2)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (tmp_path / "copy" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_an_edit_that_changes_shape_or_dtype_is_a_bug_that_is_caught(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "base", SMALL))
    (tmp_path / "copy").mkdir()
    with pytest.raises(AssertionError, match="changed the form"):
        rewrite_checkpoint(source, tmp_path / "copy", lambda name, values: values.float())
