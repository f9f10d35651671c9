"""Every error that a user can cause, and nothing else; the command line prints these without a traceback.

    UndertowError
    ├── PathMissingError          path-missing     nothing lies at the path
    ├── CheckpointError           checkpoint       a checkpoint cannot be read as one
    │   ├── NoWeightsError        no-weights       a folder without weights
    │   ├── PickleRefusedError    pickle-refused   weights in a format that can run code
    │   ├── LfsPointerError       lfs-pointer      a Git-LFS pointer where weights should be
    │   ├── CorruptFileError      corrupt-file     a file that breaks its own format
    │   ├── MissingShardError     shard-missing    an index names a shard or a tensor that is not there
    │   ├── UnsafePathError       unsafe-path      a name or a link that leaves the folder, or no regular file
    │   ├── MismatchError         mismatch         the checkpoint was made for another base
    │   ├── NonFiniteError        non-finite       NaN or infinity among the weights
    │   └── AdapterError          adapter          settings of an adapter that are unsupported or contradict its tensors
    ├── ModelError                model            a base that cannot be loaded or run
    │   ├── NotCausalError        not-causal-lm    a base that is no causal language model
    │   ├── HookPointError        hook-point       a place in the model that does not exist
    │   ├── MemoryLimitError      memory           not even one prompt fits into the device's memory
    │   └── SelfTestError         self-test        our hooks and the model's hidden states disagree
    ├── PromptError               prompts          a prompt set that cannot be read
    │   └── LabelError            one-class        labels of one class, or not one for each prompt
    ├── StoreError                store            stored activations that cannot be read or extended
    ├── ProbeError                probe            a probe file that is broken or was made for another model
    ├── BankError                 bank             a bank file that is broken or was made for another model
    ├── WorkerLostError           worker-lost      a worker process was killed
    └── OptionError               option           an argument or option that makes no sense

A message is one line and says what is wrong and where, expected and got; the hint says what to do. Names inside a
message may come from an attacker's file, so whatever a terminal would obey is escaped here, once for all of them.
"""

from __future__ import annotations

import os
from typing import ClassVar

__all__ = [
    "AdapterError",
    "BankError",
    "CheckpointError",
    "CorruptFileError",
    "HookPointError",
    "LabelError",
    "LfsPointerError",
    "MemoryLimitError",
    "MismatchError",
    "MissingShardError",
    "ModelError",
    "NoWeightsError",
    "NonFiniteError",
    "NotCausalError",
    "OptionError",
    "PathMissingError",
    "PickleRefusedError",
    "ProbeError",
    "PromptError",
    "SelfTestError",
    "StoreError",
    "UndertowError",
    "UnsafePathError",
    "WorkerLostError",
    "printable",
]

# Long enough for a list of differences, short enough that a hostile name cannot flood a log.
_LONGEST_MESSAGE = 2000


def printable(text: str, *, limit: int = 200) -> str:
    """Make text from an untrusted file safe to print: one line, escapes spelled out, cut to a length.

    Control characters, line breaks, lone surrogates and the marks that reverse the direction of text become their
    backslash escapes. Markup is left alone: what writes HTML escapes it.

    Args:
        text: Any string, for instance the name of a tensor.
        limit: Characters kept from a longer text; the cut is marked by an ellipsis.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(char if char.isprintable() else _escape(char) for char in cut)


class UndertowError(Exception):
    """A fault that the user can mend, with a stable code for programs and a hint for people.

    `str()` gives path, message and hint as one line, the path only where the message does not name it already.

    Args:
        message: What is wrong and where; expected and got.
        path: The file or folder at fault.
        hint: What to do, as a sentence.
    """

    code: ClassVar[str] = "undertow"

    message: str
    path: str | None
    hint: str

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = printable(message, limit=_LONGEST_MESSAGE)
        self.path = None if path is None else printable(os.fspath(path), limit=_LONGEST_MESSAGE)
        self.hint = printable(hint, limit=_LONGEST_MESSAGE)

    def __str__(self) -> str:
        named = self.path is None or self.path in self.message
        text = self.message if named else f"{self.path}: {self.message}"
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith((".", "!", "?")) else f"{text}. {self.hint}"

    def to_dict(self) -> dict[str, str | None]:
        """The error as it stands in a scan's JSON record."""
        return {"code": self.code, "path": self.path, "message": self.message, "hint": self.hint}


class PathMissingError(UndertowError):
    """Nothing lies at the path."""

    code = "path-missing"


class CheckpointError(UndertowError):
    """A checkpoint cannot be read as one."""

    code = "checkpoint"


class NoWeightsError(CheckpointError):
    """The folder holds no weights."""

    code = "no-weights"


class PickleRefusedError(CheckpointError):
    """The weights are in a format that can run code when it is loaded."""

    code = "pickle-refused"


class LfsPointerError(CheckpointError):
    """A Git-LFS pointer lies where the weights should be."""

    code = "lfs-pointer"


class CorruptFileError(CheckpointError):
    """A file breaks its own format, or exceeds a limit that honest files keep."""

    code = "corrupt-file"


class MissingShardError(CheckpointError):
    """The index names a shard, or a tensor in a shard, that is not there."""

    code = "shard-missing"


class UnsafePathError(CheckpointError):
    """A name or a link leaves the checkpoint's folder, or a name belongs to something that is no regular file."""

    code = "unsafe-path"


class MismatchError(CheckpointError):
    """The checkpoint's names or shapes are not the base's, so it was made for another model."""

    code = "mismatch"


class NonFiniteError(CheckpointError):
    """The weights hold NaN or infinity."""

    code = "non-finite"


class AdapterError(CheckpointError):
    """An adapter's settings are unsupported, out of bounds, or contradict its tensors."""

    code = "adapter"


class ModelError(UndertowError):
    """The base cannot be loaded or run."""

    code = "model"


class NotCausalError(ModelError):
    """The base is no causal language model."""

    code = "not-causal-lm"


class HookPointError(ModelError):
    """The model has no such hook point."""

    code = "hook-point"


class MemoryLimitError(ModelError):
    """Not even one prompt fits into the device's memory."""

    code = "memory"


class SelfTestError(ModelError):
    """What our hooks capture is not what the model reports as its hidden states."""

    code = "self-test"


class PromptError(UndertowError):
    """A prompt set cannot be read."""

    code = "prompts"


class LabelError(PromptError):
    """Labels are of one class only, or there is not exactly one for each prompt."""

    code = "one-class"


class StoreError(UndertowError):
    """Stored activations cannot be read, or cannot be extended by this run."""

    code = "store"


class ProbeError(UndertowError):
    """A probe file is broken, or was made for another model, template or layer convention."""

    code = "probe"


class BankError(UndertowError):
    """A bank file is broken, or was made for another base or other settings."""

    code = "bank"


class WorkerLostError(UndertowError):
    """The worker process that did something was killed before it was done."""

    code = "worker-lost"


class OptionError(UndertowError):
    """An argument or a command-line option makes no sense."""

    code = "option"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
