"""The layout and sizes of a run that estimates need beside the models. No torch import."""

from dataclasses import dataclass, field

from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import Device, Dtype, ParallelConfig


@dataclass(frozen=True)
class Setting:
    """Layout, number of student ranks (`world`), dtype, batch sizes, device and memory options of a run."""

    parallel: ParallelConfig
    world: int
    dtype: Dtype
    micro_batch: int
    sequence_length: int
    device: Device = Device.cuda
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    document_mask: bool = False
    """Attention stays within documents, with torch's attention on any device (`data.document_mask`)."""

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.dtype == Dtype.bf16 else 4

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.world // max(1, self.parallel.tensor * self.parallel.pipeline * self.parallel.context))

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on a context-parallel rank."""
        return self.micro_batch * self.sequence_length // self.parallel.context

    @property
    def sequence_shards(self) -> int:
        """Ranks that share these tokens outside the matrices (sequence parallelism)."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def rank_tokens(self) -> float:
        """Rows S_r x B of a rank's hidden states of a micro-batch."""
        return self.tokens / self.sequence_shards

    @property
    def last(self) -> int:
        """The last pipeline stage."""
        return self.parallel.pipeline - 1
