"""Write checkpoints one tensor at a time: anew, sharded with an index, or as an edited copy of another one.

Neither holds more than one tensor in memory. An edited copy keeps the source's files, headers and every byte of the
tensors that were not edited, so that a copy without edits is identical to its source.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gptoss_infer.checkpoint.atomic import MANIFEST
from gptoss_infer.checkpoint.layouts import Layout
from gptoss_infer.checkpoint.reader import INDEX, Checkpoint

DTYPE_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# The order in which the safetensors library lays tensors out: wider dtypes first, then by name.
DTYPE_ORDER = ("F32", "BF16", "F16", "U8")
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
MAX_SHARD_BYTES = 5_000_000_000
Values = Tensor | Iterator[Tensor]  # a tensor, or its consecutive parts along the first dimension


class TensorSpec(NamedTuple):
    """A tensor to be written: its shape and dtype are known before its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    specs: Iterable[TensorSpec],
    read: Callable[[str], Values],
    *,
    layout: Layout = "hf",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the tensors of `specs`, whose values `read(name)` gives one at a time, to `directory`.

    One file `model.safetensors` if all fit in a shard; else shards and, in Hugging Face's layout, an index. The tensors
    of a file are in the safetensors library's order, so the same tensors always make the same bytes.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    shards = _split(ordered, max_shard_bytes)
    dash = "-" if layout == "hf" else "--"  # OpenAI's shards are named model--00001-of-00007
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model{dash}{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard, read)
        weight_map |= {spec.name: file for spec in shard}
    if len(shards) > 1 and layout == "hf":
        index = {"metadata": {"total_size": sum(spec.num_bytes for spec in ordered)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def rewrite_checkpoint(source: Checkpoint, directory: Path, edit: Callable[[str, Tensor], Tensor]) -> None:
    """Copy every file of `source` to `directory`, replacing the values of each tensor by `edit(stored name, values)`.

    Shapes and dtypes cannot change, so headers are copied as they are. `edit` is called in file order for every
    tensor; it returns its argument to keep the bytes.
    """
    copy_other_files(source.directory, directory)
    shutil.copyfile(source.directory / "config.json", directory / "config.json")
    if (source.directory / INDEX).exists():
        shutil.copyfile(source.directory / INDEX, directory / INDEX)
    for file in sorted({stored.file for stored in source.stored.values()}):
        with file.open("rb") as src, (directory / file.name).open("wb") as dst:
            (length,) = struct.unpack("<Q", src.read(8))
            raw = src.read(length)
            dst.write(struct.pack("<Q", length) + raw)
            header = json.loads(raw)
            header.pop("__metadata__", None)
            for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
                begin, end = info["data_offsets"]
                dtype = next(t for t, text in DTYPE_NAMES.items() if text == info["dtype"])
                data = bytearray(src.read(end - begin))
                values = torch.frombuffer(data, dtype=dtype).view(info["shape"]) if data else torch.empty(info["shape"])
                edited = edit(name, values)
                form = edited.shape, edited.dtype
                assert form == (values.shape, values.dtype), f"edit changed the form of {name}"
                dst.write(data if edited is values else tensor_bytes(edited))


def copy_other_files(source: Path, directory: Path) -> None:
    """Copy what is neither weights nor config: tokenizer, chat template, generation config, licence."""
    kept = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ""}
    ours = {"config.json", INDEX, MANIFEST, "export.json"}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in kept and path.name not in ours and not path.name.startswith("."):
            shutil.copyfile(path, directory / path.name)


def _split(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a tensor larger than the limit gets one of its own."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def _write_file(path: Path, specs: list[TensorSpec], read: Callable[[str], Values]) -> None:
    ordered = sorted(specs, key=lambda spec: (DTYPE_ORDER.index(DTYPE_NAMES[spec.dtype]), spec.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in ordered:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for spec in ordered:
            _write_tensor(f, spec, read(spec.name))


def _write_tensor(f: BinaryIO, spec: TensorSpec, values: Values) -> None:
    begin = f.tell()
    for part in (values,) if isinstance(values, Tensor) else values:
        assert part.dtype == spec.dtype, f"{spec.name}: got {part.dtype}, announced {spec.dtype}"
        f.write(tensor_bytes(part))
    assert f.tell() - begin == spec.num_bytes, f"{spec.name}: wrote {f.tell() - begin} bytes, announced {spec.shape}"


def tensor_bytes(tensor: Tensor) -> bytes | memoryview:
    """Return the values in little-endian row-major order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
