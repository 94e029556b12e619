"""Fixtures of the whole session."""

from tests.fixtures.object_store import object_store  # noqa: F401
