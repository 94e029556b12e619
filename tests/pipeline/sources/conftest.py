from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import pytest

from tests.fixtures.web import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
