"""Stopping on request: SIGINT and SIGTERM are noticed between steps, so that the run can be saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; ``signal`` is the signal's number."""

    def __init__(self, number: int):
        self.signal = number
        super().__init__(signal.Signals(number).name)


class StopRequest:
    """``with StopRequest() as stop: … if stop.signal: save and leave``. A second SIGINT acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def raise_if_asked(self) -> None:
        if self.signal is not None:
            raise Interrupted(self.signal)
