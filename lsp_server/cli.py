"""The command `deepseek-lsp` and its verbs: serve (the default), complete, chat, doctor, download.

Owns: arguments, what a terminal shows, exit statuses. The verbs do nothing that the server does not do the same way.
"""

import asyncio
import importlib
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from lsprotocol import types
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsp_server import ask
from lsp_server.activity import is_news
from lsp_server.connection import VERSION
from lsp_server.host import Host, remote_endpoint
from lsp_server.languages import language_of
from lsp_server.server import create_server
from lsp_server.session import Document, Encoding
from lsp_server.settings import INSTEAD, LOG_VARIABLE, Settings, merge, user_file, user_settings
from model_host.errors import EngineError
from model_host.generation import Facts
from prompts import library

app = typer.Typer(
    help="A private, local pair programmer for any editor, running DeepSeek-V2. Without a verb it serves: editors start it so.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STDIO = typer.Option("--stdio", help="Accepted for editors that pass it: stdin and stdout are the only way to talk.")
LINES_AROUND = 6
PLANNED = ("auto", "float32", "bfloat16", "float16", "int8", "int4", "nf4")


def say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepseek-lsp {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    stdio: Annotated[bool, STDIO] = False,
    version: Annotated[bool, typer.Option("--version", help="Say the version and stop.", callback=say_version, is_eager=True)] = False,
) -> None:
    if context.invoked_subcommand is None:
        serve()


@app.command("serve")
def serve(stdio: Annotated[bool, STDIO] = False) -> None:
    """Speak LSP on stdin and stdout, until the editor goes away."""
    # fd 1 is kept for the protocol alone: whatever else writes to stdout, in any library, lands on stderr
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    wanted = os.environ.get(LOG_VARIABLE, "WARNING").upper()
    level = logging.getLevelNamesMapping().get(wanted)
    logging.basicConfig(level=level or logging.WARNING, stream=sys.stderr)
    logging.getLogger("pygls").setLevel(logging.WARNING)  # below, pygls logs whole messages, and with them the user's text
    logging.getLogger("pygls.protocol.json_rpc").addFilter(is_news)
    layers, problems = user_settings()
    if level is None:
        problems.append(f"{LOG_VARIABLE}={wanted} is left out: write DEBUG, INFO, WARNING or ERROR.")
    server = create_server(layers, problems, Host())
    try:
        server.start_io(sys.stdin.buffer, wire)
    finally:
        server.host.close()
        server.second.host.close()


def parse_place(place: str) -> tuple[Path, int, int | None]:
    """FILE:LINE[:COL], both counted from 1."""
    file, *numbers = place.rsplit(":", 2)
    if len(numbers) == 2 and not numbers[0].isdigit():  # a colon within the file's name
        file, numbers = f"{file}:{numbers[0]}", numbers[1:]
    if not numbers or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise typer.BadParameter(f"{place!r} names no line: write FILE:LINE or FILE:LINE:COL, counted from 1.")
    return Path(file), int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else None


@app.command("complete")
def complete(
    place: Annotated[str, typer.Argument(metavar="FILE:LINE[:COL]", help="Where to complete, counted from 1; the line's end without COL.")],
    type_: Annotated[str, typer.Option("--type", help="Then type this on, and show what that costs.")] = "",
    model: Annotated[str, typer.Option("--model", help="Another model than the settings': 'starter', a folder or a hub name.")] = "",
) -> None:
    """Complete a file at a place, and show what it cost. The file is not changed."""
    file, line, column = parse_place(place)
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from error
    settings, problems = merge(user_settings()[0])
    for problem in problems:
        typer.echo(problem, err=True)
    if model:
        settings = settings.model_copy(update={"model": model})
    ok = asyncio.run(complete_and_show(file, text, line, column, type_, settings))
    raise typer.Exit(0 if ok else 1)


async def complete_and_show(file: Path, text: str, line: int, column: int | None, typed: str, settings: Settings) -> bool:
    """Prints the completion at a place, and the one after `typed`; says whether there was one."""
    console = Console(highlight=False, soft_wrap=True)
    host = Host()
    briefly = settings.model_copy(update={"keep_model_s": 0.0})
    await host.start(briefly, lambda what, share: None)
    if host.engine is None:
        typer.echo(host.message, err=True)
        return False
    try:
        language = language_of(file)
        document = Document(types.TextDocumentItem(file.resolve().as_uri(), language, 0, text), Encoding.Utf32)
        at = types.Position(line - 1, 10**9 if column is None else column - 1)
        answer = await ask.complete(host, document, at, str(file), settings.inline, ask.Memory())
        show(console, document, at, answer)
        show_load(console, host.engine.facts)
        show_cost(console, answer)
        if typed:
            before = document.snapshot(at)
            here = before.range(before.column, before.column)
            document.change(types.TextDocumentContentChangePartial(range=here, text=typed))
            at = types.Position(line - 1, before.column + len(typed))
            again = await ask.complete(host, document, at, str(file), settings.inline, ask.Memory())
            console.print(Text(f"\ntyped {typed!r}", style="bold"))
            show(console, document, at, again, around=0)
            show_cost(console, again)
        return bool(answer.text)
    finally:
        host.close()


def show(console: Console, document: Document, at: types.Position, answer: ask.Answer, around: int = LINES_AROUND) -> None:
    """The lines around the hole; those with the completion are marked in the margin, and its text is green."""
    if answer.range is None:
        console.print(Text(f"Nothing to show: {answer.reason}", style="yellow"))
        return
    cursor = document.snapshot(at)
    replaced = answer.range.end.character - answer.range.start.character
    whole = Text.assemble(cursor.before, (answer.text, "bold green"), cursor.lines[at.line][cursor.column + replaced :])
    whole.rstrip()
    new_lines = whole.split("\n", allow_blank=True)
    first, last = max(at.line - around, 0), min(at.line + around, len(cursor.lines) - 1)
    rows = [(" ", Text(text.rstrip("\r\n"))) for text in cursor.lines[first : at.line]]
    rows += [("▌", row) for row in new_lines]
    rows += [(" ", Text(text.rstrip("\r\n"))) for text in cursor.lines[at.line + 1 : last + 1]]
    for number, (mark, row) in enumerate(rows, start=first + 1):
        console.print(Text.assemble((f"{number:5} ", "dim"), (f"{mark} ", "green"), row))


def show_load(console: Console, facts: Facts) -> None:
    if not facts.parameters:
        console.print(f"\nmodel    {facts.checkpoint} at {facts.device}, which answered within {facts.load_s:.2f} s")
        return
    name = "starter" if Path(facts.checkpoint).parent.name == "starter" else facts.checkpoint
    console.print(
        f"\nmodel    {name}: {facts.parameters / 1e6:,.1f} M parameters, {facts.dtype} on {facts.device}, loaded in {facts.load_s:.2f} s"
    )


def show_cost(console: Console, answer: ask.Answer) -> None:
    if cost := answer.cost:
        tokens = f"{cost.computed_tokens} token{'' if cost.computed_tokens == 1 else 's'}"
        shifted = f", {cost.shifted_tokens} reused nearly" if cost.shifted_tokens else ""
        console.print(
            f"cost     first token after {1000 * cost.first_token_s:.0f} ms, then {cost.tokens_per_s:.0f} tokens/s;"
            f" {tokens} of the prompt computed, {cost.cached_tokens} reused{shifted}, {cost.new_tokens} new"
        )


@app.command("chat")
def chat(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE[:FROM-TO]]...", help="What the first question is about.")] = None,
    model: Annotated[str, typer.Option("--model", help="Another model than the settings': 'starter', a folder or a hub name.")] = "",
) -> None:
    """Talk with the model in the terminal, about files of this folder."""
    settings, problems = merge(user_settings()[0])
    actions, wrong = library.load(user_file().parent / "actions")
    for problem in [*problems, *wrong]:
        typer.echo(problem, err=True)
    settings = settings.model_copy(update={"model": model or settings.chat_model or settings.model})
    talked = importlib.import_module("lsp_server.terminal_chat").talk(settings, actions, files or [])
    raise typer.Exit(0 if talked else 1)


