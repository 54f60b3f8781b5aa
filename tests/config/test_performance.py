"""Options for memory and speed: a failure means that one changes what the student learns, saves nothing, or is let through where it
cannot work."""

import dataclasses
import json

import hydra
import pytest
import torch

from minitron_mcore.cli import compose, dry_run
from minitron_mcore.config.performance import (
    EVERYTHING,
    Fp8,
    Fp8Recipe,
    PerformanceConfig,
    ProfileConfig,
    Recompute,
    RecomputeMethod,
)
from minitron_mcore.config.settings import Device, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.distill import tile_sizes
from minitron_mcore.estimate import activations
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.performance_checks import Run, problems
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import ONE
from tests.helpers.layouts import layouts
from tests.helpers.training import CONFIG, micro_batches

LLAMA = Architecture("llama", 2, 64, 128, 8, 4, 8, 1000, 256, 1e-5, 1e4, None, tied=False)
NONE = PerformanceConfig()
FULL = PerformanceConfig(recompute=Recompute.full, recompute_layers=3)
BLOCK = PerformanceConfig(recompute=Recompute.full, recompute_method=RecomputeMethod.block, recompute_layers=1)
DENSE = PerformanceConfig(recompute=Recompute.selective, recompute_modules=["core_attn", "mlp"])
EXPERTS = PerformanceConfig(recompute=Recompute.selective, recompute_modules=["core_attn", "moe"])
STEP = dataclasses.replace(CONFIG, sequence_length=16, lm_weight=1.0)
GATHER = PerformanceConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=700)
OPTIONS = {
    "small buckets": (2, ParallelConfig(), PerformanceConfig(overlap_grad_reduce=True, bucket_size=700)),
    "weights gathered as needed": (2, ParallelConfig(), GATHER),
    "gathered by all stages": (
        4,
        ParallelConfig(pipeline=2, virtual=2),
        dataclasses.replace(GATHER, align_param_gather=True),
    ),
}


@pytest.fixture(scope="module")
def pair(pair_of):
    return pair_of(False)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    at = tmp_path_factory.mktemp("mixtral")
    on_ranks(models.import_hf, 1, ONE, families.tiny("mixtral", at / "hf"), at / "teacher", ONE)
    return at / "teacher", at / "teacher"


def gradients(student, teacher, parallel, every):
    """Of each of the options: loss, this rank's gradients of a step's micro-batches, and the most that autograd held."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups, schedule
    from minitron_mcore.testing import saved_bytes

    opened = [run_folder.open_checkpoint(folder) for folder in (student, teacher)]
    found, dp = [], process_groups.dp_group()
    for performance in every:
        trainer = Trainer(*opened, STEP, parallel, "fp32", performance=performance)
        stream = micro_batches(STEP, 0, dp.rank(), dp.size())
        batches = [next(stream) for _ in range(STEP.global_batch // dp.size())]
        with_teacher_outputs = list(trainer.teacher.add_teacher_outputs(batches))
        with saved_bytes(
            [*trainer.model.parameters(), trainer.teacher.head] if process_groups.is_last_stage() else []
        ) as saved:
            parts = schedule.forward_backward(
                trainer.chunks, with_teacher_outputs, trainer.loss_fn, batches[0], len(batches)
            )
        found.append(
            {
                "sums": torch.stack(parts) if parts else None,
                "gradients": {name: p.main_grad.clone() for name, p in trainer.model.named_parameters()},
                "saved": saved.peak,
            }
        )
    return found


LAYOUTS = layouts("tp1", "tp2_sp", "pp2", "pp2_virtual2", "cp2", "tp2_cp2")


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


@pytest.mark.default_cases("pp2_virtual2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_changes_no_bit_and_keeps_less(pair, layout):
    world, parallel = LAYOUTS[layout]
    options = [NONE, FULL, BLOCK, DENSE]
    compare(on_ranks(gradients, world, parallel, *pair, parallel, options), 3)


@pytest.mark.slow
def test_recomputation_of_experts(mixtral):
    parallel = ParallelConfig(expert=2)
    compare(on_ranks(gradients, 2, parallel, *mixtral, parallel, [NONE, FULL, EXPERTS]), 2)


def kept(arch, parallel, every):
    """Bytes that autograd keeps of one forward pass, with each of the options."""
    from minitron_mcore.models import build
    from minitron_mcore.testing import saved_bytes

    found = []
    for performance in every:
        model = build.build(arch, parallel, "bf16", performance)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        with saved_bytes(model.parameters()) as saved:
            output = model(torch.randint(0, arch.vocab, (2, 32 // parallel.context)), None, None)
        found.append(saved.now)
        del output
    return found


@pytest.mark.default_cases("tp2_sp", "cp2")
@pytest.mark.parametrize("layout", ["tp1", "tp2_sp", "cp2"])
def test_kept_activations_are_as_estimated(layout):
    (world, parallel), every = LAYOUTS[layout], [NONE, FULL, BLOCK, DENSE]
    arch = dataclasses.replace(LLAMA, blocks=5, hidden=256, ffn=320)
    for found in on_ranks(kept, world, parallel, arch, parallel, every):
        for performance, measured in zip(every, found, strict=True):
            setting = Setting(parallel, world, Dtype.bf16, 2, 32, Device.cpu, performance)
            assert activations.stage(arch, setting, 0, 1) == pytest.approx(measured, rel=0.06), performance.recompute


def train(student, teacher, parallel, performance, out_dir, stop=None, hosted=False):
    """Steps up to `stop`, from where `out_dir` is: their figures, and this rank's weights."""
    from minitron_mcore.checkpoint import run_folder, steps
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    opened = [run_folder.open_checkpoint(folder) for folder in (student, teacher)]
    config = dataclasses.replace(CONFIG, stop_after=stop)
    trainer = Trainer(*opened, config, parallel, "fp32", performance=performance)
    if hosted:
        trainer.teacher.offload()
    if steps.published(out_dir):
        trainer.resume(out_dir)
    run_folder.describe(out_dir, opened[0].arch, "test", {}, opened[0].hf)
    dp = process_groups.dp_group()
    batches = micro_batches(config, trainer.step * config.global_batch, dp.rank(), dp.size())
    history = train({out_dir: trainer}, batches, out_dir)[0]
    return history, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one, other):
    for (history, weights), (history2, weights2) in zip(one, other, strict=True):
        for a, b in zip(history, history2, strict=True):
            assert all(a[key] == pytest.approx(b[key], rel=1e-6) for key in ("kd_loss", "lm_loss", "grad_norm")), (a, b)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, weights2[name], rtol=0, atol=1e-6)


