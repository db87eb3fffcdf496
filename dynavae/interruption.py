"""Ctrl-C and SIGTERM: finish the update, save, then stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has.

    Attributes:
        signal: which signal asked.
    """

    def __init__(self, message: str = "", signal: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = signal


class Signals:
    """While installed, the first SIGINT or SIGTERM is only remembered; the second interrupts at once.

    Attributes:
        asked: the signal that came, or 0.
    """

    def __init__(self, speak: bool = True) -> None:
        self.asked, self.speak = 0, speak
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Only the main thread may; elsewhere signals do what they did."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self._handle)
                self._before.setdefault(number, previous)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Interrupted("stopped without saving", number)
        self.asked = number
        if self.speak:
            name = signal.Signals(number).name
            os.write(
                2, f"\n{name}: saving after this update (again: stop at once)\n".encode()
            )  # print may be busy
