"""benchmarks/findings: verdicts against scipy, the page against the results, and the settings of every arm."""

import functools
import importlib
import math
import sys
from pathlib import Path

import pytest
from scipy import stats

from minitron_mcore.config.settings import Divergence
from minitron_mcore.reporting import measurements
from tests.helpers.launching import config_of

FOLDER = Path(__file__).parents[2] / "benchmarks/findings"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
arms, common, page, verdicts = (importlib.import_module(name) for name in ("arms", "common", "page", "verdicts"))
FINDINGS = sorted({path.stem for path in FOLDER.glob("*.py")} - {"arms", "page", "verdicts"})


@pytest.mark.parametrize("shift", [-0.1, -0.02, 0.0, 0.02, 0.1])
@pytest.mark.parametrize("expected", [True, False])
def test_a_claim_is_decided_by_students_paired_test(shift, expected):
    upper = [3.9, 4.1, 4.0]
    lower = [loss + shift + noise for loss, noise in zip(upper, (0.012, -0.01, 0.001), strict=True)]
    rows = [{"arm": name, "after": losses} for name, losses in (("a", lower), ("b", upper))]
    found = verdicts.judged(verdicts.Claim("a", "b", expected=expected), rows)
    test = stats.ttest_rel(lower, upper)
    assert math.isclose(found["difference"] / found["error"], test.statistic)
    if test.pvalue < 0.05:
        assert found["holds"] == (shift < 0) if expected else found["holds"] == (shift > 0)
    else:
        assert found["holds"] is None


def test_the_page_is_of_the_results():
    assert page.PAGE.read_text() == page.page()
    assert set(page.ORDER) == set(FINDINGS)


def test_figures_are_those_that_the_report_reads(tmp_path):
    rows = [{"arm": name, "before": [2.0, 4.0], "after": [1.0, 2.0]} for name in ("a", "b")]
    common.write(verdicts.figures("divergence", rows), tmp_path / "figures.jsonl")
    shown = measurements.figure_rows(measurements.read_figures(tmp_path / "figures.jsonl"))
    assert [(row["case"], row["implementation"], row["loss (nats/token)"]) for row in shown][:2] == [
        ("before training", "a", 3.0),
        ("after training", "a", 1.5),
    ]


composed = functools.cache(config_of)


class Settings(arms.Bench):
    """Composes stages instead of running them."""

    def __init__(self):
        super().__init__(1, quick=False)
        self.stages = []

    def once(self, stage, out_dir, *overrides):
        self.stages.append(composed(stage, *self.model, *overrides, f"out_dir={out_dir}"))
        return out_dir

    def dropped(self, rule, count):
        return list(range(count))

    def _initialised(self, folder, like):
        return folder / "prune"

    def _random_scores(self, folder, scores):
        return folder / "scores.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("name", FINDINGS)
def test_arms_differ_and_their_settings_exist(name):
    finding, trained = importlib.import_module(name), []
    for arm in finding.ARMS.values():
        bench = Settings()
        bench.train(arm)
        trained.append(bench.stages[-1])
    assert len({(str(run.distill), run.student, run.teacher) for run in trained}) == len(finding.ARMS)
    assert {run.distill.divergence for run in trained} <= set(Divergence)
    assert {name for claim in finding.CLAIMS for name in (claim.lower, claim.upper)} <= set(finding.ARMS)
