"""Tests start processes of their own; OpenMP's threads would outnumber the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
