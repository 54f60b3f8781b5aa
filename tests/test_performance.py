"""Options for memory and speed: a failure means that one changes what the student learns, saves nothing, or is let through where it
cannot work."""

import dataclasses

import pytest
import torch

from minitron_mcore.config import ParallelConfig, PruneConfig
from minitron_mcore.performance import PerformanceConfig, Recompute, RecomputeMethod
from minitron_mcore.testing import on_ranks
from tests import families, models
from tests.test_distill import CONFIG, micro_batches
from tests.test_prune import ONE, write_family

pytestmark = pytest.mark.xdist_group("performance")

NONE = PerformanceConfig()
FULL = PerformanceConfig(recompute=Recompute.full, recompute_layers=3)
BLOCK = PerformanceConfig(recompute=Recompute.full, recompute_method=RecomputeMethod.block, recompute_layers=1)
DENSE = PerformanceConfig(recompute=Recompute.selective, recompute_modules=["core_attn", "mlp"])
EXPERTS = PerformanceConfig(recompute=Recompute.selective, recompute_modules=["core_attn", "moe"])
STEP = dataclasses.replace(CONFIG, sequence_length=16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    at = tmp_path_factory.mktemp("pair")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=False)
    return at / "student", at / "teacher"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    at = tmp_path_factory.mktemp("mixtral")
    on_ranks(models.import_hf, 1, ONE, families.tiny("mixtral", at / "hf"), at / "teacher", ONE)
    return at / "teacher", at / "teacher"


def gradients(student, teacher, parallel, every):
    """Of each of the options: loss, this rank's gradients of a step's micro-batches, and the most that autograd held."""
    from minitron_mcore import checkpoint, runtime, schedule
    from minitron_mcore.distill.train import Trainer
    from minitron_mcore.testing import saved_bytes

    opened = [checkpoint.open_checkpoint(folder) for folder in (student, teacher)]
    found, dp = [], runtime.dp_group()
    for performance in every:
        trainer = Trainer(*opened, STEP, parallel, "fp32", performance=performance)
        stream = micro_batches(STEP, 0, dp.rank(), dp.size())
        batches = [next(stream) for _ in range(STEP.global_batch // dp.size())]
        fed = list(trainer.teacher.feed(batches))
        with saved_bytes(
            [*trainer.model.parameters(), trainer.teacher.head] if runtime.is_last_stage() else []
        ) as saved:
            parts = schedule.forward_backward(trainer.chunks, fed, trainer.objective, batches[0], len(batches))
        found.append(
            {
                "sums": torch.stack(parts) if parts else None,
                "gradients": {name: p.main_grad.clone() for name, p in trainer.model.named_parameters()},
                "saved": saved.peak,
            }
        )
    return found


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "tp2_cp2": (4, ParallelConfig(tensor=2, context=2)),
}


def compare(ranks, count):
    for plain, *others in ranks:
        assert len(others) == count
        for other in others:
            assert (plain["sums"] is None) == (other["sums"] is None)
            if plain["sums"] is not None:
                assert torch.equal(plain["sums"], other["sums"])
            for name, gradient in plain["gradients"].items():
                assert torch.equal(gradient, other["gradients"][name]), name
            assert other["saved"] < plain["saved"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_changes_no_bit_and_keeps_less(pair, layout):
    world, parallel = LAYOUTS[layout]
    options = [NONE, FULL, BLOCK, DENSE]
    compare(on_ranks(gradients, world, parallel, *pair, parallel, options), 3)


def test_recomputation_of_experts(mixtral):
    parallel = ParallelConfig(expert=2)
    compare(on_ranks(gradients, 2, parallel, *mixtral, parallel, [NONE, FULL, EXPERTS]), 2)
