"""Fixtures of the whole session."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fixtures.object_store import object_store  # noqa: F401
