"""The four errors of the project, each of which says where, expected, got and what to do."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).resolve().parent
# Frames of these folders are never the user's line.  `models/` is left out on purpose: a model of ours is a
# program like a user's, and its own lines are the ones to show.
_OURS = tuple(
    str(folder) + os.sep
    for folder in (_PACKAGE, _PACKAGE.parent / "inference", Path(torch.__file__).resolve().parent)
)
_SHIPPED_MODELS = str(_PACKAGE / "models") + os.sep


class Where(NamedTuple):
    """A place in the user's program; prints as ``file.py:12``."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}" if self.line else "unknown line"


def user_frame(start: FrameType | None = None) -> FrameType | None:
    """The innermost frame outside this package, torch and NumPy, or None at top level."""
    frame: FrameType | None = start or sys._getframe(1)
    while frame is not None and (_is_internal(frame.f_code.co_filename) or _is_made(frame)):
        frame = frame.f_back
    return frame


def _is_made(frame: FrameType) -> bool:
    """Whether this is code that a dataclass of ours has made for itself, such as the ``__init__`` of options."""
    ours = str(frame.f_globals.get("__name__", "")).startswith("ppl.")
    return ours and frame.f_code.co_filename == "<string>"


def user_line() -> Where:
    """File and line of the user's statement that led here."""
    frame = user_frame(sys._getframe(1))
    return Where(frame.f_code.co_filename, frame.f_lineno) if frame else Where("", 0)


def _is_internal(file: str) -> bool:
    if file.startswith(_SHIPPED_MODELS):
        return False
    return (
        file.startswith(_OURS)
        or "/numpy/" in file
        or file.startswith("<frozen")
        or "/contextlib.py" in file
    )


class PPLError(Exception):
    """Base of the four errors; catch it to catch any of them."""


class ModelError(PPLError):
    """The program is wrong.  Raised while tracing; ``where`` is the user's line."""

    def __init__(self, message: str, where: Where | None = None) -> None:
        self.where = where or user_line()
        super().__init__(f"{self.where}: {message}")


class DataError(PPLError):
    """The data does not fit the model."""


class UnsupportedError(PPLError):
    """This backend cannot fit this model; the message lists every reason."""


class NumericalError(PPLError):
    """A step of a backend produced something impossible."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``' Did you mean 'x'?'`` for the closest known spelling, or an empty string.

    >>> nearest("particels", ["particles", "groups"])
    " Did you mean 'particles'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def trim_traceback(error: BaseException) -> BaseException:
    """Cut the traceback below the user's last line, so that it ends where the mistake is."""
    frames: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step)
        step = step.tb_next
    outside = [i for i, tb in enumerate(frames) if not _is_internal(tb.tb_frame.f_code.co_filename)]
    kept: TracebackType | None = None
    for tb in reversed(frames[: outside[-1] + 1] if outside else frames):
        kept = TracebackType(kept, tb.tb_frame, tb.tb_lasti, tb.tb_lineno)
    return error.with_traceback(kept)
