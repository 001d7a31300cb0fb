"""A process of its own that loads a checkpoint, once and twice at a time, and lets go of it: `python -m ... FOLDER`.

Prints what it measured as JSON: memory that belongs to the process alone (RssAnon of /proc/self/status; pages of mapped files are
the system's cache and go back by themselves), and the highest total (VmHWM), pages of files included.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model_host.checkpoints import load_model, release_memory
from model_host.models.deepseek_v2 import Model


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, dtype: str) -> dict[str, object]:
    shares: list[float] = []
    owned: list[int] = []

    def progress(what: str, share: float) -> None:
        shares.append(share)
        owned.append(status("RssAnon"))

    def load(_: int = 0) -> Model:
        return load_model(folder, device=torch.device("cpu"), dtype=getattr(torch, dtype), progress=progress)

    Path("/proc/self/clear_refs").write_text("5")  # the highest total starts from here
    before, total_before = status("RssAnon"), status("VmRSS")
    model = load()
    found: dict[str, object] = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "owned": status("RssAnon") - before,
        "most_owned": max(owned) - before,
        "most_in_total": status("VmHWM") - total_before,
        "shares": shares.copy(),
    }
    del model
    release_memory()
    found["left"] = status("RssAnon") - before
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(load, range(2))
    found["owned_by_two"] = status("RssAnon") - before
    found["two_are_equal"] = all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    found["two_share_nothing"] = one.norm.weight.data_ptr() != other.norm.weight.data_ptr()
    del one, other
    release_memory()
    found["left_by_two"] = status("RssAnon") - before
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
