"""KeyboardInterrupt in a thread at any point where Python looks for signals."""

import dis
import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Final

__all__ = ["Interrupt"]

_UNSAFE: Final = ("/threading.py", "/httpcore/_synchronization.py", "/weakref.py", "/_weakrefset.py")
"""Files in which no interrupt is without harm, whoever calls them: the first two take a lock in a method, whose end is
a point where the lock is held and nobody knows yet; those in the callbacks of the others come to nothing."""


class Interrupt:
    """Makes a call, counts the points that it passes, and raises KeyboardInterrupt at one of them.

    Args:
        at: Which one, from 1; None is none.

    Attributes:
        passed: How many points were passed.
        where: File, line and function of the one that was reached, else "".
    """

    def __init__(self, at: int | None = None) -> None:
        self.passed = 0
        self.where = ""
        self._at = at

    def __call__(self, call: Callable[[], Any]) -> None:
        """Make a call."""
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if self.where or frame.f_code.co_filename.endswith(_UNSAFE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in _points(frame.f_code):
            self.passed += 1
            if self.passed == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
                raise KeyboardInterrupt
        return self._trace


@functools.cache
def _points(code: CodeType) -> frozenset[int]:
    """Return the offsets in some bytecode before which Python runs the handlers of signals that have come.

    It does so when a function begins, when a call has returned and when a loop goes back; so nothing comes between
    taking a lock and the `with` that gives it back.
    """
    points, looks = set(), False
    for instruction in dis.get_instructions(code):
        if looks or instruction.opname == "JUMP_BACKWARD":
            points.add(instruction.offset)
        looks = instruction.opname in {"RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX"}
    return frozenset(points)
