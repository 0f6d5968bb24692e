"""The engine's fixtures, for the tests of the models that it draws with."""

from tests.engine.conftest import (  # noqa: F401  fixtures
    engine,
    held,
    model,
    new_engine,
    other_model,
    request_for,
)
