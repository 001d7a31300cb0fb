"""Which documents are never read."""

from lsp_server.context import refusal
from tests.lsp_server.test_anchors import at


def test_files_of_secrets_are_not_completed():
    for name in (".env", ".env.local", "server.pem", "id_rsa", "id_ed25519"):
        assert "secrets" in (refusal(at("a", 0, 0, f"file:///p/{name}"), 1, 1000) or "")
    assert refusal(at("a", 0, 0), 1, 1000) is None
