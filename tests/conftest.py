"""One pool of four gloo workers a file: starting one costs seconds, a call milliseconds, and old trainings leave threads behind."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def pool():
    from minitron_mcore.testing import Pool

    workers = Pool(4)
    yield workers
    workers.close()
