"""Reading checkpoints that the safetensors library wrote, and refusing every kind of damage by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_decode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.checkpoint.atomic import write_manifest
from gptoss_infer.checkpoint.reader import read_header
from gptoss_infer.errors import DataError, UsageError

SMALL = tiny_config(num_hidden_layers=1, vocab_size=64)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small", SMALL)


def shard(directory: Path, count: int = 3) -> Path:
    """Split a single-file checkpoint into shards with an index, through the safetensors library."""
    with safe_open(directory / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  # safe_open is no mapping
    (directory / "model.safetensors").unlink()
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    where = {name: files[i % count] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def split_file(path: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def write_file(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_that_safetensors_wrote_is_read_with_its_bytes(
    tmp_path: Path, experts: str, sharded: bool
) -> None:
    directory = write_tiny(tmp_path / "base", SMALL, experts)
    checkpoint = Checkpoint.open(shard(directory) if sharded else directory)
    expected = random_tensors(SMALL, experts)
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        got = checkpoint.tensor(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor), name
    assert (checkpoint.layout, checkpoint.experts) == ("hf", experts)


def test_one_expert_is_read_as_out_by_in_from_both_expert_formats(tmp_path: Path) -> None:
    packed = Checkpoint.open(write_tiny(tmp_path / "mxfp4", SMALL))
    dense = Checkpoint.open(write_tiny(tmp_path / "bf16", SMALL, "bf16"))
    prefix = "model.layers.0.mlp.experts.down_proj"
    values = slow_decode(packed.tensor(f"{prefix}_blocks"), packed.tensor(f"{prefix}_scales"))
    assert torch.equal(packed.expert(0, "down_proj", 4), values[4])
    assert torch.equal(dense.expert(0, "down_proj", 4), dense.tensor(prefix)[4].T.float())


def test_original_shards_are_found_without_an_index(tmp_path: Path) -> None:
    from gptoss_infer.checkpoint.convert import convert

    base = write_tiny(tmp_path / "base", SMALL)
    convert(base, tmp_path / "original", "original", max_shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "original").glob("*.safetensors"))
    assert len(names) > 1
    assert names[0] == f"model--00001-of-{len(names):05d}.safetensors"
    assert not (tmp_path / "original" / INDEX).exists()
    checkpoint = Checkpoint.open(tmp_path / "original")
    for name, tensor in random_tensors(SMALL, "mxfp4").items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_shard_is_refused_by_name_before_anything_is_read(small: Path, keep: float) -> None:
    file = shard(small) / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"model-00002-of-00003\.safetensors.*fetch it again"):
        Checkpoint.open(small)


def test_a_shard_with_bytes_behind_its_end_is_refused(small: Path) -> None:
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DataError, match="its header asks for"):
        Checkpoint.open(small)


def test_a_missing_shard_is_named(small: Path) -> None:
    (shard(small) / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-00003-of-00003\.safetensors is missing"):
        Checkpoint.open(small)


def test_a_flipped_bit_is_found_through_the_manifest_and_the_file_named(small: Path) -> None:
    write_manifest(small)
    Checkpoint.open(small)
    file = small / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4  # in the data, where no format check can see it
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors has sha256 .* expected"):
        Checkpoint.open(small)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sha256": []}', '{"sha256": 3}', "[" * 100_000])
def test_a_damaged_manifest_is_said_to_be_damaged(small: Path, content: str) -> None:
    (small / "MANIFEST.json").write_text(content)
    with pytest.raises(DataError, match=r"MANIFEST\.json is damaged"):
        Checkpoint.open(small)


def test_a_tensor_that_a_header_lists_twice_is_refused(small: Path) -> None:
    file = small / "model.safetensors"
    header, data = split_file(file)
    entry = b'"lm_head.weight":' + json.dumps(json.loads(header)["lm_head.weight"]).encode()
    write_file(file, header.rstrip()[:-1] + b"," + entry + b"}", data)
    with pytest.raises(DataError, match=r"'lm_head\.weight' occurs twice"):
        Checkpoint.open(small)


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": 3}', b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
        b'"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
    ],
    ids=lambda header: header[:60].decode("latin-1"),
)  # fmt: skip
def test_a_damaged_header_is_refused_with_the_name_of_its_file(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "odd.safetensors"
    write_file(file, header, bytes(8))
    with pytest.raises(DataError, match=r"odd\.safetensors"):
        read_header(file)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_header_that_the_safetensors_library_refuses_is_refused_here_too(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"a.weight": torch.zeros(3, 5), "b.blocks": torch.zeros(4, 2, dtype=torch.uint8)}, file)
    header, values = split_file(file)
    damaged = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    write_file(file, bytes(damaged), values)
    try:
        with safe_open(file, framework="pt") as f:
            accepted = {name: (t.get_dtype(), tuple(t.get_shape())) for name in f.keys() for t in (f.get_slice(name),)}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError):
        with pytest.raises(DataError):
            read_header(file)
        return
    try:
        ours = {name: (stored.dtype, stored.shape) for name, stored in read_header(file).items()}
    except DataError:  # stricter is fine: a name twice, an exotic dtype
        return
    assert ours == accepted


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\model.safetensors",
        "./model.safetensors", "~/model.safetensors", "model.safetensors/../../x.safetensors", ".hidden.safetensors",
        "C:\\model.safetensors", "file:///model.safetensors", "model.safetensors\n", "model.bin", "", "..",
    ],
)  # fmt: skip
def test_an_index_that_names_anything_but_a_plain_file_of_its_folder_is_refused(small: Path, name: str) -> None:
    (small.parent / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    edit_json(shard(small) / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(DataError, match="only plain"):
        Checkpoint.open(small)


def test_a_link_to_a_shard_elsewhere_is_followed_as_the_hubs_cache_needs_it(small: Path) -> None:
    file = shard(small) / "model-00001-of-00003.safetensors"
    blob = small.parent / "blob"
    file.rename(blob)
    file.symlink_to(blob)
    assert torch.equal(
        Checkpoint.open(small).tensor("lm_head.weight"), random_tensors(SMALL, "mxfp4")["lm_head.weight"]
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]", "{"])
def test_an_index_without_a_weight_map_is_refused(small: Path, content: str) -> None:
    (shard(small) / INDEX).write_text(content)
    with pytest.raises(DataError, match=r"index\.json"):
        Checkpoint.open(small)


def test_an_index_that_looks_for_a_tensor_in_the_wrong_file_is_refused(small: Path) -> None:
    index = shard(small) / INDEX
    wrong = {"lm_head.weight": "model-00002-of-00003.safetensors"}
    right = json.loads(index.read_text())["weight_map"]["lm_head.weight"]
    if right == wrong["lm_head.weight"]:
        wrong = {"lm_head.weight": "model-00001-of-00003.safetensors"}
    edit_json(index, lambda content: content["weight_map"].update(wrong))
    with pytest.raises(DataError, match=r"lm_head\.weight is in .*, where it is not"):
        Checkpoint.open(small)


def test_a_tensor_that_two_files_hold_is_refused(small: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, small / "other.safetensors")
    with pytest.raises(DataError, match=r"in several files, such as lm_head\.weight"):
        Checkpoint.open(small)


def test_a_folder_without_weights_and_one_with_other_weights_are_told_apart(small: Path, tmp_path: Path) -> None:
    (small / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        Checkpoint.open(small)
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, small / "model.safetensors")
    with pytest.raises(DataError, match=r"no gpt-oss tensors found.*transformer\.wte\.weight"):
        Checkpoint.open(small)


def test_missing_and_extra_tensors_are_counted_and_named(small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    del tensors["model.norm.weight"]
    save_file(tensors | {"model.layers.0.extra": torch.zeros(2)}, small / "model.safetensors")
    with pytest.raises(DataError, match=r"1 tensors are missing \['model\.norm\.weight'\].*1 are unknown.*0\.extra"):
        Checkpoint.open(small)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"vocab_size": 65}, "embed_tokens"),
        ({"num_local_experts": 5}, "router"),
        ({"num_attention_heads": 4}, "q_proj"),
        ({"intermediate_size": 64}, "experts"),
        ({"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, "layers.1"),
        ({"head_dim": 32}, "q_proj"),
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_tensors_is_refused_with_the_tensor(
    small: Path, change: dict[str, object], tensor: str
) -> None:
    edit_json(small / "config.json", lambda config: config.update(change))
    with pytest.raises(DataError, match=f"{tensor}.*config"):
        Checkpoint.open(small)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.int8, "I8, expected U8"),
        ("lm_head.weight", torch.float64, "F64, expected BF16 or F16 or F32"),
        ("lm_head.weight", torch.uint8, "U8, expected BF16 or F16 or F32"),
    ],
)
def test_a_tensor_of_a_dtype_that_no_layout_has_is_refused(
    small: Path, name: str, dtype: torch.dtype, expected: str
) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    save_file(tensors | {name: tensors[name].to(dtype)}, small / "model.safetensors")
    with pytest.raises(DataError, match=expected):
        Checkpoint.open(small)


def test_a_transposed_square_down_proj_cannot_be_seen_by_opening(tmp_path: Path) -> None:
    """A limit, stated: where hidden and intermediate size are equal, only logits tell which way round experts are."""
    config = tiny_config(num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    directory = write_tiny(tmp_path / "base", config, "bf16")
    tensors = random_tensors(config, "bf16")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name].transpose(1, 2).contiguous()}, directory / "model.safetensors")
    assert not torch.equal(Checkpoint.open(directory).tensor(name), tensors[name])


def test_what_is_neither_a_directory_nor_a_hub_id_is_wrong_usage(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    for name in ("./missing", str(tmp_path / "missing"), "~/missing", "just-a-name", "a/b/c", "a b/c"):
        with pytest.raises(UsageError, match="neither a directory nor a hub id"):
            resolve(name)
