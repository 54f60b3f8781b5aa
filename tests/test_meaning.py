"""A folder means what transformers says it means: a failure means that a config gives another model here than there, in silence."""

import pytest

from minitron_mcore.config import ParallelConfig
from minitron_mcore.testing import on_ranks
from tests import families, meaning

ONE = ParallelConfig()
FAST = ["llama31", "mistral", "nemotron", "qwen3_moe_raw"]
GENERATED = 200  # cases a family


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([x for x in families.OF if x not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "rest"],
)
def test_every_key_of_every_family(tmp_path, names):
    [(counts, faults)] = on_ranks(meaning.count, 1, ONE, names, tmp_path, timeout=1200)
    print(counts)
    assert not faults, faults
    assert all(found["equal"] > 50 and found["refused"] > 200 for found in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("which", families.OF)
def test_generated_configs(tmp_path, which):
    """Several edits at once: 2,400 cases over all families."""
    [(counts, faults)] = on_ranks(meaning.generate, 1, ONE, which, tmp_path, GENERATED, timeout=1200)
    print(which, counts)
    assert not faults, faults
    assert sum(counts.values()) >= GENERATED * 0.9
