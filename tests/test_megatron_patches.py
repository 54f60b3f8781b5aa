import pytest
import torch
from minitron_mcore.config.performance import PerformanceConfig, Recompute
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models import build, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import schedule
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.testing import RankError, on_ranks
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

ONE = ParallelConfig()
ARCH = Architecture("llama", 2, 32, 48, 4, 2, 8, 64, 64, 1e-5, 1e4, None, False)


def trained(perf=PerformanceConfig()):
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = build.build(ARCH, ONE, "bf16", perf)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    ddp = DistributedDataParallel(model.config, tuning.ddp_config(perf, True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    batch = {"tokens": torch.arange(16).view(2, 8)}

    def loss(hidden, batch):
        return hidden.float().square().sum(), torch.tensor(16, dtype=torch.int32), torch.zeros(1)

    schedule.forward_backward([ddp], [batch], loss, batch, 1)
    return optimizer.step()[1]


def _without(index):
    (owner, name), original = list(cpu_backend.replaced.items())[index]
    setattr(owner, name, original)
    return float(trained()), float(trained(PerformanceConfig(recompute=Recompute.full)))


NAMES = [f"{getattr(o, '__name__', o)}.{n}" for o, n in cpu_backend.replaced]


def test_base():
    print(on_ranks(trained, 1, ONE))


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
def test_x(i):
    with pytest.raises(RankError) as e:
        on_ranks(_without, 1, ONE, i)
    print(str(e.value)[-300:])
