"""How a training is asked to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


class Signals:
    """SIGTERM and SIGINT as a wish that the loop reads; a second one ends the process at once.

    Only in the main thread, where Python lets handlers be set; a launcher that runs training in another
    thread has its own way to stop it.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a worker that decodes; it ends when the loop does
            return
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = number
        said = "clipmill train: ending this step, then saving; once more to stop at once\n"
        os.write(sys.stderr.fileno(), said.encode())  # print is not safe inside a handler
