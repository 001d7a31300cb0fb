"""The safetensors files of a checkpoint: which tensor lies where, checked from their headers before a weight is read.

Owns: the format (https://huggingface.co/docs/safetensors, "Format"), the index of a checkpoint in several files, and refusing what
is damaged, incomplete, pickled or outside the folder. Knows nothing of models, and reads no weights.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from model_host.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

Count = Annotated[int, Field(ge=0, strict=True)]


class _Entry(BaseModel):
    """What a header says of one tensor. Offsets count from the header's end."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


HEADER = TypeAdapter(dict[str, _Entry])
WEIGHT_MAP = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in its file."""

    name: str
    dtype: str
    """As the format writes it: "BF16", "F8_E4M3", ..."""
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file, and its tensors in the order in which they lie."""

    file: Path
    tensors: tuple[Stored, ...]
    bytes: int


def shards(folder: Path) -> list[Shard]:
    """The checkpoint's shards, each checked to be whole and all of them to be of one checkpoint. Raises CheckpointError."""
    weight_map = _weight_map(folder)
    wanted = sorted(set(weight_map.values())) if weight_map is not None else [WHOLE]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(wanted)} shards, first {missing[0]}: download it again.")
    found = [_shard(folder / name) for name in wanted]
    where: dict[str, str] = {}
    for shard in found:
        for tensor in shard.tensors:
            if tensor.name in where:
                raise CheckpointError(f"{folder}: {tensor.name} is in {where[tensor.name]} and in {shard.file.name}: download it again.")
            where[tensor.name] = shard.file.name
    if weight_map is not None and weight_map != where:
        wrong = sorted(name for name in where.keys() | weight_map.keys() if where.get(name) != weight_map.get(name))
        raise CheckpointError(
            f"{folder / INDEX} and the shards do not belong together: they differ on {len(wrong)} tensors, first {wrong[0]}."
            " Download the checkpoint again."
        )
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file every tensor is in, by the index; None for a checkpoint in one file."""
    index = folder / INDEX
    if index.is_file():
        try:
            content = json.loads(index.read_text("utf-8"), object_pairs_hook=_without_duplicates)
            weight_map = WEIGHT_MAP.validate_python(content["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"{index} is damaged ({_first_line(error)}): download it again.") from error
        for name in weight_map.values():
            if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {name!r}, which is no safetensors file beside it: do not trust this checkpoint.")
        if weight_map:
            return weight_map
        raise CheckpointError(f"{index} is damaged (it names no tensor): download it again.")
    if (folder / WHOLE).is_file():
        return None
    if any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} holds pickled weights (*.bin), which can run code: only safetensors are read. Get those instead.")
    raise CheckpointError(f"{folder} holds no {WHOLE} and no {INDEX}: download the weights.")


def _shard(file: Path) -> Shard:
    """Reads a shard's header: 8 bytes of length, then JSON with every tensor's type, shape and place. Together the tensors have
    to fill the rest of the file exactly, without overlaps or holes, so that nothing cut off or flipped in a header gets by."""
    actual = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(actual - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes")
            raw = json.loads(opened.read(length), object_pairs_hook=_without_duplicates)
        if isinstance(raw, dict):
            raw.pop("__metadata__", None)
        tensors = [_stored(name, entry) for name, entry in _in_file_order(HEADER.validate_python(raw), actual - 8 - length)]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is truncated or damaged (it has {actual:,} bytes; {_first_line(error)}): download this shard again."
        ) from error
    return Shard(file, tuple(tensors), sum(tensor.bytes for tensor in tensors))


def _in_file_order(header: dict[str, _Entry], data_bytes: int) -> Iterator[tuple[str, _Entry]]:
    """The tensors sorted by place. Raises ValueError unless each begins where the one before ends."""
    ordered = sorted(header.items(), key=lambda item: item[1].data_offsets)
    if not ordered:
        raise ValueError("no tensor in it")
    first, last = ordered[0][1].data_offsets[0], ordered[-1][1].data_offsets[1]
    if first != 0 or last != data_bytes:
        raise ValueError(f"its tensors reach from {first:,} to {last:,} of {data_bytes:,}")
    for (one, before), (other, after) in pairwise(ordered):
        if before.data_offsets[1] != after.data_offsets[0]:
            raise ValueError(f"{one} and {other} overlap or leave a hole")
    yield from ordered


def _stored(name: str, entry: _Entry) -> Stored:
    begin, end = entry.data_offsets
    if entry.dtype not in BITS:
        raise ValueError(f"{name} is of the unknown type {entry.dtype!r}")
    if prod(entry.shape) * BITS[entry.dtype] != 8 * (end - begin):
        raise ValueError(f"{name} of {entry.dtype} {entry.shape} does not take {end - begin:,} bytes")
    return Stored(name, entry.dtype, tuple(entry.shape), end - begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which would keep the last of two entries of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name} is in it twice")
    return found


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
