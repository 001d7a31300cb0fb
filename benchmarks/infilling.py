"""python -m benchmarks.infilling --data FOLDER [--quick]: how well a checkpoint fills holes in HumanEval-Infilling.

The prompt is the server's: cut at the start of the cursor's line, what stands on it before the cursor as the middle's beginning.
Greedy. Exact match compares the first line; pass@1 runs the problem's tests on the whole program, in a subprocess with limits on
time and memory (no protection against malice: the code comes from the model that is scored).
"""

import argparse
import asyncio
import gzip
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import report
from model_host.checkpoints import locate
from model_host.engine import LocalEngine, load_engine
from model_host.generation import Fim, Request

SETS = {"single_line": "HumanEval-SingleLineInfilling.jsonl.gz", "random_span": "HumanEval-RandomSpanInfillingLight.jsonl.gz"}
MAX_SECONDS, MAX_BYTES = 5, 2 * 2**30


@dataclass(frozen=True, slots=True)
class Case:
    prompt: str
    suffix: str
    solution: str
    test: str
    entry_point: str

    @property
    def fim(self) -> Fim:
        anchor = self.prompt.rfind("\n") + 1
        return Fim(prefix=self.prompt[:anchor], suffix=self.suffix, middle=self.prompt[anchor:])


def cases(file: Path, limit: int) -> Iterator[Case]:
    """`limit` cases spread evenly over the file; all of them for 0."""
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        found = [json.loads(row) for row in rows]
    step = max(len(found) / limit, 1.0) if limit else 1.0
    for index in range(int(len(found) / step)):
        row = found[int(index * step)]
        yield Case(row["prompt"], row["suffix"], row["canonical_solution"], row["test"], row["entry_point"])


async def filled(engine: LocalEngine, case: Case, one_line: bool, prompt: Fim | None = None) -> tuple[str, bool]:
    """What the model puts into the hole, and whether it ended by itself."""
    text = ""
    async with engine.submit(Request(prompt=prompt or case.fim, max_new_tokens=128)) as generation:
        async for piece in generation:
            text += piece
            if one_line and "\n" in text:
                return text[: text.index("\n") + 1], True
        cost = generation.cost
    return text, cost is not None and cost.finish == "end"


def passes(case: Case, middle: str) -> bool:
    program = f"{case.prompt}{middle}{case.suffix}\n{case.test}\ncheck({case.entry_point})\n"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-"],
                input=program.encode(),
                cwd=folder,
                env={},
                capture_output=True,
                timeout=2 * MAX_SECONDS,
                preexec_fn=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


async def score(engine: LocalEngine, file: Path, limit: int) -> dict[str, float]:
    one_line = "SingleLine" in file.name
    exact = passed = ended = total = 0
    for case in cases(file, limit):
        middle, end = await filled(engine, case, one_line)
        first, wanted = middle.split("\n")[0].rstrip(), case.solution.split("\n")[0].rstrip()
        total += 1
        ended += end
        exact += first == wanted
        passed += await asyncio.to_thread(passes, case, middle)
    return {
        "cases": total,
        "exact_first_line_percent": 100 * exact / total,
        "pass_at_1_percent": 100 * passed / total,
        "ended_percent": 100 * ended / total,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infilling", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the HumanEval-Infilling files")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--limit", type=int, default=0, help="cases of each set, spread evenly (default: all)")
    parser.add_argument("--quick", action="store_true", help="20 cases of each set")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    choice = parser.parse_args()
    engine = load_engine(locate(choice.model), device=choice.device, dtype=choice.dtype)
    metrics: dict[str, float] = {}
    for name, file in SETS.items():
        if not (choice.data / file).is_file():
            parser.error(f"{choice.data / file} is not there: get it from github.com/openai/human-eval-infilling")
        found = await score(engine, choice.data / file, 20 if choice.quick else choice.limit)
        metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
    engine.close()
    report("infilling", metrics)


if __name__ == "__main__":
    asyncio.run(main())
