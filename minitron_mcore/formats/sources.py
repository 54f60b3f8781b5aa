"""Sources of models: Hugging Face folders, GGUF files and checkpoints of Megatron-Core's GPTModel."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from minitron_mcore.errors import UserError
from minitron_mcore.formats import gguf_file, gguf_tokenizer, megatron_gpt
from minitron_mcore.formats.hf_folder import HFFolder, Weights
from minitron_mcore.models import architecture
from minitron_mcore.parallel import process_groups


@contextmanager
def open_source(model: str | Path, weights: str | Path, dtype: torch.dtype) -> Iterator[tuple[Path, Weights]]:
    """Open a model (collective).

    Args:
        model: Hugging Face folder or GGUF file. Config and tokenizer of a GGUF file are written to a temporary folder, which is
            removed at the end of the block (the tokenizer on rank 0 only).
        weights: Hugging Face folder, GGUF file or folder of a GPTModel checkpoint. The format is detected.
        dtype: dtype of dequantised GGUF weights; other weights keep their dtype.

    Yields:
        (Hugging Face folder with config and tokenizer, weights)

    Raises:
        UserError: weights or tokenizer cannot be read.
    """
    model, weights = Path(model), Path(weights)
    with tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        with process_groups.raise_on_all_ranks():
            if model.suffix != ".gguf":
                architecture.read_hf(model)
            source = _open(weights, dtype)
            if model.suffix == ".gguf":
                file = (
                    source
                    if isinstance(source, gguf_file.GGUFFile) and model == weights
                    else gguf_file.GGUFFile(model, dtype)
                )
                model = Path(scratch) / model.name  # the name appears in error messages
                model.mkdir()
                versions = {"transformers_version": version("transformers")}  # avoids a warning about the tokenizer
                (model / "config.json").write_text(json.dumps(file.config() | versions, indent=2))
                if process_groups.rank() == 0:
                    gguf_tokenizer.read(file).save_pretrained(model)
        yield model, source


def _open(path: Path, dtype: torch.dtype) -> Weights:
    if path.suffix == ".gguf":
        source: gguf_file.GGUFFile | megatron_gpt.GPTModelFolder = gguf_file.GGUFFile(path, dtype)
    elif (path / megatron_gpt.TRACKER).is_file() or (path / ".metadata").is_file():
        source = megatron_gpt.GPTModelFolder(path)
    else:
        if not path.is_dir():
            raise UserError(
                f"no weights at {path}: give a Hugging Face folder, a GPTModel checkpoint or a .gguf file (model.weights=/path)."
            )
        return HFFolder(path)
    process_groups.log(source.describe())
    return source
