"""The GPU benchmark from end to end with its tiny model: what it would measure is not looked at, only that nothing fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.decoding import token_bytes
from benchmarks.gpu.shapes import LITE
from model_host.config import ModelConfig


def test_every_section_of_the_gpu_benchmark_runs(tmp_path: Path):
    """In a process of its own: it compiles for the machine that is there, other tests' kernels run under Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: found["error"] for name, found in sections.items() if "error" in found} == {}
    assert list(sections) == [name for name, _, _ in SECTIONS]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["metrics"]["float32_same_tokens_percent"] == 100


def test_the_bytes_of_a_token_are_those_of_the_weights_it_uses():
    """4.9 GB of Coder-V2-Lite's 31.4 are active: all but the embeddings and 58 of each layer's 64 experts."""
    config = ModelConfig.model_validate(LITE)
    every = token_bytes(config, 10**6, 0, 2) + config.vocab_size * config.hidden_size * 2
    assert every == pytest.approx(31.41e9, rel=1e-3)
    assert token_bytes(config, 1, 0, 2) == pytest.approx(4.90e9, rel=1e-3)
