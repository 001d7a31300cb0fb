"""Builds the language server: `create_server` wires one connection and its features. No global state."""

from lsp_server.connection import Connection
from lsp_server.features import (
    acceptance,
    chat,
    code_action,
    completion,
    configuration,
    documents,
    fill,
    hover,
    inline_completion,
    lifecycle,
    run_action,
    status,
)
from lsp_server.host import Host
from lsp_server.settings import Layer

FEATURES = (
    lifecycle,
    documents,
    configuration,
    inline_completion,
    completion,
    acceptance,
    code_action,
    run_action,
    hover,
    fill,
    chat,
    status,
)


def create_server(layers: list[Layer], problems: list[str], host: Host) -> Connection:
    """A server for one connection. `layers` are the user's settings, `problems` what was wrong in them already."""
    server = Connection(layers, problems, host)
    for feature in FEATURES:
        feature.register(server)
    return server
