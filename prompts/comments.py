"""How a language writes a comment of one line: the model is told a file's path in the file's own words.

Owns: the words. Knows nothing of documents or models. Language ids are those of the LSP specification.
"""

LINE_COMMENT = {
    "#": "coffeescript dockerfile elixir julia makefile perl perl6 python r ruby shellscript toml yaml",
    "//": "c cpp csharp dart fsharp go groovy java javascript javascriptreact jsonc kotlin less objective-c objective-cpp php rust scala"
    " scss swift typescript typescriptreact zig",
    "--": "haskell lua sql",
    ";": "clojure ini lisp scheme",
    "%": "erlang latex tex",
}
MARKERS = {language: marker for marker, languages in LINE_COMMENT.items() for language in languages.split()}
WRAPPED = {"css": ("/* ", " */"), "html": ("<!-- ", " -->"), "xml": ("<!-- ", " -->"), "markdown": ("<!-- ", " -->")}


def path_comment(path: str, language: str) -> str:
    """A comment line naming `path`; empty for a language without comments, such as JSON."""
    if language in WRAPPED:
        opening, closing = WRAPPED[language]
        return f"{opening}{path}{closing}\n"
    marker = MARKERS.get(language)
    return f"{marker} {path}\n" if marker else ""