@app.command("download")
def download(name: Annotated[str, typer.Argument(metavar="ORGANISATION/MODEL")]) -> None:
    """Fetch a checkpoint from the hub: the only verb that uses the network."""
    try:
        folder = importlib.import_module("model_host.checkpoints").locate(name, download=True)
    except EngineError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{name} lies in {folder}. To use it, put this line into {user_file()}:\nmodel = {name!r}")


@app.command("doctor")
def doctor(
    models: Annotated[bool, typer.Option("--models", help="List the models there are, and which of them fit here.")] = False,
    model: Annotated[str, typer.Option("--model", help="Plan where this one would lie: a name of --models, or a folder.")] = "",
    devices: Annotated[str, typer.Option("--devices", help="On these instead of this machine's, as 2x24GB or 24GB+cpu:64GB.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="As auto (the best that fits), bfloat16, int8 or int4.")] = "auto",
    context: Annotated[int, typer.Option("--context", min=0, help="With so many tokens of context; 0: 16,384, or all it takes.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="For so many sequences of that context, decoded together.")] = 1,
) -> None:
    """Say what is installed, what would be loaded, what is wrong and what to do."""
    console = Console(highlight=False, soft_wrap=True)
    if models:
        show_models(console)
        return
    if model or devices:
        if dtype not in PLANNED:
            instead = f"; {INSTEAD[dtype]} comes nearest to it" if dtype in INSTEAD else ""
            raise typer.BadParameter(f"{dtype!r} is none of {', '.join(PLANNED)}{instead}.", param_hint="--dtype")
        name = model or merge(user_settings()[0])[0].model
        show_plan(console, importlib.import_module("model_host.inspection").placed(name, devices, dtype, context, batch))
        return
    layers, problems = user_settings()
    settings, wrong = merge(layers)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("deepseek-lsp", VERSION)
    table.add_row("python", sys.version.split()[0])
    for package in ("torch", "transformers", "tokenizers", "pygls", "lsprotocol"):
        table.add_row(package, installed(package))
    problems = [*problems, *wrong]
    report = inspected(settings)
    table.add_row("settings", f"{user_file()}{'' if user_file().exists() else ' (not there: defaults)'}")
    for name, fact in report.facts.items():
        table.add_row(name, fact)
    console.print(table)
    for problem in [*problems, *report.problems]:
        console.print(Text(f"✗ {problem}", style="red"))
    if problems or report.problems:
        raise typer.Exit(1)
    console.print(Text("✓ nothing is wrong", style="green"))


def inspected(settings: Settings) -> Any:
    """What would be loaded, or asked, and what stands in its way."""
    if settings.engine == "openai":
        served = importlib.import_module("model_host.remote.served")
        try:
            return served.inspect(remote_endpoint(settings))
        except EngineError as error:
            return served.Inspection({"engine": settings.remote.url}, [str(error)])
    inspection = importlib.import_module("model_host.inspection")
    return inspection.inspect(settings.model, settings.device, settings.dtype, settings.kernels)


def show_plan(console: Console, report: Any) -> None:
    """A plan in words, or why there is none and what comes nearest."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in report.facts.items():
        table.add_row(name, fact)
    console.print(table)
    for problem in report.problems:
        console.print(Text(f"✗ {problem}", style="red"))
    if report.problems:
        raise typer.Exit(1)


def show_models(console: Console) -> None:
    """The catalogue, a row a model, and where each would fit as it is published (bfloat16)."""
    inspection, catalogue = (importlib.import_module(f"model_host.{name}") for name in ("inspection", "catalogue"))
    infills = {catalogue.Infilling.TRAINED: "yes", catalogue.Infilling.DOUBTFUL: "badly"}
    table = Table("model", "size", "memory", "context", "infills", "chats", "fits on", box=None, pad_edge=False)
    for entry, places in inspection.fitting():
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e9:.0f} B",
            f"{entry.weight_bytes(catalogue.Precision.BFLOAT16) / 1e9:.0f} GB",
            f"{entry.context_tokens // 1024} k",
            infills.get(entry.infilling, "no"),
            "yes" if entry.chat else "no",
            ", ".join(places) or "nothing",
        )
    console.width = max(console.width, 96)  # a narrow terminal may fold lines, but names stay whole
    console.print(table)
    console.print()
    for entry in catalogue.CATALOGUE:
        console.print(f"{entry.name.partition('/')[2]}: {entry.good_for}.")
    recommended = catalogue.RECOMMENDED
    console.print(
        f"\nTo fill in code choose {recommended.name}. Memory is that of the weights in bfloat16; 16 k tokens of context have to fit"
        f" beside them.\nWeights: {recommended.licence.name}; the starter needs none of this."
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing: install deepseek-lsp again"


def main() -> None:
    app(prog_name="deepseek-lsp")
