"""What can go wrong in the model host, as a tree. Every message is a sentence for the user that says what to do.

EngineError
├── CheckpointError      the checkpoint cannot be used: missing, not DeepSeek-V2, damaged, wrong tokenizer
├── RankLost             one of the processes that compute the model is gone or hangs; what was computed before is still there
├── RequestError         this one request cannot be served: too long, nothing to compute
└── EngineClosed         the engine was shut down, or died, while the request was waiting
"""


class EngineError(Exception):
    """Anything the model host reports to a user."""


class CheckpointError(EngineError):
    """The checkpoint cannot be used as it is."""


class RankLost(EngineError):
    """A process that computes a part of the model has ended, or was, since it hung: the step it was in has not happened, those before
    have."""


class RequestError(EngineError):
    """The request cannot be served; the engine goes on."""


class EngineClosed(EngineError):
    """No engine is there to answer."""
