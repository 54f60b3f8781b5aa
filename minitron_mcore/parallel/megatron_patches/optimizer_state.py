"""The distributed optimizer's state by parameter, which megatron-core offers only in its own checkpoint formats."""

from megatron.core.optimizer import Adam
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

_TORCH_ADAM = Adam.__module__.startswith("torch.")


def parameter_state(optimizer: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """ "param" (fp32 copy, or the weights themselves in fp32), "exp_avg" and "exp_avg_sq" of this rank's range of a parameter.

    Each is flat, [elements of the range]; all are the optimizer's own memory, except after `precision_aware_optimizer`, whose
    states are unscaled copies.
    """
    state: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    state.pop("step", None)  # torch's Adam keeps one a parameter; the parameter groups have it too
    return state


def set_parameter_state(optimizer: DistributedOptimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Set some of a parameter's state; entries that `state` lacks stay as they are."""
    whole = parameter_state(optimizer, parameter) | state
    optimizer._set_main_param_and_optimizer_states(parameter, {"step": None, **whole})


def allocate_state(optimizer: DistributedOptimizer) -> None:
    """Create the state of an optimizer that has made no step.

    torch's Adam creates it in its first step. This one changes no weights: gradients and learning rate are zero.
    """
    if _TORCH_ADAM:
        optimizer._init_optimizer_states_with_dummy_values()
    else:
        optimizer.load_state_dict(optimizer.state_dict())


def separate_step_counters(optimizer: DistributedOptimizer) -> None:
    """Give each parameter its own step counter after `load_state_dict`, which sets one tensor for all: each would advance it."""
    if _TORCH_ADAM:
        for entry in optimizer.optimizer.state.values():
            entry["step"] = entry["step"].clone()
