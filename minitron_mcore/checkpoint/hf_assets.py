"""Files of a Hugging Face folder that a checkpoint copies: config, tokenizer, generation settings, licences."""

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
    indices = ("*.index.json", "model-*.json")  # the latter are ModelOpt's, one a file
    return sorted(file for file in files if not any(file.match(pattern) for pattern in indices))


def copy_path(file: Path, source: Path, out_dir: Path) -> Path:
    """Where a file of `source` goes in `out_dir`, in a folder that is there."""
    target = out_dir / file.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
