"""Reads the .wandb file of an offline run, without wandb's own reader (it has none in Python).

The format is LevelDB's log with a 7-byte header and plain CRC-32: blocks of 32 KiB, each record in chunks of
(crc32 of type and data, length, type); types 1 full, 2 first, 3 middle, 4 last. Each record is a protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 1 << 15


def read_chunks(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    assert content[:7] == HEADER, content[:7]
    position, parts = 7, []
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # a chunk's header never crosses a block
            position += BLOCK - position % BLOCK
            continue
        crc, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + 7 : position + 7 + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == crc, f"chunk at {position} is damaged"
        position += 7 + length
        parts.append(data)
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_run(path: Path) -> dict[str, Any]:
    """`history` ([(step, {metric: value})]), `config`, `run_id`, `host` and `project` of one file."""
    from wandb.proto.wandb_internal_pb2 import Record

    run: dict[str, Any] = {"history": [], "config": {}}
    for chunk in read_chunks(path):
        record = Record()
        record.ParseFromString(chunk)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            run["history"].append((items.pop("_step"), items))
        elif kind == "run":
            run |= {"run_id": record.run.run_id, "host": record.run.host, "project": record.run.project}
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return run
