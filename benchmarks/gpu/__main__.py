"""python -m benchmarks.gpu --out DIR [--tiny] [--budget-s S]: what the engine's model does on a GPU, held against its ceilings.

Random weights in the shapes of DeepSeek-Coder-V2-Lite, bfloat16; then in fewer bits, with the 236B in 4; last over all cards, where
there are several. First whether the kernels and the captured graphs are right, then how fast they are: decode beside the plain torch
path, transformers' model (which shares the weights), and the bytes of a token over the bandwidth measured in the same run; prefill
beside the operations of a prompt over the measured rate of large matmuls.

Every section stands alone: what it finds, or the error that ended it, is in DIR/gpu.json and DIR/gpu.md before the next one starts,
and what does not fit into the budget is left out and named. Needs torch, pydantic, Triton, transformers for the comparison, and
bitsandbytes for its NF4.
`--tiny` runs all of it with a tiny model, on a CPU too, where the figures mean nothing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, as_markdown
from benchmarks.gpu.cards import cards
from benchmarks.gpu.decoding import decode, decode_plain, profile, verify
from benchmarks.gpu.formats import formats
from benchmarks.gpu.kernels import TUNING_LEAVES_S, agreement, correctness, tuning
from benchmarks.gpu.machine import build, ceilings, machine
from benchmarks.gpu.peer import transformers
from benchmarks.gpu.prompts import prefill, prompt_attention, short_spans
from benchmarks.gpu.shapes import LITE, TINY

SECTIONS: tuple[tuple[str, Callable[[Bench], None], float], ...] = (
    ("machine", machine, 0),
    ("build", build, 0),
    ("ceilings", ceilings, 0),
    ("decode, plain torch", decode_plain, 0),
    ("prefill", prefill, 0),
    ("transformers", transformers, 60),
    ("kernels against their plain forms", correctness, 0),  # an invalid access here would end everything after it
    ("tuning", tuning, TUNING_LEAVES_S + 30),
    ("graph against plain", agreement, 45),
    ("decode", decode, 0),
    ("profile", profile, 5),
    ("several tokens of one sequence", verify, 5),
    ("attention of a prompt", prompt_attention, 20),
    ("short spans, plain torch", short_spans, 20),
    ("formats", formats, 120),
    ("several cards", cards, 120),
)
"""Name, what it does, and the seconds it should have left to start."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    parser.add_argument("--budget-s", type=float, default=450.0, help="sections that do not fit into what is left of it are left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="sections whose names contain one of these words")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("there is no GPU; --tiny runs the benchmark with a tiny model on the CPU")
    bench = Bench(TINY if given.tiny else LITE, device, given.out, given.budget_s, given.tiny)
    for name, section, needs_s in SECTIONS:
        if not given.only or name in ("machine", "build", "ceilings") or any(word in name for word in given.only):
            bench.run(name, section, 0 if given.tiny else needs_s)
    print("\n".join(as_markdown(bench.sections)))
    about = {key: bench.sections["machine"].get(key, "none") for key in ("gpu", "torch", "triton", "python")}
    print(json.dumps({"benchmark": "gpu", "machine": about, "metrics": bench.metrics, "goals": {}}))


if __name__ == "__main__":
    main()
