"""A process of its own that loads a checkpoint, once and twice at a time, and lets go of it: `python -m ... FOLDER DTYPE FORM`.

Prints what it measured as JSON: memory that belongs to the process alone (RssAnon of /proc/self/status; pages of mapped files are
the system's cache and go back by themselves), and the highest total (VmHWM), pages of files included.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model_host.batch import Span, Step
from model_host.checkpoints import load_model, release_memory
from model_host.generation import Progress
from model_host.latents import LatentPool
from model_host.models.deepseek_v2 import Model
from model_host.native.model import NativeModel
from model_host.pages import PAGE_TOKENS


def load(folder: Path, dtype: str, form: str, progress: Progress) -> Model | NativeModel:
    if form == "native":
        return NativeModel.load(folder, dtype, progress, threads=1)
    return load_model(folder, device=torch.device("cpu"), dtype=getattr(torch, dtype), progress=progress)


def weights_of(model: Model | NativeModel) -> int:
    return model.weight_bytes if isinstance(model, NativeModel) else sum(parameter.nbytes for parameter in model.parameters())


def are_equal(one: Model | NativeModel, other: Model | NativeModel) -> bool:
    if isinstance(one, NativeModel) and isinstance(other, NativeModel):
        return torch.equal(logits_of(one), logits_of(other))
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def logits_of(model: NativeModel) -> torch.Tensor:
    ids = tuple(range(PAGE_TOKENS))
    step = Step(ids=ids, spans=(Span(tokens=PAGE_TOKENS, context=PAGE_TOKENS, pages=(0,)),), wanted=ids)
    return model.forward(step, LatentPool(model.config, 1, torch.float32, torch.device("cpu")))


def measure(folder: Path, dtype: str, form: str) -> dict[str, object]:
    shares: list[float] = []
    owned: list[int] = []

    def progress(what: str, share: float) -> None:
        shares.append(share)
        owned.append(status("RssAnon"))

    def one_more(_: int = 0) -> Model | NativeModel:
        return load(folder, dtype, form, progress)

    Path("/proc/self/clear_refs").write_text("5")  # the highest total starts from here
    before, total_before = status("RssAnon"), status("VmRSS")
    model = one_more()
    found: dict[str, object] = {
        "weights": weights_of(model),
        "owned": status("RssAnon") - before,
        "most_owned": max(owned) - before,
        "most_in_total": status("VmHWM") - total_before,
        "shares": shares.copy(),
    }
    del model
    release_memory()
    found["left"] = status("RssAnon") - before
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(one_more, range(2))
    found["owned_by_two"] = status("RssAnon") - before
    found["two_are_equal"] = are_equal(one, other)
    del one, other
    release_memory()
    found["left_by_two"] = status("RssAnon") - before
    return found


if __name__ == "__main__":
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]), *sys.argv[2:])))
