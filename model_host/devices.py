"""Devices as facts: what is free on them and how fast they are read; what of a model one holds; and those that a user describes in a
line.

Knows nothing of torch: `machine.py` asks for the real ones.
"""

import re
from dataclasses import dataclass
from typing import Literal

from model_host.config import Portion
from model_host.errors import RequestError

Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    kind: Kind
    free_bytes: int
    bytes_per_s: float
    """At which its memory is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one device holds."""

    device: Device
    layers: range
    """Those of which all but the routed experts, and the context, are here. The first has the embeddings, the last the output."""
    experts: range
    """Routed experts: of those layers, or, on a device that has none, of all."""
    weight_bytes: int
    portion: Portion | None = None
    """Where several devices have every layer: what of each this one computes, as a rank of its own."""


GPU_SPEEDS = ((8, 270e9), (12, 500e9), (16, 640e9), (24, 1000e9), (32, 1790e9), (48, 860e9), (80, 2000e9), (96, 1790e9), (141, 4800e9))
"""Bytes a second that cards of so many GB read at, by their makers' data sheets; where several are common, the lower."""
CPU_BYTES_PER_S = 60e9
"""Two channels of DDR5. Servers have more."""
USUAL_RAM_GB = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SYSTEM_BYTES = 2_000_000_000
"""Of the RAM of an imagined machine, what others use."""
DEVICE = re.compile(r"(?:(\d+)\s*x\s*)?(cpu:)?\s*(\d+(?:\.\d+)?)\s*GB(?:\s*@\s*(\d+(?:\.\d+)?))?", re.IGNORECASE)
MOST_GPUS = 32
"""In one machine."""


def imagined_gpu(name: str, gigabytes: float, bytes_per_s: float | None = None) -> Device:
    speed = bytes_per_s or min(GPU_SPEEDS, key=lambda known: abs(known[0] - gigabytes))[1]
    return Device(name=name, kind="gpu", free_bytes=int(gigabytes * 1e9), bytes_per_s=speed)


def imagined_cpu(gigabytes: float, bytes_per_s: float | None = None) -> Device:
    free = max(int(gigabytes * 1e9) - SYSTEM_BYTES, 0)
    return Device(name="cpu", kind="cpu", free_bytes=free, bytes_per_s=bytes_per_s or CPU_BYTES_PER_S)


def parse_devices(text: str) -> tuple[Device, ...]:
    """`2x24GB` is two cards, `24GB+cpu:64GB` one and 64 GB of RAM, `2x24GB@936` two that read 936 GB/s. Raises RequestError."""
    found: list[Device] = []
    for part in re.split(r"[+,]", text):
        match = DEVICE.fullmatch(part.strip())
        if match is None:
            raise RequestError(f"{part.strip()!r} describes no device: write 24GB, 2x24GB, 2x24GB+cpu:64GB, or 24GB@936 for 936 GB/s.")
        count, is_cpu, size, speed = match.groups()
        if speed and not float(speed):
            raise RequestError(f"{part.strip()!r} is never read: leave @{speed} out, or write how many GB/s it reads.")
        bytes_per_s = float(speed) * 1e9 if speed else None
        if is_cpu:
            if count or any(device.kind == "cpu" for device in found):
                raise RequestError(f"{text!r} names the CPU's memory more than once: write cpu:64GB once.")
            found.append(imagined_cpu(float(size), bytes_per_s))
            continue
        if not 0 < int(count or 1) <= MOST_GPUS - len(found):
            raise RequestError(f"{text!r} is no machine: it has 1 to {MOST_GPUS} GPUs, written as 2x24GB, or none, as cpu:64GB.")
        for _ in range(int(count or 1)):
            name = f"gpu {sum(device.kind == 'gpu' for device in found)}"
            found.append(imagined_gpu(name, float(size), bytes_per_s))
    return tuple(found)