def beside(student, teacher, parallel, performance, folder):
    """A run of the defaults, and one of these options that stops on its way and goes on."""
    whole = train(student, teacher, parallel, NONE, folder / "whole")
    first, _ = train(student, teacher, parallel, performance, folder / "parts", stop=2)
    second, weights = train(student, teacher, parallel, performance, folder / "parts")
    return whole, (first + second, weights)


@pytest.mark.default_cases("gathered by all stages")
@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_resuming_are_the_same_with(pair, tmp_path, name):
    world, parallel, performance = OPTIONS[name]
    same(*zip(*on_ranks(beside, world, parallel, *pair, parallel, performance, tmp_path), strict=True))


def hosted(student, teacher, parallel, folder):
    held = train(student, teacher, parallel, NONE, folder / "held")
    return held, train(student, teacher, parallel, NONE, folder / "hosted", hosted=True)


def test_a_teacher_in_host_memory_teaches_the_same(pair, tmp_path):
    parallel = ParallelConfig(pipeline=2)
    same(*zip(*on_ranks(hosted, 2, parallel, *pair, parallel, tmp_path), strict=True))


def hosted_bytes(teacher):
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint
    from minitron_mcore.distill.teacher import OffloadedWeights

    weights = list(build_model(open_checkpoint(teacher), ParallelConfig(), "fp32").parameters())
    before = [weight.detach().clone() for weight in weights]
    hosted = OffloadedWeights(weights)
    outside = [weight.data_ptr() for weight in weights]
    with hosted:
        inside = [weight.data_ptr() for weight in weights]
        assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    assert outside == [host.data_ptr() for host in hosted.host] == [weight.data_ptr() for weight in weights]
    return len(set(inside) & set(outside))


def test_weights_lie_on_the_device_during_a_turn_only(pair):
    assert on_ranks(hosted_bytes, 1, ParallelConfig(), pair[1]) == [0]


def test_gradients_in_bf16_are_half_as_large(pair):
    performance = PerformanceConfig(grad_reduce_in_fp32=False)
    found = on_ranks(buffers, 2, ParallelConfig(), *pair, [NONE, performance])
    for (full, first), (half, second) in found:
        assert half * 2 == full
        assert second == pytest.approx(first, rel=0.02)


