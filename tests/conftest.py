"""One pool of four gloo workers for the whole session: starting a worker costs seconds, a call on one costs milliseconds."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pool():
    from minitron_mcore.testing import Pool

    workers = Pool(4)
    yield workers
    workers.close()
