"""`python -m lsp_server` is `deepseek-lsp`."""

from lsp_server.cli import main

main()
