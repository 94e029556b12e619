import pytest

from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.io.store import Store
from tests.fixtures import inspected


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Store:
    """A run that no test changes."""
    return inspected.make(tmp_path_factory.mktemp("inspected") / "run", sources=9, clips=4)


@pytest.fixture(scope="session")
def rows(run: Store) -> list[dict]:
    return inspected.rows(run)


@pytest.fixture(scope="session")
def inspector(run: Store):
    found = Inspector(Index(run))
    found.read()
    yield found
    found.close()
