"""The machine, the model that the other sections use, and the rates that they are held against."""

import os
import platform
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import device_seconds, wait
from benchmarks.gpu.shapes import filled_pool, random_model
from model_host.gpu import plain
from model_host.gpu.model import MAX_ROWS


def machine(bench: Bench) -> None:
    found = bench.sections["machine"]
    found |= {"torch": torch.__version__, "python": platform.python_version(), "tiny": bench.is_tiny}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    if bench.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        import triton  # noqa: PLC0415

        from model_host.gpu import kernels  # noqa: PLC0415

        found["triton"] = triton.__version__
        bench.operations = kernels


def build(bench: Bench) -> None:
    found, config = bench.sections["build"], bench.config
    bench.model = random_model(config, bench.dtype, bench.device)
    longest = bench.contexts[-1] + 64
    bench.latents = filled_pool(config, MAX_ROWS * longest, bench.dtype, bench.device)
    wait(bench.device)
    found["weights GB"] = sum(p.numel() * p.element_size() for p in bench.model.parameters()) / 1e9
    found["latents GB"] = sum(t.numel() * t.element_size() for t in (bench.latents.c_kv, bench.latents.k_pe)) / 1e9


def ceilings(bench: Bench) -> None:
    """The best of some simple ways to read much memory, and to multiply large matrices."""
    found, device = bench.sections["ceilings"], bench.device
    size = 2**22 if bench.is_tiny else 2**31
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    reads = {"copy": 2 * size / device_seconds(device, lambda: target.copy_(source))}
    wide = source.view(torch.bfloat16).view(-1, 2048).zero_()
    vector = torch.ones(1, 2048, dtype=torch.bfloat16, device=device)
    reads["torch matrix times vector"] = size / device_seconds(device, lambda: F.linear(vector, wide))
    reads["sum"] = size / device_seconds(device, lambda: source.view(torch.float32).sum())
    if isinstance(bench.operations, ModuleType) and bench.operations is not plain and device.type == "cuda":
        for tile in bench.operations.Tile(4, 2048, 4), bench.operations.Tile(8, 512, 4), bench.operations.Tile(16, 256, 8):
            tuning = replace(bench.operations.DEFAULT, linear=tile)
            took = device_seconds(device, partial(bench.operations.linear, vector, wide, tuning))
            reads[f"kernel, matrix times vector, {tile}"] = size / took
    found["bandwidth GB/s"] = [{"way": way, "GB/s": rate / 1e9} for way, rate in reads.items()]
    rates = {}
    for rows, inner, columns in [(64, 64, 64)] if bench.is_tiny else [(8192, 8192, 8192), (16384, 8192, 8192), (32768, 2048, 10944)]:
        a = torch.randn(rows, inner, dtype=bench.dtype, device=device)
        b = torch.randn(columns, inner, dtype=bench.dtype, device=device)
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / device_seconds(device, partial(F.linear, a, b))
    found["matmul TFLOP/s"] = [{"shape": shape, "TFLOP/s": rate / 1e12} for shape, rate in rates.items()]
    bench.metrics["bandwidth_gb_s"] = max(reads.values()) / 1e9
    bench.metrics["matmul_tflop_s"] = max(rates.values()) / 1e12
