"""The compiled forward pass as ctypes sees it: which library this processor runs, its structures, its functions.

Owns: the C ABI of forward.cpp, mirrored by hand. ctypes lets the interpreter's lock go while a function runs.
"""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

from model_host.native import build

FOLDER = Path(__file__).parent


class Config(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("vocab", "hidden", "dense_inner", "expert_inner", "layers", "dense_layers", "heads", "q_rank")),
        *((name, c_int32) for name in ("latent", "nope", "rope", "value", "experts", "shared", "top_k", "groups", "top_groups", "kind")),
        *((name, c_float) for name in ("routed_scale", "eps", "softmax_scale", "rope_magnitude")),
    ]


class Pool(ctypes.Structure):
    _fields_ = [("c_kv", c_void_p), ("k_pe", c_void_p), ("slots", c_int64), ("is_bf16", c_int32)]


class Sequence(ctypes.Structure):
    _fields_ = [("pages", POINTER(c_int32)), ("tokens", c_int32), ("context", c_int32)]


class Slot(IntEnum):
    """Where a tensor of the checkpoint goes."""

    EMBEDDING = 0
    HEAD = 1
    FINAL_NORM = 2
    INPUT_NORM = 3
    Q_NORM = 4
    LATENT_NORM = 5
    POST_NORM = 6
    Q = 7
    Q_B = 8
    KV_A = 9
    O = 10  # noqa: E741
    GATE = 11
    KEY_UP = 12
    KEY_ABSORB = 13
    VALUE_UP = 14
    EXPERT_GATE = 15
    EXPERT_UP = 16
    EXPERT_DOWN = 17
    SHARED_GATE = 18
    SHARED_UP = 19
    SHARED_DOWN = 20


class Attention(IntEnum):
    BY_COST = 0
    ABSORBED = 1
    EXPANDED = 2


@cache
def available_levels() -> tuple[str, ...]:
    """The instruction sets that were built and that this processor runs, the best last."""
    if not build.library(FOLDER, "plain").is_file():
        return ()
    best = ctypes.CDLL(str(build.library(FOLDER, "plain"))).native_level()
    return tuple(level for level in list(build.LEVELS)[: best + 1] if build.library(FOLDER, level).is_file())


def why_unavailable() -> str | None:
    """A sentence for the user when the compiled forward pass cannot be used, or None when it can."""
    if available_levels():
        return None
    reason = FOLDER / build.REASON
    why = reason.read_text("utf-8") if reason.is_file() else "the project was not installed with pip"
    return f"The compiled kernels for CPUs are missing, so plain torch is used: {why}. Install g++ or clang++ and install again."


@cache
def load(level: str) -> ctypes.CDLL:
    """The library of an instruction set, its functions typed."""
    native = ctypes.CDLL(str(build.library(FOLDER, level)))
    native.native_create.argtypes = [POINTER(Config), POINTER(c_float), c_int]
    native.native_create.restype = c_void_p
    native.native_destroy.argtypes = [c_void_p]
    native.native_destroy.restype = None
    native.native_put.argtypes = [c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]
    native.native_weight_bytes.argtypes = [c_void_p]
    native.native_weight_bytes.restype = c_int64
    native.native_use_threads.argtypes = [c_void_p, c_int]
    native.native_use_threads.restype = None
    native.native_use_attention.argtypes = [c_void_p, c_int]
    native.native_use_attention.restype = None
    native.native_forward.argtypes = [
        c_void_p, POINTER(Pool), POINTER(Sequence), c_int64, POINTER(c_int32), POINTER(c_int32), c_int64, c_void_p,
    ]  # fmt: skip
    native.native_experts.argtypes = [c_void_p, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    return native
