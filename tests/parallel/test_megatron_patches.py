"""Each patch of torch and megatron-core is still needed. A failure means that the library changed: remove or adapt the patch."""

import dataclasses
import inspect
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minitron_mcore.config.performance import PerformanceConfig, Recompute
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models import build, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import megatron_patches, process_groups, schedule
from minitron_mcore.parallel.megatron_patches import checkpoint, cpu_backend, groups, optimizer_state, training
from minitron_mcore.testing import RankError, on_ranks

from megatron.core import dist_checkpointing, parallel_state  # isort: skip
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # isort: skip
from megatron.core.inference.contexts import StaticInferenceContext  # isort: skip
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules  # isort: skip
from megatron.core.models.hybrid.hybrid_model import HybridModel  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed  # isort: skip
from megatron.core.transformer.attention import SelfAttention  # isort: skip

ONE = ParallelConfig()
ARCH = Architecture("llama", 2, 32, 48, 4, 2, 8, 64, 64, 1e-5, 1e4, None, False)
on_cpu = pytest.mark.skipif(not cpu_backend.is_cpu(), reason="the CPU backend replaces nothing with CUDA")


def trainer(performance: PerformanceConfig):
    """(DDP, optimizer) of a random bf16 model under the distributed optimizer."""
    model = build.build(ARCH, ONE, "bf16", performance)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ddp = DistributedDataParallel(model.config, tuning.ddp_config(performance), model)
    options = tuning.optimizer_options(performance)
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, **options
    )
    optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return ddp, optimizer


def train(performance: PerformanceConfig, factor: float = 1.0):
    """One training step; the loss is a sum of squares times `factor`."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    ddp, optimizer = trainer(performance)
    batch = {"tokens": torch.arange(16).view(2, 8)}

    def loss(hidden, batch):
        return hidden.float().square().sum() * factor, torch.tensor(16, dtype=torch.int32), torch.zeros(1)

    schedule.forward_backward([ddp], [batch], loss, batch, 1)
    optimizer.step()
    return ddp, optimizer


def test_the_version_is_the_one_the_patches_are_for():
    assert version("megatron-core") == megatron_patches.MEGATRON_CORE


def fails_without(index: int) -> bool:
    """Whether a training that works with this stand-in fails without it."""
    for performance in (PerformanceConfig(), PerformanceConfig(recompute=Recompute.full)):
        train(performance)
    (owner, name), original = list(cpu_backend.replaced.items())[index]
    setattr(owner, name, original)
    try:
        for performance in (PerformanceConfig(), PerformanceConfig(recompute=Recompute.full)):
            train(performance)
    except Exception:  # CUDA's own and megatron-core's assertions
        return True
    return False


STAND_INS = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in cpu_backend.replaced]
IN_OTHER_LAYOUTS = {  # pipeline and expert parallelism; stand-in -> how megatron-core's source calls it
    "torch.cuda.synchronize": "torch.cuda.synchronize(",
    "torch.cuda.Stream": "torch.cuda.Stream(",
    "torch.cuda.Event": "torch.cuda.Event(",
    "torch.cuda.stream": "torch.cuda.stream(",
    "Tensor.cuda": ".cuda(",
}
WITHOUT_EFFECT = ["torch.cuda.manual_seed", "megatron.core.tensor_parallel.random._set_cuda_rng_state"]


@on_cpu
@pytest.mark.parametrize("name", [name for name in STAND_INS if name not in {*IN_OTHER_LAYOUTS, *WITHOUT_EFFECT}])
def test_training_fails_without_the_stand_in(name):
    assert on_ranks(fails_without, 1, ONE, STAND_INS.index(name)) == [True]


@on_cpu
@pytest.mark.parametrize("name", IN_OTHER_LAYOUTS)
def test_megatron_core_still_calls_what_the_stand_in_replaces(name):
    assert name in STAND_INS
    folders = ("pipeline_parallel", "transformer", "models/common", "distributed")
    core = Path(parallel_state.__file__).parent
    sources = (file.read_text() for folder in folders for file in (core / folder).rglob("*.py"))
    assert any(IN_OTHER_LAYOUTS[name] in source for source in sources)


def seeds_without(name: str) -> bool:
    """Whether the function that the stand-in replaced changes the CPU's random state."""
    original = list(cpu_backend.replaced.values())[STAND_INS.index(name)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    original(before if "state" in name else 3)
    return not torch.equal(torch.get_rng_state(), state)


@on_cpu
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_random_state_is_not_set_without_the_stand_in(name):
    assert on_ranks(seeds_without, 1, ONE, name) == [False]


@on_cpu
def test_importing_torch_alone_replaces_nothing():
    code = "import torch; x = torch.empty(1); print(x.type(), torch.cuda.manual_seed.__module__)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["torch.FloatTensor", "torch.cuda.random"]


def second_layout() -> None:
    process_groups._initialize(ONE)


def test_groups_megatron_core_refuses_a_second_layout():
    with pytest.raises(RankError, match="is already initialized"):
        on_ranks(second_layout, 1, ONE)
    assert groups.UNINITIALIZED and all(hasattr(parallel_state, name) for name in groups.UNINITIALIZED)


def ranks_of_another_world() -> None:
    dist.new_group([0, 1])


def test_groups_torch_makes_them_within_one_world_only():
    with pytest.raises(RankError, match="world size should be less or equal to the world size"):
        on_ranks(ranks_of_another_world, 1, ONE)
    assert not hasattr(dist, "get_default_store")


def test_models_the_stack_has_no_final_norm_in_its_spec():
    assert not [field.name for field in dataclasses.fields(HybridStackSubmodules) if "norm" in field.name]


def test_models_the_output_head_and_rotary_scaling_have_no_option():
    forward, init = (inspect.signature(f).parameters for f in (HybridModel.forward, HybridModel.__init__))
    assert not [name for name in forward if "hidden" in name or "head" in name or "post_process" in name]
    assert not [name for name in init if "scaling" in name]


def fused_head() -> None:
    config = build.transformer_config(ARCH, ONE, "bf16", PerformanceConfig(gradient_accumulation_fusion=False))
    config.gradient_accumulation_fusion = True
    ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False)


