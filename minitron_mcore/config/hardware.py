"""The config section `dry`: the machine that a dry run assumes. No torch import."""

from dataclasses import dataclass

from minitron_mcore.config.settings import Device


@dataclass
class DryConfig:
    """The machine that a dry run (`dry_run=true`) assumes. The defaults describe H100 GPUs of 80 GB."""

    gpus: int | None = None
    """Processes of the run, one a GPU; null is torchrun's number, or the least that the layout needs."""
    device: Device = Device.cuda
    """Kind of processor."""
    memory: float = 75.0
    """GiB available to a rank's tensors: the card's less CUDA's context and NCCL's buffers."""
    peak_tflops: float = 989.0
    """Peak of one GPU in dense bf16 products, in 10^12 operations a second."""
    mfu: float = 0.4
    """Expected model FLOPs utilisation: the share of the peak that the model's own operations reach."""
    advise: bool = False
    """Compare all layouts of `gpus` GPUs too, for a stage that trains (see `estimate.step_time`)."""
    gpus_per_node: int = 8
    """GPUs of a node; tensor- and context-parallel ranks stay within one."""
    nvlink_gbs: float = 350.0
    """Bandwidth of a GPU to others of its node, in 10^9 bytes a second: what collectives reach of an H100's 450."""
    network_gbs: float = 45.0
    """Bandwidth of a GPU to other nodes, in 10^9 bytes a second: of a 400 Gb/s adapter's 50."""
    disk_gbs: float = 1.0
    """Bandwidth of all processes together to the disk of `out_dir`, in 10^9 bytes a second, for the time of a checkpoint."""
    json: str | None = None
    """File for the figures; null only prints them."""
