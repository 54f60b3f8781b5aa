"""All tensors of a checkpoint."""

from pathlib import Path

import torch

from minitron_mcore.checkpoint import safe_metadata
from minitron_mcore.checkpoint.run_folder import open_checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run folder's newest step holds, whole."""
    reader = safe_metadata.Reader(open_checkpoint(folder).step_dir)
    return {
        key: reader.read_slice(key, (0,) * len(entry.size), tuple(entry.size)).clone()
        for key, entry in reader.tensors.items()
    }