@pytest.mark.skipif(tuning._apex_weight_gradient(), reason="Apex is installed")
def test_models_gradient_accumulation_fusion_needs_apex():
    with pytest.raises(RankError, match="gradient_accumulation_fusion"):
        on_ranks(fused_head, 1, ONE)


def own_cache() -> tuple[str, bool]:
    """megatron-core's mask for two tokens after two cached ones, and whether it caches keys as they are."""
    attention = build.layers(build.build(ARCH, ONE, "fp32").eval())[0].self_attention
    context, new = StaticInferenceContext(1, 8), torch.ones(2, 1, 2, 8)
    context.sequence_len_offset = 2
    embeddings = (torch.ones(8, 1, 1, 8),) * 2
    mask = SelfAttention._adjust_key_value_for_inference(attention, context, new, new, new, embeddings)[4]
    return mask.name, torch.equal(context.key_value_memory_dict[1][0][2:4], new)


def test_key_value_cache_megatron_cores_own_masks_nothing_and_rotates_all_keys_in_each_pass():
    assert on_ranks(own_cache, 1, ONE) == [("no_mask", True)]


def nan_step() -> bool:
    ddp, _ = train(PerformanceConfig(), factor=math.nan)
    return any(bool(parameter.isnan().any()) for parameter in ddp.parameters())


def checked_nan_step() -> tuple[bool, float]:
    ddp, optimizer = trainer(PerformanceConfig())
    norms: list[float] = []

    def check(norm: float) -> None:
        norms.append(norm)
        raise ArithmeticError

    training.check_gradient_norm(optimizer, check)
    for parameter in ddp.parameters():
        parameter.main_grad.fill_(math.nan)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    return any(bool(parameter.isnan().any()) for parameter in ddp.parameters()), norms[0]


def test_training_a_gradient_that_is_nan_still_moves_the_weights():
    assert on_ranks(nan_step, 1, ONE) == [True]
    moved, norm = on_ranks(checked_nan_step, 1, ONE)[0]
    assert not moved and math.isnan(norm)


def gathered_head() -> tuple[bool, bool]:
    """Whether the head's weights are gathered after the forward pass, without the hook and with it."""
    performance = PerformanceConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1)
    waited = []
    for hooked in (False, True):
        ddp, _ = trainer(performance)
        head = ddp.module.head()
        if hooked:
            training.wait_for_head(ddp, ddp.module.decoder.final_norm, head)
        ddp(torch.arange(16).view(2, 8), None, None)
        group = ddp.param_to_bucket_group[head]
        waited.append(group.param_gather_dispatched and group.param_gather_handle is None)
    return waited[0], waited[1]


def test_training_nothing_waits_for_the_weights_of_a_head_that_is_not_called():
    assert on_ranks(gathered_head, 2, ONE) == [(False, True)] * 2


def step_counters() -> tuple[int, int, int]:
    """Different step tensors after a step, after `load_state_dict`, and with the patch."""
    _, optimizer = train(PerformanceConfig())
    part = optimizer.chained_optimizers[0]

    def count() -> int:
        return len({id(entry["step"]) for entry in part.optimizer.state.values()})

    first = count()
    part.load_state_dict(part.state_dict())
    loaded = count()
    optimizer_state.separate_step_counters(part)
    return first, loaded, count()


@on_cpu
def test_optimizer_state_all_parameters_share_a_loaded_step_counter():
    first, loaded, separate = on_ranks(step_counters, 1, ONE)[0]
    assert first == separate > loaded == 1


def test_optimizer_state_has_no_public_access_by_parameter():
    names = {name for name in dir(optimizer_state.DistributedOptimizer) if "main_param_and_optimizer_states" in name}
    assert names == {"_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"}


def test_checkpoint_load_has_no_argument_for_a_reader():
    parameters = inspect.signature(dist_checkpointing.load).parameters
    assert not [name for name in parameters if "reader" in name or "storage" in name]


def test_checkpoint_the_save_steps_have_no_public_name():
    for function in (checkpoint.group_by_key, checkpoint.write_item):
        assert function.__name__.startswith("_")
        assert not hasattr(inspect.getmodule(function), function.__name__.lstrip("_"))
