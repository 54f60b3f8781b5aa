"""Reports: tables that can be read where they are piped, pictures that hold what the files hold."""

import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import save_file

from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.reporting import plots, tables
from minitron_mcore.testing import on_ranks
from tests.helpers.cutting import random_scores

ROWS = [
    {
        "model": "teacher [a]",
        "parameters": 134515008,
        "perplexity": 23.3123,
        "tokens_per_second": 1234.56,
        "where": "runs/" + 70 * "x",
    },
    {"model": "student", "parameters": None, "perplexity": float("inf"), "note": True},
]


def test_table_is_plain_when_piped(capfd):
    tables.table("Held-out [text]", ROWS, ["a note that is [not] markup " + "x" * 300])
    out = capfd.readouterr().out
    assert "\x1b" not in out
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "Held-out [text]"
    assert lines[1].split("  ")[1:] and "tokens per second" in lines[1] and "note" in lines[1]
    assert lines[3].split() == ["teacher", "[a]", "134,515,008", "23.31", "1,235", ROWS[0]["where"]]
    assert lines[4].split() == ["student", "inf", "True"]
    assert lines[5] == "a note that is [not] markup " + "x" * 300  # not broken
    ends = [line.index(value) + len(value) for line, value in ((lines[3], "23.31"), (lines[4], "inf"))]
    assert ends[0] == ends[1]  # numbers to the right


def _print() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tables.table(f"from rank {process_groups.rank()}", [{"a": 1}])
    return out.getvalue()


def test_only_rank_0_prints():
    first, second = on_ranks(_print, 2, ParallelConfig())
    assert first.startswith("from rank 0\n") and not second


