"""What the sections of the benchmark share, and how what they find is written down."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model_host.config import ModelConfig
from model_host.gpu import plain
from model_host.gpu.model import GpuModel
from model_host.latents import LatentPool
from model_host.models.deepseek_v2 import Model


@dataclass(slots=True)
class Bench:
    """What the sections share and what they have found."""

    shape: dict[str, Any]
    device: torch.device
    out: Path
    budget_s: float
    is_tiny: bool
    started: float = field(default_factory=time.perf_counter)
    sections: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    operations: Any = plain
    """Kernels, once it is known that they can be loaded; with the sizes that were fastest, once these have been tried."""
    model: Model | None = None
    gpu: GpuModel | None = None
    latents: LatentPool | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.started)

    @property
    def contexts(self) -> tuple[int, ...]:
        return (20, 50) if self.is_tiny else (512, 8192, 32_768)

    @property
    def prompts(self) -> tuple[int, ...]:
        return (32, 64) if self.is_tiny else (1024, 8192, 32_768)

    def run(self, name: str, section: Callable[["Bench"], Any], needs_s: float) -> None:
        """Runs a section if the budget allows it, and writes down what is known so far."""
        began = time.perf_counter()
        if self.left_s < needs_s:
            self.sections[name] = {"left out": f"needs about {needs_s:.0f} s, {self.left_s:.0f} s are left"}
        else:
            self.sections[name] = {}
            try:
                with torch.inference_mode():
                    section(self)
            except Exception:  # whatever goes wrong here, the other sections are worth having
                self.sections[name]["error"] = traceback.format_exc(limit=-6)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.sections[name]["seconds"] = time.perf_counter() - began
        print(f"{name}: {time.perf_counter() - began:.1f} s{' ERROR' if 'error' in self.sections[name] else ''}", flush=True)
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": "gpu", "metrics": self.metrics, "sections": self.sections}
        (self.out / "gpu.json").write_text(json.dumps(result, indent=1, default=str))
        (self.out / "gpu.md").write_text("\n".join(as_markdown(self.sections)) + "\n")


def as_markdown(sections: dict[str, Any]) -> Iterator[str]:
    for name, found in sections.items():
        yield f"## {name}\n"
        for key, value in found.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(dict.fromkeys(column for row in value for column in row))
                yield f"\n{key}:\n"
                yield "| " + " | ".join(columns) + " |"
                yield "|" + "---|" * len(columns)
                for row in value:
                    yield "| " + " | ".join(as_text(row.get(column, "")) for column in columns) + " |"
                yield ""
            elif key == "error":
                yield f"```\n{value}```"
            else:
                yield f"- {key}: {as_text(value)}"
        yield ""


def as_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
