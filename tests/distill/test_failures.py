"""What may go wrong in a training run: a failure means that it spreads, hides, or costs what was there before."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.performance import HangConfig
from minitron_mcore.config.settings import BadLoss, ParallelConfig
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.errors import HUNG_STATUS
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import models
from tests.helpers.cutting import ONE, export
from tests.helpers.training import CONFIG, distill, micro_batches

CONFIG = dataclasses.replace(CONFIG, peak_lr=1e-3, min_lr=1e-4)
SKIP = dataclasses.replace(CONFIG, on_bad_loss=BadLoss.skip)
WORLD, LAYOUT = 4, ParallelConfig(pipeline=2)  # data-parallel rank 1 is ranks 1 and 3


def distill_masked(student, teacher, config, parallel, out_dir, masks, resume=False):
    """`distill` where the loss mask of data-parallel rank r's micro-batches in step s (from 1) is masks[s, r]; its exception's
    name, or its history."""
    from minitron_mcore.parallel import process_groups
    from tests.helpers import training

    def edited(config, start, dp_rank, dp_size):
        per_step = config.global_batch // (config.micro_batch * dp_size)
        for n, batch in enumerate(micro_batches(config, start, dp_rank, dp_size)):
            step = start // config.global_batch + n // per_step + 1
            if (value := masks.get((step, dp_rank))) is not None:
                batch["loss_mask"] = torch.full_like(batch["loss_mask"], value)
            yield batch

    training.micro_batches = edited
    try:
        return distill(student, teacher, config, parallel, out_dir, resume)
    except Exception as error:
        if process_groups.rank() == process_groups.dp_group().rank() == 0:
            (Path(out_dir) / "raised").write_text(str(error))
        return type(error).__name__


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["untied"])
def test_bad_loss_stops_all_and_costs_nothing(tmp_path, pair):
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
    assert same(export(run, tmp_path / "a"), export(tmp_path / "whole", tmp_path / "b"))
    assert not (run / "failure.json").exists()


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_bad_losses_are_skipped_up_to_a_limit(tmp_path, pair):
    two, parallel = 2, ParallelConfig(tensor=2)
    once = dataclasses.replace(SKIP, stop_after=2)
    history = on_ranks(distill_masked, two, parallel, *pair, once, parallel, tmp_path / "skip", {(2, 0): float("nan")})
    assert [[figures["step"] for figures in each] for each in history] == [[1]] * two
    assert [file.name for file in (tmp_path / "skip/bad_batches").iterdir()] == ["step_0000002_rank_0.safetensors"]
    on_ranks(distill, two, parallel, *pair, dataclasses.replace(CONFIG, stop_after=1), parallel, tmp_path / "one")
    before, after = export(tmp_path / "one", tmp_path / "a"), export(tmp_path / "skip", tmp_path / "b")
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


def steps(student, teacher, config, parallel, masks):
    """Of each step its figures or what is bad, whether weights and moments were kept, the gradient that is bad; micro-batch
    n of a step has the loss mask masks[step, n]."""
    from minitron_mcore.distill.failures import BadStep
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    trainer = Trainer(open_checkpoint(student), open_checkpoint(teacher), config, parallel, "fp32")

    def state() -> list[torch.Tensor]:
        parts = [entry for o in trainer.optimizer.chained_optimizers for entry in o.optimizer.state.values()]
        moments = [entry[key] for entry in parts for key in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in [*trainer.model.parameters(), *moments]]

    dp = process_groups.dp_group()
    batches, found = micro_batches(config, 0, dp.rank(), dp.size()), []
    for step in range(1, config.steps + 1):
        own = [next(batches) for _ in range(config.global_batch // (config.micro_batch * dp.size()))]
        for n, batch in enumerate(own):
            if (value := masks.get((step, n * dp.size() + dp.rank()))) is not None:
                batch["loss_mask"] = torch.full_like(batch["loss_mask"], value)
        before = state()
        try:
            figures = trainer.train_step(own)
        except BadStep as bad:
            figures = {"what": bad.what}
        after = state()
        kept = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        found.append(figures | {"kept": kept, "bad_gradient": trainer.bad_gradient()})
    return found


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["untied"])
def test_masked_micro_batches(tmp_path, pair):
    """In step 2 all of data-parallel rank 1's are masked, in step 3 all: the former counts the rest, the latter moves nothing."""
    masks = {(2, 1): 0.0, (2, 3): 0.0} | {(3, n): 0.0 for n in range(4)}
    alone = on_ranks(steps, 1, ONE, *pair, CONFIG, ONE, masks)[0]
    for layout in (ParallelConfig(), ParallelConfig(pipeline=2)):
        for found in on_ranks(steps, 2 * layout.pipeline, layout, *pair, CONFIG, layout, masks):
            assert [figures["kept"] for figures in found] == [False, False, True, False]
            assert found[2]["kd_loss"] == found[2]["grad_norm"] == 0
            for figures in found:  # masked tokens are computed too
                tokens = figures["tokens_per_second"] * figures["step_seconds"]
                assert tokens == pytest.approx(CONFIG.global_batch * CONFIG.sequence_length)
                operations = [figures["student_tflops"] * figures["step_seconds"] for figures in (figures, found[0])]
                assert operations[0] == pytest.approx(operations[1])
            for a, b in zip(alone, found, strict=True):
                for key in ("kd_loss", "lm_loss", "grad_norm", "lr"):
                    assert b[key] == pytest.approx(a[key], rel=2e-5), key


