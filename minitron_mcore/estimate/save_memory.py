"""What writing a checkpoint takes of a host. No torch import."""

import math

from minitron_mcore.checkpoint import disk
from minitron_mcore.config.settings import Device
from minitron_mcore.estimate.memory import Setting, local_elements, model_states
from minitron_mcore.models import sharding
from minitron_mcore.models.architecture import Architecture


def saving(arch: Architecture, setting: Setting, stage: int, distributed: bool, background: bool = False) -> int:
    """Bytes of host memory that writing a checkpoint needs on a rank beside those of training: none on the CPU. On CUDA each
    thread copies the piece that it writes (`streaming.save_state`); of an optimizer whose state is not shared out, pieces are
    whole tensors. A save in the background copies all that the rank writes (`streaming.BackgroundSave`): its share of the weights
    and of the optimizer's state."""
    if background:
        held, copies = model_states(arch, setting, stage, distributed), setting.replicas * setting.parallel.context
        return math.ceil(held["weights"] / copies + held["optimizer"] / (1 if distributed else copies))
    if setting.device == Device.cpu:
        return 0
    elements = disk.PIECE_ELEMENTS
    if not distributed:
        tensors = sharding.parameters_on_rank(
            arch, setting.parallel, stage, range(arch.experts // setting.parallel.expert)
        )
        elements = max(local_elements(parameter, setting.parallel.tensor) for parameter in tensors)
    return disk.THREADS * 4 * elements
