"""Open a checkpoint lazily: headers are read and checked against the config at once, tensors only when asked for."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.checkpoint.atomic import verify_manifest
from gptoss_infer.checkpoint.layouts import (
    EXPERT_WEIGHTS,
    ExpertFormat,
    Layout,
    Slot,
    detect,
    expected_shapes,
    original_slot,
)
from gptoss_infer.config import ModelConfig, parse_config, read_json
from gptoss_infer.errors import DataError, MachineError, UsageError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
# The dtypes of the safetensors format that peers use; what a checkpoint may hold is checked per tensor.
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
               "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}  # fmt: skip
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Stored(NamedTuple):
    """One tensor as a file's header states it."""

    file: Path
    dtype: str  # safetensors' names: U8, BF16, F32, ...
    shape: tuple[int, ...]


def resolve(checkpoint: str) -> Path:
    """Return the directory of a checkpoint: `checkpoint` itself, or a hub id[@revision], fetched without spare copies.

    Raises: UsageError if it is neither; MachineError if the hub cannot be reached and nothing is cached.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if checkpoint.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", checkpoint):
        raise UsageError(f"checkpoint {checkpoint!r} is neither a directory nor a hub id such as openai/gpt-oss-20b")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MachineError(f"{checkpoint!r} is no directory; fetching it needs `pip install huggingface-hub`") from None
    name, _, revision = checkpoint.partition("@")
    try:
        # The repository holds each weight three times (root, original/, metal/): only the root's are wanted.
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's; all mean the same here
        raise MachineError(
            f"{checkpoint!r} is no directory here and could not be fetched from the hub ({type(error).__name__}: "
            f"{error}). Check the name and the network, or give the path of a downloaded copy."
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; tensors are addressed by Hugging Face's names in every layout.

    `slots` says where each canonical tensor lives, `stored` what the files hold.
    """

    directory: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    layout: Layout
    experts: ExpertFormat
    slots: dict[str, Slot]
    stored: dict[str, Stored]

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = True) -> Checkpoint:
        """Read config and headers, check every tensor's presence, shape and dtype, and the manifest if there is one.

        Args:
            verify: hash the files against `MANIFEST.json`; False when the caller has just done so.
        Raises: DataError saying which file or tensor is missing, damaged or of another shape than the config says.
        """
        directory = Path(directory)
        raw_config = read_json(directory / "config.json")
        config = parse_config(raw_config, str(directory / "config.json"))
        if verify:
            verify_manifest(directory)
        stored = _read_headers(directory)
        layout, experts = detect(list(stored))
        slots = {
            name: original_slot(name, config) if layout == "original" else Slot(name)
            for name in expected_shapes(config, experts)
        }
        checkpoint = cls(directory, config, raw_config, layout, experts, slots, stored)
        checkpoint._check()
        return checkpoint

    def _check(self) -> None:
        """Compare what the files hold with what the config asks for."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, shape in expected_shapes(self.config, self.experts).items():
            slot = self.slots[name]
            rows = wanted.get(slot.name, (0,))[0] if slot.rows else 0  # q, k and v add up to one stored tensor
            wanted[slot.name] = (rows + shape[0], *shape[1:])
        missing, unknown = sorted(wanted.keys() - self.stored.keys()), sorted(self.stored.keys() - wanted.keys())
        if missing or unknown:
            raise DataError(
                f"{self.directory}: {len(missing)} tensors are missing {missing[:3]} and {len(unknown)} are unknown "
                f"{unknown[:3]} for this config; is a shard missing, or the config from another model?"
            )
        for name, shape in wanted.items():
            tensor = self.stored[name]
            if tensor.shape != shape:
                raise DataError(
                    f"{tensor.file}: {name} has shape {tensor.shape}, the config asks for {shape}; "
                    "is config.json from another model?"
                )
            is_bytes = name.endswith(("blocks", "scales"))
            if is_bytes != (tensor.dtype == "U8") or not (is_bytes or tensor.dtype in FLOATS):
                raise DataError(
                    f"{tensor.file}: {name} is {tensor.dtype}, expected {'U8' if is_bytes else ' or '.join(FLOATS)}"
                )

    def names(self) -> list[str]:
        """Return every canonical name, in the model's order."""
        return list(self.slots)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, whole, in its stored dtype."""
        return self._read(name, None)

    def _read(self, name: str, rows: slice | int | None) -> Tensor:
        slot = self.slots[name]
        file = self.stored[slot.name].file
        try:
            with safe_open(file, framework="pt") as f:
                if slot.rows is None and rows is None:
                    return f.get_tensor(slot.name)
                return f.get_slice(slot.name)[rows if slot.rows is None else slot.rows]
        except SafetensorError as error:
            raise DataError(f"{file}: {slot.name} cannot be read ({error}); fetch the file again") from None

    def expert(self, layer: int, weight: str, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one expert's `gate_up_proj` or `down_proj` as (out, in) in `dtype`, reading no other expert."""
        assert weight in EXPERT_WEIGHTS, weight
        if self.experts == "mxfp4":
            return mxfp4.decode(*self.expert_blocks(layer, weight, expert), dtype)
        return self._read(f"model.layers.{layer}.mlp.experts.{weight}", expert).T.to(dtype)

    def expert_blocks(self, layer: int, weight: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return one expert's MXFP4 bytes: blocks (out, G, 16), scales (out, G)."""
        prefix = f"model.layers.{layer}.mlp.experts.{weight}"
        return self._read(f"{prefix}_blocks", expert), self._read(f"{prefix}_scales", expert)


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Return every stored tensor, from the index's files or, without an index, from all safetensors files."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise DataError(f"{directory} holds no *.safetensors; give the directory that holds the weights")
        return _merge({file: read_header(file) for file in files})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map; fetch it again")
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", name):
            raise DataError(
                f"{index} names the file {name!r}; only plain *.safetensors names inside its folder are read"
            )
        if not (directory / name).is_file():
            raise DataError(
                f"{directory / name} is missing; {INDEX} needs it. Fetch it, or the whole checkpoint, again"
            )
        files.append(directory / name)
    stored = _merge({file: read_header(file) for file in files})
    for tensor, name in weight_map.items():
        if tensor not in stored or stored[tensor].file.name != name:
            raise DataError(f"{index} says that {tensor} is in {name}, where it is not; fetch index and shards again")
    return stored


def _merge(headers: dict[Path, dict[str, Stored]]) -> dict[str, Stored]:
    counts = Counter(name for header in headers.values() for name in header)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise DataError(
            f"{len(twice)} tensors are in several files, such as {twice[0]}; remove the files of other checkpoints"
        )
    return {name: stored for header in headers.values() for name, stored in header.items()}


def read_header(file: Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file; checks its size, so that a truncated file is found before it is read.

    Source: the safetensors format (8-byte little-endian header length, JSON, data).
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise DataError(f"{file} is no safetensors file or is cut off ({size} bytes); fetch it again")
        raw = f.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        header.pop("__metadata__", None)
        stored = {name: Stored(file, str(t["dtype"]), tuple(t["shape"])) for name, t in header.items()}
        end = _check_offsets({name: t["data_offsets"] for name, t in header.items()}, stored)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} has a damaged header ({type(error).__name__}: {error}); fetch it again") from None
    if 8 + length + end != size:
        raise DataError(
            f"{file} has {size} bytes, its header asks for {8 + length + end}; it is cut off: fetch it again"
        )
    return stored


def _check_offsets(offsets: dict[str, Any], stored: dict[str, Stored]) -> int:
    """Return where the data ends; ValueError unless tensors follow each other gaplessly, each as long as its shape."""
    end = 0
    for name, (begin, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        size = math.prod(stored[name].shape) * DTYPE_BYTES[stored[name].dtype]
        if [begin, stop] != [end, end + size]:
            raise ValueError(f"{name} is at bytes {begin}..{stop}, expected {end}..{end + size}")
        end = stop
    return end


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} occurs twice")
    return dict(pairs)
