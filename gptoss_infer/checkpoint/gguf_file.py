"""The GGUF container, version 3: typed metadata, then tensors, each at a multiple of 32 bytes; written, not read.

Nothing here knows gpt-oss: what goes into such a file is the work of `gguf`. Values pass through a piece at a time.
Source: docs/gguf.md of ggml-org/ggml; numbers of types from its gguf.h and ggml.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptoss_infer.checkpoint.writer import tensor_bytes

VERSION, ALIGNMENT = 3, 32
Kind = Literal["F32", "F16", "BF16", "MXFP4"]
# numpy's type says which of GGUF's a number gets.
Value = str | list[str] | np.generic | np.ndarray
STRING, ARRAY = 8, 9
NUMBERS = {"uint32": 4, "int32": 5, "float32": 6, "bool": 7}


class _Form(NamedTuple):
    """How a kind of tensor is stored."""

    number: int
    block_values: int
    block_bytes: int
    dtype: torch.dtype  # of the pieces that are written


FORMS: dict[Kind, _Form] = {
    "F32": _Form(0, 1, 4, torch.float32),
    "F16": _Form(1, 1, 2, torch.float16),
    "BF16": _Form(30, 1, 2, torch.bfloat16),
    "MXFP4": _Form(39, 32, 17, torch.uint8),
}


class Entry(NamedTuple):
    """A tensor of the file: its shape in row-major order (the file lists it in reverse), in values, not bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        form = FORMS[self.kind]
        assert self.shape[-1] % form.block_values == 0, self
        return torch.Size(self.shape).numel() // form.block_values * form.block_bytes


class Group(NamedTuple):
    """Tensors whose values arrive together: `pieces` yields the next piece of each, and is asked for once, in turn."""

    entries: tuple[Entry, ...]
    pieces: Iterator[tuple[Tensor, ...]]


def write_file(path: Path, metadata: Mapping[str, Value], groups: Sequence[Group]) -> None:
    """Write `path`; no more than one piece of a group is in memory."""
    offsets: dict[str, int] = {}
    end = 0
    for entry in (entry for group in groups for entry in group.entries):
        assert entry.name not in offsets, f"{entry.name} twice"
        offsets[entry.name] = end
        end += _padded(entry.num_bytes)
    header = _header(metadata, [entry for group in groups for entry in group.entries], offsets)
    with path.open("wb") as f:
        f.write(header)
        for entries, pieces in groups:
            begins = [len(header) + offsets[entry.name] for entry in entries]
            cursors = list(begins)
            for parts in pieces:
                for n, (entry, part) in enumerate(zip(entries, parts, strict=True)):
                    assert part.dtype == FORMS[entry.kind].dtype, f"{entry} got {part.dtype}"
                    f.seek(cursors[n])
                    cursors[n] += f.write(tensor_bytes(part))
            for entry, begin, cursor in zip(entries, begins, cursors, strict=True):
                assert cursor - begin == entry.num_bytes, f"{entry}: wrote {cursor - begin} bytes"
        f.truncate(len(header) + end)  # the last tensor is padded too


def _header(metadata: Mapping[str, Value], entries: Sequence[Entry], offsets: Mapping[str, int]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    for name, shape, kind in entries:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dimensions, struct.pack("<IQ", FORMS[kind].number, offsets[name])]
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def _value(value: Value) -> bytes:
    """Return a value after its type; an array's elements have one type, and a count before them."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    number = NUMBERS[value.dtype.name]
    form = struct.pack("<IIQ", ARRAY, number, value.size) if value.ndim else struct.pack("<I", number)
    return form + value.astype(value.dtype.newbyteorder("<")).tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
