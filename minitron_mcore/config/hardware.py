"""The machine that a dry run plans for. No torch import."""

from dataclasses import dataclass

from minitron_mcore.config.settings import Device


@dataclass
class DryConfig:
    """What a dry run (`dry_run=true`) plans for."""

    gpus: int | None = None
    """Processes of the run, one a GPU; null takes torchrun's, or as few as the layout needs."""
    device: Device = Device.cuda
    memory: float = 75.0
    """GiB that a rank's tensors may take: an H100's 80 GB less CUDA's context and NCCL's buffers."""
    peak_tflops: float = 989.0
    """Of one GPU, dense: an H100's in bf16."""
    mfu: float = 0.4
    """Share of the peak that the run is expected to reach with the operations that the model needs."""
    advise: bool = False
    """Of a stage that trains, also compare all layouts of `gpus` GPUs (see `plan.advise`)."""
    gpus_per_node: int = 8
    """Tensor- and context-parallel ranks stay within a node."""
    nvlink_gbs: float = 350.0
    """10^9 bytes a second that a GPU sends to others of its node: what collectives reach of an H100's 450."""
    network_gbs: float = 45.0
    """The same to other nodes: of a 400 Gb/s adapter a GPU, 50."""
    json: str | None = None
    """File to write the figures to."""
