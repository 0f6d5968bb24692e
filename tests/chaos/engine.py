"""The fake engine of the chaos suite; here, so that processes that draw import no more."""

import os

from tests.fakes import FakeEngine

COUNT = "CHAOS_COUNT"  # the environment variable
IMAGE_SECONDS = 0.05


class CountingEngine(FakeEngine):
    """Takes IMAGE_SECONDS for an image, and adds a byte for it to the file that COUNT names."""

    def __init__(self) -> None:
        super().__init__(IMAGE_SECONDS)
        self._count = os.open(os.environ[COUNT], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _draw(self, request):
        drawn = super()._draw(request)
        os.write(self._count, b".")
        return drawn
