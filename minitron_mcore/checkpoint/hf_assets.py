"""Files of a Hugging Face folder that are copied into checkpoints: config, tokenizer, generation settings, licences."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*")


ASSET_PATTERNS = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    *LICENCE_PATTERNS,
)


def hf_asset_files(path: Path) -> list[Path]:
    """Config, tokenizer and generation files of a Hugging Face folder."""
    files = {file for pattern in ASSET_PATTERNS for file in path.glob(pattern)}
    indices = ("*.index.json", "model-*.json")  # the latter are ModelOpt's, one per weights file
    return sorted(file for file in files if not any(file.match(pattern) for pattern in indices))


def copy_path(file: Path, source: Path, out_dir: Path) -> Path:
    """Path in `out_dir` of the copy of a file below `source`. Its folder is created."""
    target = out_dir / file.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, [num_bytes] uint8; a view if the tensor is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
