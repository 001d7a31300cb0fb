"""Prompts for checkpoints that go on with text and never learned to converse: an example of what is wanted, then the request.

Owns: the layout of such a text and where its answer ends. The examples are files, one for each kind of answer.
"""

import re
from importlib.resources import files

REQUEST, ANSWER = "### Request\n", "### Answer\n"
STOP = ("\n### ",)
"""Where an answer ends, since such a checkpoint would go on with a request of its own."""
HEADING = re.compile(r"^### ", re.M)


def example(answer: str) -> str:
    """The example for a kind of answer, as the head of an action names it."""
    file = "replace" if answer == "insert_above" else answer
    return (files("prompts") / "examples" / f"{file}.md").read_text("utf-8")


def text(answer: str, words: str) -> str:
    """The whole prompt for the request `words`, in which nothing looks like the beginning of another."""
    return f"{example(answer)}\n{REQUEST}{HEADING.sub(' ### ', words)}\n\n{ANSWER}"