def buffers(student, teacher, every):
    """Of each of the options: bytes of the gradients, and a step's gradient norm."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    opened, found, dp = (
        [run_folder.open_checkpoint(folder) for folder in (student, teacher)],
        [],
        process_groups.dp_group(),
    )
    for performance in every:
        trainer = Trainer(*opened, STEP, ParallelConfig(), "bf16", performance=performance)
        stream = micro_batches(STEP, 0, dp.rank(), dp.size())
        figures = trainer.train_step([next(stream) for _ in range(STEP.global_batch // dp.size())])
        found.append((sum(p.main_grad.nbytes for p in trainer.model.parameters()), figures["grad_norm"]))
    return found


def chunked(pair):
    from minitron_mcore.checkpoint.run_folder import open_checkpoint
    from minitron_mcore.distill.trainer import Trainer

    trainer = Trainer(
        *map(open_checkpoint, pair), CONFIG, ParallelConfig(), "fp32", None, PerformanceConfig(loss_chunk_mb=1)
    )
    return len(trainer.model.head()), trainer.loss_fn._loss_config().chunk_bytes


def test_the_loss_holds_as_many_logits_as_asked_for(pair):
    ((rows, budget),) = on_ranks(chunked, 1, ParallelConfig(), pair)
    tokens = tile_sizes.chunk_tokens(5000, 4 * 2 * rows, budget)
    chunks = 5000 / tokens
    assert 4 * 2 * rows * tokens <= 1 << 20 < 4 * 2 * rows * 5000 / (chunks - 1)


def test_steps_are_profiled(pair, tmp_path):
    profile = ProfileConfig(start=2, stop=3, ranks=[1])
    on_ranks(train, 2, ParallelConfig(), *pair, ParallelConfig(), PerformanceConfig(profile=profile), tmp_path / "run")
    trace = json.loads((tmp_path / "run" / "profile" / "rank_1.json").read_text())
    assert not (tmp_path / "run" / "profile" / "rank_0.json").exists()
    steps = [event for event in trace["traceEvents"] if event["name"].startswith("Optimizer.step")]
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"recompute": "selective", "recompute_modules": ["moe"]},
            "recompute_modules is ['moe']; of a llama core_attn",
        ),
        ({"recompute": "selective", "recompute_modules": []}, "recompute_modules is []"),
        ({"recompute": "full", "recompute_layers": 0}, "recompute_layers is 0; it must be at least 1"),
        ({"recompute": "selective", "recompute_modules": ["layernorm"]}, "which needs Transformer Engine"),
        ({"rope_fusion": True}, "needs Transformer Engine's rotary kernel; this machine has none: give null"),
        ({"gradient_accumulation_fusion": True}, "needs Transformer Engine or Apex's"),
        ({"precision_aware_optimizer": True}, "needs Transformer Engine's FusedAdam"),
        ({"fp8": "hybrid"}, "fp8 is hybrid, which needs Transformer Engine"),
        ({"teacher_offload": True}, "needs CUDA"),
        ({"attention_backend": "flash"}, "attention_backend is flash, which needs Transformer Engine"),
        ({"overlap_param_gather": True}, "overlap_param_gather needs performance.overlap_grad_reduce"),
        ({"align_param_gather": True}, "needs overlap_param_gather and parallel.virtual above 1"),
        ({"tp_comm_overlap": True}, "parallel.sequence true and parallel.tensor above 1"),
        ({"bucket_size": 7}, "bucket_size is for overlap_grad_reduce"),
        ({"exp_avg_dtype": "bf16"}, "needs performance.precision_aware_optimizer"),
        ({"nccl_timeout_minutes": 11.0}, "it must be finite and above hang.setup_minutes 60"),
        ({"profile.stop": 3}, "profile has no start"),
    ],
)
def test_what_cannot_work_is_refused(change, sentence):
    config = composed(*(f"performance.{key}={json.dumps(value)}" for key, value in change.items()), "dry.device=cpu")
    assert any(sentence in problem for problem in dry_run.plan(config)["problems"])


def composed(*overrides: str):
    with hydra.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return compose.compose("distill", ["+recipe=llama31_minitron_4b_width", "dry_run=true", *overrides])


@pytest.mark.parametrize(
    ("fits", "change", "sentence"),
    [
        (LLAMA, {"fp8": Fp8.e4m3, "recompute": Recompute.selective, "recompute_modules": ["layernorm"]}, ""),
        (
            LLAMA,
            {"fp8": Fp8.e4m3, "fp8_recipe": Fp8Recipe.delayed}
            | {"recompute": Recompute.selective, "recompute_modules": ["layernorm"]},
            "fp8_recipe delayed does not allow",
        ),
        (dataclasses.replace(LLAMA, hidden=72), {"fp8": Fp8.e4m3}, "multiples of 16, but there is hidden 72"),
        (LLAMA, {"teacher_fp8": Fp8.e4m3, "teacher_offload": True}, "needs a live teacher"),
        (LLAMA, {"precision_aware_optimizer": True, "exp_avg_dtype": Dtype.bf16}, ""),
        (dataclasses.replace(LLAMA, family="nemotron"), {"bias_activation_fusion": True}, "has none: give null"),
    ],
)
def test_with_all_kernels_there(fits, change, sentence):
    training = DistillConfig(sequence_length=64)
    run = Run(PerformanceConfig(**change), fits, fits, training, ParallelConfig(), Dtype.bf16, EVERYTHING)
    found = list(problems(run))
    assert sentence in found[0] if sentence else not found, found
