"""Which language a file is in, by the ending of its name, in LSP's language ids. For files that no editor has opened."""

from pathlib import Path

LANGUAGES = {
    ".c": "c", ".cpp": "cpp", ".cs": "csharp", ".go": "go", ".java": "java", ".js": "javascript", ".jsx": "javascriptreact",
    ".kt": "kotlin", ".lua": "lua", ".md": "markdown", ".php": "php", ".py": "python", ".rb": "ruby", ".rs": "rust", ".sh": "shellscript",
    ".toml": "toml", ".ts": "typescript", ".tsx": "typescriptreact", ".yaml": "yaml", ".yml": "yaml",
}  # fmt: skip


def language_of(path: Path) -> str:
    return LANGUAGES.get(path.suffix, "plaintext")
