"""What writing a checkpoint takes of a host. No torch import."""

import math

from minitron_mcore.checkpoint import disk
from minitron_mcore.config.settings import Device
from minitron_mcore.estimate.memory import Setting, local_elements, model_states
from minitron_mcore.models import sharding
from minitron_mcore.models.architecture import Architecture


def saving(arch: Architecture, setting: Setting, stage: int, distributed: bool, background: bool = False) -> int:
    """Bytes of host memory that writing a checkpoint takes on a rank, beside what training holds: each thread's file has a buffer,
    and on CUDA a copy of the piece that goes into it (`stream.save_state`). Of an optimizer whose state is not shared out, pieces
    are whole tensors. In the background there is a copy of all that the rank writes instead (`stream.BackgroundSave`): its share
    of the weights and of the optimizer's state."""
    buffers = disk.THREADS * disk.BLOCK
    if background:
        held, copies = model_states(arch, setting, stage, distributed), setting.replicas * setting.parallel.context
        return buffers + math.ceil(held["weights"] / copies + held["optimizer"] / (1 if distributed else copies))
    if setting.device == Device.cpu:
        return buffers
    elements = disk.PIECE_ELEMENTS
    if not distributed:
        tensors = sharding.parameters_on_rank(
            arch, setting.parallel, stage, range(arch.experts // setting.parallel.expert)
        )
        elements = max(local_elements(parameter, setting.parallel.tensor) for parameter in tensors)
    return buffers + disk.THREADS * 4 * elements
