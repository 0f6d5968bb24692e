"""`sdbatch` with the fake engine: `python -m tests.chaos.command run JOB ...`.

Everything else is the real command: its parent process, Ray, the stages, the store.
"""

from functools import partial

from sdbatch import cli
from sdbatch.batch import pipeline
from tests.chaos.engine import CountingEngine

if __name__ == "__main__":
    pipeline.draw = partial(pipeline.draw, make_engine=CountingEngine)
    cli.main()
