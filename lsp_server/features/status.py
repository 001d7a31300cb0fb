"""deepseek/status: what the server runs, and why the last request showed nothing."""

from dataclasses import asdict
from typing import Any

from lsp_server import answering, ask
from lsp_server.anchors import CHARS_PER_TOKEN
from lsp_server.connection import Connection


def register(server: Connection) -> None:
    @server.feature("deepseek/status")
    async def status(params: None) -> dict[str, Any]:
        engine, last = server.host.engine, server.last
        second = server.second.host
        repository = server.memory.repository
        block = repository.block(ask.repository_tokens(engine, server.settings.inline)) if engine else ""
        names = list(dict.fromkeys(piece.name for piece in repository.pieces)) if block else []
        cost = asdict(last.cost) | {"reuse": last.cost.reuse} if last.cost else None
        return {
            "state": server.host.state if server.settings.inline.enabled else "disabled",
            "message": server.host.message,
            "model": asdict(engine.facts) if engine else None,
            "chat": {
                "state": second.state,
                "message": second.message,
                "model": asdict(second.engine.facts) if second.engine else None,
            }
            if answering.has_second(server)
            else None,
            "settings": server.settings.model_dump(),
            "problems": server.problems,
            "repository": {"files": names, "tokens": len(block) // CHARS_PER_TOKEN},
            "requests": {"asked": server.asked, "shown": server.shown, "accepted": max(server.accepted, server.written)},
            "action": asdict(server.last_action) if server.last_action else None,
            "last": {"shown": bool(last.text), "reason": last.reason, "cost": cost},
        }