def scores(blocks: int = 5, hidden: int = 33, ffn: int = 21, heads: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {"hidden": rng.lognormal(size=hidden)}
    for i in range(blocks):
        found |= {f"blocks.{i}.ffn": rng.lognormal(size=ffn), f"blocks.{i}.heads": rng.lognormal(size=heads)}
        found |= {f"blocks.{i}.{part}": np.array(rng.uniform()) for part in ("attention", "mlp", "block")}
    return {name: value.astype(np.float32) for name, value in found.items()}


def shown(panel, image) -> float:
    """Share of pixels of one quarter of a picture that are not white."""
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    part = image[panel[0] * rows : (panel[0] + 1) * rows, panel[1] * columns : (panel[1] + 1) * columns, :3]
    return float((part < 0.99).any(axis=2).mean())


@pytest.mark.parametrize("missing", [None, "hidden", "ffn", "heads", "block"])
def test_importance_shows_what_is_scored(tmp_path, missing):
    found = {name: value for name, value in scores(blocks=12).items() if not missing or not name.endswith(missing)}
    save_file(found, tmp_path / "scores.safetensors")
    plots.plot_importance(tmp_path / "scores.safetensors", tmp_path / "scores.png")
    image = imread(tmp_path / "scores.png")
    panels = {"hidden": (0, 0), "ffn": (0, 1), "heads": (1, 0), "block": (1, 1)}
    for name, panel in panels.items():
        assert (shown(panel, image) > 0.01) == (name != missing)


def test_importance_draws_the_values(tmp_path):
    from matplotlib.figure import Figure

    found = scores()
    found["blocks.2.ffn"][:] = 0  # a dead block must not break the log scale
    figure = Figure()
    hidden, ffn, heads, depth = figure.subplots(2, 2).flat
    assert plots._hidden(hidden, found) and plots._ffn(ffn, found)
    assert plots._heads(heads, found) and plots._depth(depth, found)
    assert np.array_equal(hidden.lines[0].get_ydata(), np.sort(found["hidden"])[::-1])
    assert np.allclose(ffn.images[0].get_array()[3], np.quantile(found["blocks.3.ffn"], np.linspace(0, 1, 101)))
    assert np.array_equal(heads.images[0].get_array(), np.stack([found[f"blocks.{i}.heads"] for i in range(5)]))
    bars = [bar.get_height() for bar in depth.patches]
    assert np.array_equal(bars, np.array([found[f"blocks.{i}.block"] for i in range(5)]))
    figure.savefig(tmp_path / "all.png")


def test_importance_says_its_statistic(tmp_path):
    save_file(scores(), tmp_path / "silent.safetensors")
    said = {"aggregation": "batch mean, sequence variance", "ffn_site": "before_gate", "fingerprint": "0123"}
    save_file(scores(), tmp_path / "scores.safetensors", metadata=said)
    assert plots.statistic(tmp_path / "silent.safetensors") == ""
    title = "aggregation: batch mean, sequence variance; ffn site: before_gate"
    assert plots.statistic(tmp_path / "scores.safetensors") == title
    for name in ("silent", "scores"):
        plots.plot_importance(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.png")
    silent, spoken = (imread(tmp_path / f"{name}.png") for name in ("silent", "scores"))
    assert not np.array_equal(silent, spoken)  # the same scores


@pytest.mark.parametrize("experts", [0, 6])
def test_what_a_plan_keeps_of_each_block(tmp_path, experts):
    """Shares of units and of summed score, by comprehension; dropped blocks have none."""
    mixture = {"experts": experts, "experts_per_token": 2} if experts else {}
    arch = Architecture(
        "mixtral" if experts else "llama", 4, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, False, **mixture
    )
    cut = PruneConfig(hidden=20, ffn=11, heads=6, drop_blocks=[1], experts=4 if experts else None)
    found = random_scores(arch)
    plan = make_plan(arch, "x", found, cut)
    plots.plot_plan(plan, found.vectors, tmp_path / "plan.png")
    assert (imread(tmp_path / "plan.png")[..., :3] < 0.99).any(axis=2).mean() > 0.3
    v = {name: vector.tolist() for name, vector in found.vectors.items()}
    rows = plots._kept_shares(plan, {name: vector.numpy() for name, vector in found.vectors.items()})
    assert rows.keys() >= {"hidden", "ffn, by score", "heads"} and ("experts" in rows) == bool(experts)
    assert all(np.isnan(row[1]) and not np.isnan(np.delete(row, 1)).any() for row in rows.values())
    for b in plan.blocks:
        expected = {"hidden": 20 / 36, "hidden, by score": sum(v["hidden"][i] for i in plan.hidden) / sum(v["hidden"])}
        heads = v[f"blocks.{b}.heads"]
        expected |= {"heads": 0.5, "heads, by score": sum(heads[i] for i in plan.heads[b]) / sum(heads)}
        ffn = v[f"blocks.{b}.ffn"]
        if experts:
            kept = sum(ffn[e][i] for e, channels in plan.experts[b].items() for i in channels)
            expected |= {"ffn": 4 * 11 / (6 * 30), "ffn, by score": kept / sum(map(sum, ffn)), "experts": 4 / 6}
        else:
            expected |= {"ffn": 11 / 30, "ffn, by score": sum(ffn[i] for i in plan.ffn[b]) / sum(ffn)}
        assert all(rows[name][b] == pytest.approx(share, rel=1e-5) for name, share in expected.items())


def test_kept_groups_have_a_row_where_some_go():
    arch = Architecture("llama", 4, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, False)
    found = random_scores(arch)
    vectors = {name: vector.numpy() for name, vector in found.vectors.items()}
    for groups, row in ((6, None), (4, [2 / 3, np.nan, 2 / 3, np.nan])):
        cut = PruneConfig(groups=groups, drop_blocks=[1], drop_attention=[3], exportable=False)
        rows = plots._kept_shares(make_plan(arch, "x", found, cut), vectors)
        assert (row is None) == ("key/value groups" not in rows)
        assert row is None or rows["key/value groups"] == pytest.approx(row, nan_ok=True)


@pytest.mark.parametrize("steps", [1, 7, 90])
def test_losses_of_several_runs(tmp_path, steps):
    for name, scale in (("kl", 1.0), ("ce", 0.0)):
        rows = [
            {"step": s, "tokens": 64 * s, "kd_loss": scale * 5 / s, "lm_loss": 3.0 + 1 / s, "lr": 1e-4 * s}
            for s in range(1, steps + 1)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.plot_losses({"KL": tmp_path / "kl.jsonl", "cross-entropy": tmp_path / "ce.jsonl"}, tmp_path / "loss.png")
    image = imread(tmp_path / "loss.png")[..., :3]
    for colour in plots.COLOURS[:2]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert steps == 1 or (np.abs(image - wanted).max(axis=2) < 0.02).any()


def test_pictures_need_no_display(tmp_path):
    save_file(scores(), tmp_path / "scores.safetensors")
    code = (
        "import sys; from minitron_mcore.reporting import plots; plots.plot_importance(*sys.argv[1:3]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    files = [str(tmp_path / "scores.safetensors"), str(tmp_path / "scores.png")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=environment)
