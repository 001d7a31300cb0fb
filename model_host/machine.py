"""What this machine has: devices, what is free on them and how fast they are read, as facts for `placement`.

Owns: asking torch and the system. Decides nothing.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from model_host.devices import Device, imagined_cpu, imagined_gpu

log = logging.getLogger(__name__)


def real_devices() -> tuple[Device, ...]:
    """This machine's GPUs and its memory, with what is free now. Where a driver does not tell the speed of memory, it is assumed to be
    the usual one of such a card, or of two channels of DDR5."""
    found: list[Device] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        clock_khz, bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        card = imagined_gpu(f"cuda:{index}", properties.total_memory / 1e9, 2000.0 * clock_khz * bits / 8 or None)
        found.append(replace(card, free_bytes=free_bytes(torch.device("cuda", index)) or 0))
    free = free_bytes(torch.device("cpu"))
    return (*found, replace(imagined_cpu(0), free_bytes=free)) if free is not None else tuple(found)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken now; of the CPU including what the system would give up of its file cache. None: not known, as of a GPU that
    does not answer any more."""
    if device.type == "cuda":
        try:
            free, _ = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            log.warning("%s does not answer and is left out: %s", device, str(error).partition("\n")[0])
            return None
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
