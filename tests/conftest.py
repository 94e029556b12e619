"""Fixtures of the whole session."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fixtures.object_store import object_store  # noqa: F401


def pytest_terminal_summary(terminalreporter) -> None:
    """What was done with every shrunken recipe (`tests/jobs/training/test_systems.py`), as a table."""
    passed = terminalreporter.stats.get("passed", ())
    cells = sorted(told for report in passed for name, told in report.user_properties if name == "system")
    if cells:
        terminalreporter.section("systems")
    for recipe, mode, done in cells:
        terminalreporter.write_line(f"{recipe:18}{mode:6}{', '.join(done)}")
