"""An engine that says what a test wrote down, with the protocol of the real one; and a server process around it.

`python tests/scripted.py '{"pieces": ["a", "b"], "step_s": 0.01}'` serves on stdio. A piece of null waits for the
cancellation, as a model that thinks forever would. With `answers`, from words to pieces, the words of the question choose. With `sees` it
says the first line about other files that this word is in. With
`{"file": "/tmp/script.json"}` the script is read anew for each request, and /tmp/script.log tells what was asked and how it ended.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lsp_server.host import Host
from lsp_server.server import create_server
from lsp_server.settings import user_settings
from model_host.generation import Chat, Cost, Facts, Fim, Finish, Generation, Request

FACTS = Facts(checkpoint="scripted", device="cpu", dtype="float32", parameters=0, weight_bytes=0, context_tokens=16_384, load_s=0.0)


class ScriptedEngine:
    def __init__(self, pieces: Sequence[str | None], step_s: float = 0.0, facts: Facts = FACTS) -> None:
        self.facts = facts
        self.requests: list[Request] = []
        self.generations: list[Generation] = []
        self._pieces, self._step_s = pieces, step_s
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: Request) -> Generation:
        generation = Generation()
        self.requests.append(request)
        self.generations.append(generation)
        task = asyncio.ensure_future(self._speak(generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return generation

    async def _speak(self, generation: Generation) -> None:
        started, said = time.monotonic(), 0
        for piece in self._pieces:
            await asyncio.sleep(self._step_s)
            while piece is None and not generation.is_cancelled:
                await asyncio.sleep(0.001)
            if generation.is_cancelled or piece is None:
                break
            generation.feed(piece)
            said += 1
        generation.feed(
            Cost(
                finish=Finish.CANCELLED if generation.is_cancelled else Finish.END,
                cached_tokens=0,
                computed_tokens=1,
                new_tokens=said,
                queued_s=0.0,
                first_token_s=0.001,
                decode_s=time.monotonic() - started,
            )
        )

    def close(self) -> None:
        for generation in self.generations:
            generation.cancel()


class AnsweringEngine(ScriptedEngine):
    """One answer after the other, one for each request."""

    def __init__(self, *answers: str) -> None:
        super().__init__([])
        self._answers = answers

    def submit(self, request: Request) -> Generation:
        self._pieces = [self._answers[len(self.requests)]]
        return super().submit(request)


class PromptedEngine(ScriptedEngine):
    """What it says depends on words that the question contains, or else one before it."""

    def __init__(self, answers: Mapping[str, Sequence[str | None]], step_s: float = 0.0) -> None:
        super().__init__([], step_s)
        self._answers = answers

    def submit(self, request: Request) -> Generation:
        messages = reversed(request.prompt.messages) if isinstance(request.prompt, Chat) else ()
        found = (pieces for message in messages for words, pieces in self._answers.items() if words in message.content)
        self._pieces = next(found, [])
        return super().submit(request)


class SeeingEngine(ScriptedEngine):
    """Says the first line with a word in it that stands in what it is told of other files."""

    def __init__(self, sees: str) -> None:
        super().__init__([])
        self._word = sees

    def submit(self, request: Request) -> Generation:
        told = request.prompt.repository.splitlines() if isinstance(request.prompt, Fim) else []
        self._pieces = [next((line for line in told if self._word in line), "nothing")]
        return super().submit(request)


class FollowingEngine(ScriptedEngine):
    """Says what a file says when it is asked."""

    def __init__(self, file: str) -> None:
        super().__init__([])
        self._file = Path(file)

    def submit(self, request: Request) -> Generation:
        script = json.loads(self._file.read_text("utf-8"))
        self._pieces, self._step_s = script["pieces"], script.get("step_s", 0.0)
        if isinstance(request.prompt, Chat):
            self._tell(asked="\n".join(message.content for message in request.prompt.messages))
        return super().submit(request)

    async def _speak(self, generation: Generation) -> None:
        await super()._speak(generation)
        self._tell(cancelled=generation.is_cancelled)

    def _tell(self, **what: object) -> None:
        with self._file.with_suffix(".log").open("a", encoding="utf-8") as log:
            log.write(json.dumps(what) + "\n")


def main() -> None:
    script = json.loads(sys.argv[1])
    kinds = {"answers": PromptedEngine, "file": FollowingEngine, "sees": SeeingEngine}
    kind = next((kind for name, kind in kinds.items() if name in script), ScriptedEngine)
    engine = kind(**script)
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = create_server(*user_settings(), Host(engine=engine, state="ready", message="scripted"))
    server.start_io(sys.stdin.buffer, wire)


if __name__ == "__main__":
    main()
