"""Aggregations of values that lie in parts, compiled reductions, and what is refused. A failure means that scores depend on how the
work was shared out, or that wrong ones are used.

The statistics of whole models are held against the formulas in test_scores.
"""

import functools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.config.settings import Aggregation, FfnSite, ImportanceConfig
from minitron_mcore.errors import UserError
from minitron_mcore.importance import checks, metrics
from minitron_mcore.importance.collector import Collector
from minitron_mcore.importance.scores import FILE, Scores, check_finite, load_scores, save_scores
from minitron_mcore.models.architecture import Architecture
from tests.helpers.cutting import random_scores
from tests.helpers.launching import identity_of
from tests.helpers.models import ARCH
from tests.helpers.scoring import over

MOE = Architecture("mixtral", 3, 36, 14, 12, 6, 8, 101, 256, 1e-5, 1e4, None, True, experts=6, experts_per_token=3)


def sums(how, x, real):
    return metrics.sums(x, real[:, None], how)


@settings(max_examples=150, deadline=None)
@given(
    how=st.sampled_from(list(Aggregation)),
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=6),
    mean=st.sampled_from([0.0, -3.0, 50.0]),
    padding=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_parts_give_what_the_whole_gives(how, sizes, mean, padding, seed):
    """Values with a mean of up to 50 standard deviations, in parts of which some are padding altogether, in two ways of pooling."""
    rng = np.random.default_rng(seed)
    parts = [torch.from_numpy(rng.normal(mean, 1, (n, 5))).float() for n in sizes]
    reals = [torch.from_numpy(rng.random(n) >= padding) for n in sizes]
    values = torch.cat([x[real] for x, real in zip(parts, reals, strict=True)]).double()
    expected = over(how, values) if len(values) else torch.zeros(5, dtype=torch.float64)
    found = [sums(how, x, real) for x, real in zip(parts, reals, strict=True)]
    stacked = metrics.Sums(*(None if fields[0] is None else torch.stack(fields) for fields in zip(*found, strict=True)))
    by_one = functools.reduce(lambda a, b: metrics.merge([a, b]), found)
    at_once = metrics.pool(stacked, lambda t: [x.sum(0) for x in t])
    for whole in (by_one, at_once):
        torch.testing.assert_close(metrics.aggregate(how, whole).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", [1.0, 0.1, 1e-3, 0.0])
def test_distances_are_those_of_cosines(change):
    """Down to changes of a thousandth, whose 1 - cosine fp32 cannot tell from 0 when it is worked out directly."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(11, 3, 37, generator=g)
    streams = [x, x + change * torch.randn(x.shape, generator=g), x + 2 * change * torch.randn(x.shape, generator=g)]
    real = torch.rand(11, 3, 1, generator=g) > 0.3

    def distance(a, b):
        return (1 - torch.cosine_similarity(a.double(), b.double(), dim=-1))[real[..., 0]].sum()

    expected = torch.stack([distance(*streams[:2]), distance(*streams[1:]), distance(streams[0], streams[2])])
    torch.testing.assert_close(metrics.cosine_distances(streams, real).double(), expected, rtol=1e-5, atol=1e-12)


def test_a_vector_of_length_0_has_no_direction():
    x = torch.ones(2, 1, 4)
    assert metrics.cosine_distances([x * 0, x], None).tolist() == [2, 2]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_reductions_are_the_same():
    g = torch.Generator().manual_seed(0)
    x, real = torch.randn(37, 3, 40, generator=g).bfloat16(), torch.rand(37, 3, 1, generator=g) > 0.3
    calls = [
        (metrics.sums, x[..., :20], real, Aggregation.mean),
        (metrics.head_norm_sums, x, None, Aggregation.variance, 8),
        (metrics.cosine_distances, [x, x * 1.1, x + 1], real),
    ]
    assert metrics.can_compile()
    for function, *args in calls:
        torch.testing.assert_close(metrics.compiled(function)(*args), function(*args), rtol=1e-5, atol=1e-6)


def spoil(path, kind):
    vectors = random_scores(ARCH).vectors
    metadata = {"fingerprint": "another" if kind == "foreign" else "ours"}
    if kind == "nan":
        vectors["blocks.1.ffn"][7] = float("nan")
    elif kind == "infinite":
        vectors["hidden"][0] = float("inf")
    elif kind == "long":
        vectors["blocks.2.heads"] = torch.ones(13)
    elif kind == "missing":
        del vectors["blocks.2.mlp"]
    save_scores(path, Scores(vectors, metadata))
    if kind == "truncated":
        (path / FILE).write_bytes((path / FILE).read_bytes()[:-20])
    elif kind == "text":
        (path / FILE).write_text("scores")
    elif kind == "gone":
        (path / FILE).unlink()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("nan", "gives a value that is not finite in blocks.1.ffn: check the model and its data, then score again"),
        ("infinite", "not finite in hidden"),
        ("truncated", "is damaged or incomplete, or has another format .*: run launch/importance.py again"),
        ("text", "is damaged or incomplete"),
        ("foreign", "belong to model another, but the source is ours: run launch/importance.py on this source"),
        ("long", r"has \(13,\) for blocks.2.heads, expected shape \(12,\): run launch/importance.py again"),
        ("missing", "has nothing for blocks.2.mlp"),
        ("gone", "no scores at .*: run launch/importance.py first"),
    ],
)
def test_wrong_scores_are_refused(tmp_path, kind, sentence):
    spoil(tmp_path, kind)
    with pytest.raises(UserError, match=sentence):
        load_scores(tmp_path, ARCH, "ours")


def test_right_scores_are_read(tmp_path):
    spoil(tmp_path, "nothing")
    read = load_scores(tmp_path, ARCH, "ours")
    assert all(torch.equal(vector, random_scores(ARCH).vectors[name]) for name, vector in read.vectors.items())


def test_a_model_that_gives_nan_is_not_scored():
    with pytest.raises(UserError, match="the model gives a value that is not finite in blocks.0.heads"):
        check_finite({"hidden": torch.ones(3), "blocks.0.heads": torch.tensor([1.0, float("nan")])}, "the model")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("importance.sequence=median", "Invalid value 'median', expected one of [mean, l2, variance]"),
        ("importance.ffn_site=gate", "Invalid value 'gate', expected one of [after_gate, before_gate]"),
        ("importance.weighted=often", "'often' is not a valid bool"),
    ],
)
def test_unknown_statistics_are_caught_at_compose_time(override, sentence):
    with pytest.raises(UserError) as caught:
        identity_of("importance", "+model=smollm2_135m", override)
    assert sentence in str(caught.value)


def test_a_run_records_its_statistic():
    chosen = [
        "importance.sequence=l2",
        "importance.batch=variance",
        "importance.ffn_site=before_gate",
        "importance.weighted=true",
    ]
    recorded = identity_of("importance", "+model=smollm2_135m", *chosen)["importance"]
    assert [recorded[key.split(".")[1].split("=")[0]] for key in chosen] == ["l2", "variance", "before_gate", True]
    default = identity_of("importance", "+model=llama31_8b")["importance"]
    assert default == ImportanceConfig().__dict__


@pytest.mark.parametrize(
    ("arch", "config", "sentence"),
    [
        (
            ARCH,
            ImportanceConfig(samples=3, sequence_length=64),
            "importance.samples is 3, fewer than the 4 data-parallel ranks: give at least",
        ),
        (
            ARCH,
            ImportanceConfig(micro_batch=0, sequence_length=64),
            "importance.micro_batch is 0; it must be at least 1",
        ),
        (
            MOE,
            ImportanceConfig(batch=Aggregation.variance, ffn_site=FfnSite.before_gate, sequence_length=64),
            "importance.batch=variance, importance.ffn_site=before_gate is not supported for experts",
        ),
    ],
)
def test_impossible_runs_are_refused(arch, config, sentence):
    found = list(checks.problems(arch, config, 4))
    assert len(found) == 1 and found[0].startswith(sentence)
    assert not list(checks.problems(arch, ImportanceConfig(samples=4, sequence_length=64), 4))


def test_experts_have_one_statistic():
    with pytest.raises(UserError, match="importance.weighted=True is not supported for experts"):
        Collector(None, MOE, ImportanceConfig(weighted=True))
