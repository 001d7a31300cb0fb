"""What every benchmark prints: a table, then one last line of JSON with the metrics and how they stand to their goals."""

import json
import operator
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Goal:
    """A metric's goal, such as `<= 2.0`."""

    metric: str
    comparison: str
    goal: float


def machine() -> dict[str, str | int]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count() or 0, "memory_gib": memory_gib, "gpu": gpu}


def report(benchmark: str, metrics: Mapping[str, float], goals: tuple[Goal, ...] = ()) -> None:
    width = max(map(len, metrics))
    by_name = {goal.metric: goal for goal in goals}
    for name, value in metrics.items():
        goal = by_name.get(name)
        against = f"   goal {goal.comparison} {goal.goal:g}" if goal else ""
        print(f"{name:{width}}  {value:12.3f}{against}")
    verdicts = {
        g.metric: {
            "value": metrics[g.metric],
            "goal": f"{g.comparison} {g.goal:g}",
            "holds": COMPARE[g.comparison](metrics[g.metric], g.goal),
        }
        for g in goals
        if g.metric in metrics
    }
    print(json.dumps({"benchmark": benchmark, "machine": machine(), "metrics": dict(metrics), "goals": verdicts}))
