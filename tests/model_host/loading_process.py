"""A process of its own that loads a checkpoint, once and twice at a time, and lets go of it: `python -m ... FOLDER DTYPE KERNELS`.

Prints what it measured as JSON: memory that belongs to the process alone (RssAnon of /proc/self/status; pages of mapped files are
the system's cache and go back by themselves), and the highest total (VmHWM), pages of files included.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model_host.batch import Span, Step
from model_host.checkpoints import STARTER, release_memory
from model_host.pages import PAGE_TOKENS
from model_host.runner import Kernels, Runner, StepModel, load


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def logits_of(model: StepModel) -> torch.Tensor:
    ids = tuple(range(PAGE_TOKENS))
    return Runner(model, 0).run(Step(ids=ids, spans=(Span(tokens=PAGE_TOKENS, context=PAGE_TOKENS, pages=(0,)),), wanted=ids))


def measure(folder: Path, dtype: str, kernels: Kernels) -> dict[str, object]:
    shares: list[float] = []
    owned: list[int] = []

    def progress(what: str, share: float) -> None:
        shares.append(share)
        owned.append(status("RssAnon"))

    def one_more(_: int = 0) -> StepModel:
        return load(folder, device="cpu", dtype=dtype, threads=1, kernels=kernels, progress=progress)

    Path("/proc/self/clear_refs").write_text("5")  # the highest total starts from here
    before, total_before = status("RssAnon"), status("VmRSS")
    model = one_more()
    found: dict[str, object] = {
        "weights": model.weight_bytes,
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
    found["two_are_equal"] = torch.equal(logits_of(one), logits_of(other))
    del one, other
    release_memory()
    found["left_by_two"] = status("RssAnon") - before
    return found


if __name__ == "__main__":
    chosen = sys.argv[2:]
    logits_of(load(STARTER, device="cpu", dtype=chosen[0], threads=1, kernels=chosen[1], progress=lambda what, share: None))
    release_memory()  # what computing takes once and for all is taken
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]), *chosen)))
