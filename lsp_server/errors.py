"""Why something that was asked for is not done, as a tree. Every message is a sentence for the user that says what to do.

Refusal
├── Stale      the document is no longer the one that was asked about
└── Unusable   the model's answer cannot become what was asked for
"""


class Refusal(Exception):
    """What was asked for is not done, and nothing was changed."""


class Stale(Refusal):
    """The document changed since."""


class Unusable(Refusal):
    """The model's answer is not used."""
