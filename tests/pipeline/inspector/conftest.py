import shutil

import pytest

from pipeline.inspector.answers import Inspector
from pipeline.inspector.index import Index
from pipeline.io.store import Store
from tests.fixtures import inspected


@pytest.fixture(scope="session")
def made_run(tmp_path_factory) -> Store:
    """A run that no test changes."""
    return inspected.make(tmp_path_factory.mktemp("inspected") / "run", sources=8, clips=3)


@pytest.fixture(scope="session")
def run(made_run: Store) -> Store:
    return made_run


@pytest.fixture
def own_run(made_run: Store, tmp_path) -> Store:
    """A copy of it, to do anything with."""
    shutil.copytree(made_run.root, tmp_path / "run")
    return Store(str(tmp_path / "run"))


@pytest.fixture(scope="session")
def rows(made_run: Store) -> list[dict]:
    return inspected.rows(made_run)


@pytest.fixture(scope="session")
def inspector(made_run: Store):
    found = Inspector(Index(made_run))
    found.read()
    yield found
    found.close()
