"""What may go wrong in a training run: a failure means that it spreads, hides, or costs what was there before."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minitron_mcore.checkpoint import open_checkpoint
from minitron_mcore.config import BadLoss, ParallelConfig
from minitron_mcore.testing import on_ranks
from tests.test_distill import CONFIG, ONE, distill, micro_batches, pair  # noqa: F401
from tests.test_prune import export

CONFIG = dataclasses.replace(CONFIG, peak_lr=1e-3, min_lr=1e-4)
SKIP = dataclasses.replace(CONFIG, on_bad_loss=BadLoss.skip)
WORLD, LAYOUT = 4, ParallelConfig(pipeline=2)  # data-parallel rank 1 is ranks 1 and 3


def distill_masked(student, teacher, config, parallel, out_dir, masks, resume=False):
    """`distill` where the loss mask of data-parallel rank r's micro-batches in step s (from 1) is masks[s, r]; its exception's
    name, or its history."""
    from minitron_mcore import runtime
    from tests import test_distill

    def edited(config, start, dp_rank, dp_size):
        per_step = config.global_batch // (config.micro_batch * dp_size)
        for n, batch in enumerate(micro_batches(config, start, dp_rank, dp_size)):
            step = start // config.global_batch + n // per_step + 1
            if (value := masks.get((step, dp_rank))) is not None:
                batch["loss_mask"] = torch.full_like(batch["loss_mask"], value)
            yield batch

    test_distill.micro_batches = edited
    try:
        return distill(student, teacher, config, parallel, out_dir, resume)
    except Exception as error:
        if runtime.rank() == runtime.dp_group().rank() == 0:
            (Path(out_dir) / "raised").write_text(str(error))
        return type(error).__name__


def weights(run, to) -> dict[str, torch.Tensor]:
    return export(run, to)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["untied"])
def test_bad_loss_stops_all_and_costs_nothing(tmp_path, pair):  # noqa: F811
    """Infinite on one last-stage rank in step 2; the run that goes on from there is the one that never failed, bit by bit."""
    run, bad = tmp_path / "run", {(2, 1): float("inf")}
    names = on_ranks(distill_masked, WORLD, LAYOUT, *pair, CONFIG, LAYOUT, run, bad)
    assert names == ["NotFinite"] * WORLD
    [file] = (run / "bad_batches").iterdir()
    assert file.name == "step_0000002_rank_3.safetensors"
    said, told = (run / "raised").read_text(), json.loads((run / "failure.json").read_text())
    assert told == {
        "kind": "not_finite", "exit_status": 3, "step": 2, "message": said, "ranks": [3], "files": [str(file)],
    }  # fmt: skip
    assert (
        all(part in said for part in ("loss of step 2", "rank 3", str(file), "on_bad_loss=skip")) and "\n" not in said
    )
    found = load_file(file)
    expected = list(micro_batches(CONFIG, CONFIG.global_batch, 1, 2))[:2]
    assert torch.equal(found["tokens"], torch.stack([batch["tokens"] for batch in expected]))
    assert torch.equal(found["labels"], torch.stack([batch["labels"] for batch in expected]))
    assert found["samples"].tolist() == [[5], [7]]  # the second batch of four, shared out to two
    assert found["loss_mask"].isinf().all() and not found["sums"][:, 1].isfinite().any()
    with safe_open(file, "pt") as opened:
        assert opened.metadata() | {"value": ""} == {
            "step": "2", "rank": "3", "what": "loss", "value": "", "micro_batches": "[0, 1]",
        }  # fmt: skip

    assert open_checkpoint(run).step_dir.name == "step_0000001"
    on_ranks(distill_masked, WORLD, LAYOUT, *pair, CONFIG, LAYOUT, run, {}, True)
    on_ranks(distill, WORLD, LAYOUT, *pair, CONFIG, LAYOUT, tmp_path / "whole")
    assert same(weights(run, tmp_path / "a"), weights(tmp_path / "whole", tmp_path / "b"))
    assert not (run / "failure.json").exists()


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_bad_losses_are_skipped_up_to_a_limit(tmp_path, pair):  # noqa: F811
    two, parallel = 2, ParallelConfig(tensor=2)
    once = dataclasses.replace(SKIP, stop_after=2)
    history = on_ranks(distill_masked, two, parallel, *pair, once, parallel, tmp_path / "skip", {(2, 0): float("nan")})
    assert [[figures["step"] for figures in each] for each in history] == [[1]] * two
    assert [file.name for file in (tmp_path / "skip/bad_batches").iterdir()] == ["step_0000002_rank_0.safetensors"]
    on_ranks(distill, two, parallel, *pair, dataclasses.replace(CONFIG, stop_after=1), parallel, tmp_path / "one")
    before, after = weights(tmp_path / "one", tmp_path / "a"), weights(tmp_path / "skip", tmp_path / "b")
    assert same(before, after)
    third = on_ranks(distill_masked, two, parallel, *pair, SKIP, parallel, tmp_path / "skip", {}, True)[0]
    whole = on_ranks(distill, two, parallel, *pair, CONFIG, parallel, tmp_path / "whole")[0]
    assert [f["step"] for f in third] == [3, 4]
    assert [f["lr"] for f in third] == [f["lr"] for f in whole[2:]]

    limit, bad = dataclasses.replace(SKIP, bad_loss_limit=1), {(s, 0): float("nan") for s in (1, 3, 4)}
    run = tmp_path / "limit"
    assert on_ranks(distill_masked, two, parallel, *pair, limit, parallel, run, bad) == ["NotFinite"] * two
    assert "These were 2 steps in a row" in (run / "raised").read_text()
    assert open_checkpoint(run).step_dir.name == "step_0000003"
