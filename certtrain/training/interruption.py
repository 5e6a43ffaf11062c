"""Stopping on request: training checks for SIGINT and SIGTERM between steps, so that the run can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ..errors import Interrupted


class StopRequest:
    """Record SIGINT and SIGTERM: ``with StopRequest() as stop: … if stop.signal: save and leave``.

    A second SIGINT raises ``KeyboardInterrupt``.

    Args:
        at_once: raise ``Interrupted`` immediately, for work that has nothing to save.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.at_once:
            raise Interrupted(number)

    def raise_if_requested(self) -> None:
        if self.signal is not None:
            raise Interrupted(self.signal)
