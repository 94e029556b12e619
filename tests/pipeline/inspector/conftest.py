import shutil
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="package")
def browser() -> Iterator:
    """Chromium, started once for all of this folder."""
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("needs Debian's chromium at /usr/bin/chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    args = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=args)
        yield browser
        browser.close()
