"""The run as it was read, and what has changed of it since: layers, decisions, clips of a run that is still going.

Whether something changed is seen from names, sizes and times of files, looked at now and then. To show it, all is read
anew beside what is being asked, and takes its place once it is complete: no question waits for it or fails.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from pipeline.faults import StoreError
from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import stamp

LOOK_S, LOOK_FAR_S = 3.0, 60.0  # how often, on a disk and on an object store
log = logging.getLogger("clipmill")


class Session:
    """What a server shows: `inspector`, another one after every `renew`.

    opened: how often the run was read.
    """

    def __init__(self, inspector: Inspector):
        self.inspector, self.opened = inspector, 1
        self._lock = threading.Lock()
        self._changed: list[str] = []
        self._looked = time.monotonic()
        self._reading: threading.Thread | None = None
        self._again = False
        self._failed = ""

    def state(self) -> dict[str, Any]:
        """Which kinds of things are other than they were read. Raises StoreError."""
        with self._lock:
            reading = self._reading is not None
            far = not self.inspector.index.store.local
            if not reading and time.monotonic() - self._looked > (LOOK_FAR_S if far else LOOK_S):
                self._looked = time.monotonic()
                self._changed = _changed(self.inspector)
            return {
                "opened": self.opened,
                "changed": self._changed,
                "reading": reading,
                "failed": self._failed,
            }

    def renew(self) -> None:
        """Read all anew in the background; once more where that is being done already."""
        with self._lock:
            self._again = self._reading is not None
            if self._reading is None:
                self._failed = ""
                self._reading = threading.Thread(target=self._read, daemon=True)
                self._reading.start()

    def _read(self) -> None:
        while True:
            try:
                new = self.inspector.renewed()
            except StoreError as e:
                log.error("%s", e)
                new, failed = None, str(e)
            with self._lock:
                if new is None:
                    self._failed = failed
                else:
                    self.inspector, self._changed = new, []
                    self.opened += 1
                    self._looked = time.monotonic()
                if not self._again:
                    self._reading = None
                    return
                self._again = False


def _changed(inspector: Inspector) -> list[str]:
    indices = [inspector.index, *([inspector.other.index] if inspector.other else [])]
    found: dict[str, None] = {}
    for index in indices:
        now = stamp(index.store, index.media)
        found |= dict.fromkeys(what for what in now if now[what] != index.stamp[what])
    return list(found)
