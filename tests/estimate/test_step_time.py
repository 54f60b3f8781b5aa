"""Memory and time that the dry run estimates: a failure means that it advises a layout that does not fit, or a slower one."""

import dataclasses

import pytest

from minitron_mcore.cli import dry_run
from minitron_mcore.config.hardware import DryConfig
from minitron_mcore.config.settings import DistillConfig, Dtype, ParallelConfig
from minitron_mcore.estimate import memory, step_time
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models.architecture import Architecture
from tests.helpers.launching import config_of

LLAMA = Architecture("llama", 2, 64, 128, 8, 4, 8, 1000, 256, 1e-5, 1e4, None, tied=False)


def composed(*overrides: str):
    return config_of("distill", "+recipe=llama31_minitron_4b_width", "dry_run=true", *overrides)


def rows(*overrides: str) -> dict[str, float]:
    """GiB by kind of the 8 B teacher's 4.5 B student on eight H100s at TP 2 with sequence parallelism."""
    figures = dry_run.plan(composed("parallel=tp2_sp", "dry.gpus=8", *overrides))
    assert not figures["problems"]
    return {key: value / memory.GIB for key, value in figures["ranks"][0].items()}


def test_the_recipe_fits_eight_gpus():
    whole = rows()
    assert whole["total"] < 75
    full = rows("performance=recompute")
    # 32 groups keep their input, 4,096 tokens of a rank x 3,072 channels in bf16; the final norm's on top.
    assert full["activations"] * memory.GIB == pytest.approx(33 * 4096 * 3072 * 2, rel=0.01)
    selective = rows("performance.recompute=selective", "performance.recompute_modules=[mlp]")
    assert full["activations"] < selective["activations"] < whole["activations"]
    assert rows("performance.loss_chunk_mb=64")["workspace"] < whole["workspace"]
    low = rows("performance=low_memory")
    assert low["gradients"] == whole["gradients"] / 2 and low["teacher"] < whole["teacher"] / 10
    aware = rows("performance.precision_aware_optimizer=true", "performance.exp_avg_dtype=bf16")
    assert aware["optimizer"] == pytest.approx(whole["optimizer"] / 2)
    quant = rows("performance=fp8")
    assert quant["weights"] > whole["weights"] and quant["teacher"] > whole["teacher"]


def test_a_steps_time_by_hand():
    arch = dataclasses.replace(LLAMA, blocks=4)
    training = DistillConfig(global_batch=8, micro_batch=1, sequence_length=32)
    setting = Setting(ParallelConfig(tensor=2, pipeline=2, sequence=True), 8, Dtype.bf16, 1, 32)
    dry = DryConfig(peak_tflops=1.0, mfu=0.5, nvlink_gbs=1.0, network_gbs=0.1)
    found = step_time.step([arch], arch, training, setting, dry)
    # A block's matrices: 64 x 128 + 64 x 64 + 3 x 64 x 128; each token meets 16.5 others on average.
    body, head = 4 * 2 * 36864 + 4 * 4 * 64 * 16.5, 2 * 1000 * 64
    micro_batches = 8 // 2
    last = (3 + 1) * (body / 2 + head)  # the student's forward and backward passes, the teacher's forward one
    compute = micro_batches * 32 * last / (2 * 0.5e12)
    states = 32 * 64 * 2 / 2  # bytes of a rank's hidden states
    loss, norms = 6 * 8 * 32, 4 * 5 * 64  # sums of the tokens in fp64; gradients of the last stage's norms
    shared = (micro_batches * (states * ((4 * 5 + 2) + (4 * 2 + 1)) + loss) + norms) / 1e9
    passed = micro_batches * states * 2 / 1e9  # the first stage sends the student's and the teacher's
    bubble = (compute + shared + passed) / micro_batches
    weights = (1000 * 64 + 2 * 36864) / 2 + (2 * 2 + 1) * 64  # of the last stage on one rank
    reduced = weights * (4 + 2) / 2 / 1e9
    reduced += 12 * 7 / 1e9  # each rank's figures to the other seven
    assert found["seconds"] == pytest.approx(compute + shared + passed + bubble + reduced)
    assert found["GB sent"] == pytest.approx(shared + passed + reduced)
    assert found["tokens/s/GPU"] == pytest.approx(8 * 32 / found["seconds"] / 8)
    slow = step_time.step([arch], arch, training, setting, dataclasses.replace(dry, gpus_per_node=2))
    assert slow["seconds"] == pytest.approx(found["seconds"] + 9 * passed * (1 + 1 / micro_batches) + 9 * reduced)


def test_advice_is_of_layouts_that_fit():
    training = DistillConfig(global_batch=8, micro_batch=1, sequence_length=32)
    setting = Setting(ParallelConfig(), 8, Dtype.bf16, 1, 32)
    found = step_time.layouts([LLAMA], LLAMA, training, setting, DryConfig(gpus=8))
    assert found and [row["days"] for row in found] == sorted(row["days"] for row in found)
    assert all(row["TP"] * row["PP"] * row["CP"] * row["DP"] == 8 for row in found)
    assert {row["TP"] for row in found} == {1, 2, 4}  # four key/value groups
    assert not step_time.layouts([LLAMA], LLAMA, training, setting, DryConfig(gpus=8, memory=1e-6))


def test_the_dry_run_advises():
    figures = dry_run.plan(composed("dry.advise=true", "dry.gpus=8"))
    assert not figures["problems"] and all(row["GiB"] <= 75 for row in figures["layouts"])
    tight = dry_run.plan(composed("dry.advise=true", "dry.gpus=8", "dry.memory=40"))["layouts"]
    assert len(tight) > 0 and any(row["recompute"] == "full" for row in tight)
    assert "found no layout" in dry_run.plan(composed("dry.advise=true", "dry.gpus=1"))["problems"][0]
