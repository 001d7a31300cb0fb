"""Tests for a function, from the prompt's share to the text that goes into a file: checked, tried where the user allows it, mended once.

Owns: the course of it. Which file it is, `suites` says; what is wrong with an answer, `checking_tests`; how it joins tests that are there
already, `joining_tests`; what an editor makes of it is another's matter.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_server.actions import checking_tests, guard, prompting, reading, sandbox, suites
from lsp_server.actions.extraction import fence_language
from lsp_server.actions.reading import Heard, Words
from lsp_server.actions.suites import Plan
from lsp_server.actions.surroundings import Part
from lsp_server.actions.tasks import Task
from lsp_server.errors import Refusal, Unusable
from lsp_server.settings import ActionSettings
from lsp_server.workspace import path_of
from model_host.generation import Engine


def plan(task: Task, folders: Sequence[str]) -> Plan:
    """Where the tests of a task go. Raises Refusal."""
    source = path_of(task.snapshot.uri)
    roots = [root for folder in folders if (root := path_of(folder)) is not None and source is not None and source.is_relative_to(root)]
    if source is None or not roots:
        raise Refusal("Tests are written into the project's folder, and this document is in none: open the folder.")
    root = max(roots, key=lambda folder: len(folder.parts))
    suite = suites.suite_of(root, source, task.snapshot.language)
    if suite is None:
        raise Refusal(f"How tests are written in {task.snapshot.language} is not known here: ask for them in the chat.")
    if reason := guard.refusal(suite.file.as_uri(), folders, is_open=False):
        raise Refusal(reason)
    return Plan(root=root, source=source, suite=suite, existing=text_of(suite.file) or "")


def text_of(file: Path) -> str | None:
    """What is in a file of tests; None where there is no such file. Raises Refusal."""
    try:
        return file.read_bytes().decode("utf-8") if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file.name} is there already and cannot be read: {error}") from error


def part(plan: Plan, language: str, importance: int) -> Part:
    """The tests that are there already, as an example for the model."""
    return Part(
        what=f"the tests in {plan.suite.example_path}",
        heading=f"Tests of this project look like this ({plan.suite.example_path}):",
        language=fence_language(language),
        text=plan.suite.example,
        importance=importance,
        order=1,
    )


async def tried(task: Task, plan: Plan, code: str, python: str) -> sandbox.Run | None:
    """What became of the tests in a sandbox; None for tests that are not tried here. The source is as the editor has it, saved or not."""
    if task.snapshot.language != "python" or not python:
        return None
    name = plan.suite.file.with_name(f"test_deepseek_lsp_{plan.suite.file.stem}.py").relative_to(plan.root)
    command = sandbox.command_for(plan.suite.framework, python, name.as_posix())
    if command is None:
        return sandbox.Run(is_done=False, output=f"tests_python = {python!r} is no program: name the project's Python.")
    source = plan.source.relative_to(plan.root).as_posix()
    return await sandbox.run(command, plan.root, {name.as_posix(): code, source: "".join(task.region.lines)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Who hears the answer while it comes, and that it begins anew."""

    heard: Heard
    start_over: Heard


async def write(
    engine: Engine, task: Task, plan: Plan, settings: ActionSettings, python: str, watched: Watched
) -> tuple[str, tuple[str, ...]]:
    """Test code for the task, and notes for the user; what does not work is mended once. Raises Refusal."""
    head = task.action.head
    parts = [part(plan, task.snapshot.language, head.context.index("tests"))] if "tests" in head.context else []
    chat, found = prompting.prompt(task, engine, settings, parts, {"framework": plan.suite.framework, "module": plan.suite.module})
    words = await reading.answer(engine, chat, head.max_new_tokens, settings, watched.heard, None)
    wrong, code, notes = await judged(task, plan, words, python)
    if wrong is not None:
        await watched.start_over(wrong)
        chat = prompting.continued(chat, words.text, repair(wrong))
        words = await reading.answer(engine, chat, head.max_new_tokens, settings, watched.heard, None)
        wrong, code, notes = await judged(task, plan, words, python)
    if not code:
        raise Unusable(f"{wrong} Nothing was written: ask again.")
    if wrong is not None:
        notes = (*notes, f"The tests are written as they came, and do not work yet. {wrong}")
    return code, (*reading.notes_of(engine, words, found.dropped), *notes)


async def judged(task: Task, plan: Plan, words: Words, python: str) -> tuple[str | None, str, tuple[str, ...]]:
    """What is wrong with an answer, the code that may be written all the same (none where it cannot even be read), and notes."""
    try:
        code = checking_tests.code_of(task, plan, words.text, is_cut_off=words.is_cut_off)
    except Unusable as unusable:
        return str(unusable), "", ()
    if wrong := await asyncio.to_thread(checking_tests.problem, task, plan, code):
        return wrong, "", ()
    run = await tried(task, plan, code, python)
    if run is None or not run.is_done:
        return None, code, (run.output,) if run else ()
    return (None, code, ("The tests were run, and pass.",)) if run.passed else (f"They fail:\n\n{run.output}", code, ())


def repair(what: str) -> str:
    """The second question of a conversation about tests that do not work."""
    return f"This does not work:\n\n{what}\n\nAnswer with the whole corrected test code in one fenced block."