def filled(checkpoint, folder, key, value):
    """A copy of a checkpoint with a tensor filled with `value`."""
    export(checkpoint, folder)
    tensors = models.weights(folder)
    tensors[key][:] = value
    [file] = folder.glob("*.safetensors")
    save_file(tensors, file, {"format": "pt"})
    on_ranks(models.import_hf, 1, ONE, folder, folder / "checkpoint", ONE)
    return folder / "checkpoint"


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["untied"])
def test_bad_gradient_moves_nothing(tmp_path, pair):
    student = filled(pair[0], tmp_path / "huge", "model.embed_tokens.weight", 3e38)
    config = dataclasses.replace(CONFIG, steps=1, warmup_steps=0)
    for found in on_ranks(steps, 2, ParallelConfig(), student, pair[1], config, ParallelConfig(), {}):
        assert found[0] == {"what": "gradient", "kept": True, "bad_gradient": "embedding.word_embeddings.weight"}


def distill_hanging(student, teacher, config, parallel, out_dir):
    """Rank 1 falls asleep and rank 2 is stopped in step 2."""
    from minitron_mcore.parallel import process_groups
    from tests.helpers import training

    def hang(config, start, dp_rank, dp_size):
        for n, batch in enumerate(micro_batches(config, start, dp_rank, dp_size)):
            if n == 1 and process_groups.rank() == 1:
                time.sleep(600)
            if n == 1 and process_groups.rank() == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    training.micro_batches = hang
    return distill(student, teacher, config, parallel, out_dir)


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_hung_ranks_are_named(tmp_path, pair):
    config, parallel = dataclasses.replace(CONFIG, global_batch=3), ParallelConfig()
    hang = HangConfig(step_minutes=0.04)
    with pytest.raises(RankError) as lost:
        on_ranks(distill_hanging, 3, parallel, *pair, config, parallel, tmp_path / "run", timeout=60, hang=hang)
    assert lost.value.reason == f"died with exit code {HUNG_STATUS}"
    told = json.loads((tmp_path / "run/failure.json").read_text())
    assert (told["kind"], told["exit_status"], told["step"], told["ranks"]) == ("hung", HUNG_STATUS, 2, [2, 1])
    assert (
        "rank 2 does not answer" in told["message"] and "rank 1 is in hang (distill/test_failures.py" in told["message"]
    )
    assert "rank 0" not in told["message"]


def start_hanging(config):
    """`run.train` where rank 1 stops in the preparation of its text."""
    from minitron_mcore.data import token_cache
    from minitron_mcore.distill import run
    from minitron_mcore.parallel import process_groups

    token_cache.prepare = lambda *unused: time.sleep(600 if process_groups.rank() else 0) or process_groups.barrier()
    run.train([config], config.distill, [open_checkpoint(config.student)], open_checkpoint(config.teacher))


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_a_hang_before_the_first_step_is_reported(tmp_path, pair):
    student, teacher = map(str, pair)
    config = DistillRun(out_dir=str(tmp_path / "run"), work_dir="", student=student, teacher=teacher, distill=CONFIG)
    with pytest.raises(RankError, match=f"exit code {HUNG_STATUS}"):
        on_ranks(start_hanging, 2, ONE, config, timeout=60, hang=HangConfig(setup_minutes=0.03))
    told = json.loads((tmp_path / "run/failure.json").read_text())
    assert (told["kind"], told["step"], told["ranks"]) == ("hung", 0, [1])
    assert "in setup: rank 1 is in <lambda> (distill/test_failures.py" in told["message"]
