"""A checkpoint's chat template: whether it can be used, and a conversation in its words.

Owns: the trial at load and the sentences about a template that is missing, broken or up to something. transformers renders, in a sandbox of
Jinja's. Which ids become of it is the tokenizer's matter.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model_host import catalogue
from model_host.errors import CheckpointError
from model_host.generation import Message

TRIAL = (
    Message(role="user", content="What is one and one?"),
    Message(role="assistant", content="Two. $x {{ y }}"),
    Message(role="user", content="And two?\n\n    if a:"),
)
LIMIT_S = 5.0
INSTEAD = "Actions are asked by example until it is mended: download tokenizer_config.json again, from the model's own page."


def rendered(reader: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    """The conversation in the checkpoint's words, open for the assistant's answer. Raises CheckpointError."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(reader.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # Jinja's errors, and whatever a template makes of its loops and values
        said = (str(error) or type(error).__name__).strip().rstrip(".").split("\n")[0]
        raise CheckpointError(f"The checkpoint's chat template cannot be used: {said}.") from error


def problem(reader: PreTrainedTokenizerFast, folder: Path) -> str | None:
    """Why the checkpoint does not converse, as a sentence; None when it does. Tries its template on a conversation of its own."""
    known = catalogue.recognised(folder)
    if known is not None and known.chat is False:
        return catalogue.without_conversation(folder)
    if not reader.chat_template:
        return f"The chat template of {known.name} is missing. {INSTEAD}" if known else catalogue.without_conversation(folder)
    found: list[str | CheckpointError] = []

    def attempt() -> None:
        try:
            found.append(rendered(reader, TRIAL))
        except CheckpointError as error:
            found.append(error)

    trial = threading.Thread(target=attempt, daemon=True)  # a template may loop for days, and no sandbox ends that
    trial.start()
    trial.join(LIMIT_S)
    if not found:
        return f"The checkpoint's chat template did not end within {LIMIT_S:g} s. {INSTEAD}"
    if isinstance(found[0], CheckpointError):
        return f"{found[0]} {INSTEAD}"
    place = 0
    for message in TRIAL:
        place = found[0].find(message.content, place)
        if place < 0:
            return f"The checkpoint's chat template loses what is said. {INSTEAD}"
        place += len(message.content)
    return None
