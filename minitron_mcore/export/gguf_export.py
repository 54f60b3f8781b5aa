"""Export of a checkpoint as a GGUF file with its lineage, read back before it counts as written."""

import math
import shutil
from pathlib import Path

import torch

from minitron_mcore.checkpoint import streaming
from minitron_mcore.checkpoint.hf_assets import LICENCE_PATTERNS
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.data.tokenizer import has_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.export import model_card
from minitron_mcore.formats import gguf_layout, gguf_tokenizer, gguf_writer
from minitron_mcore.formats.gguf_file import GGUFFile
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups


def export_file(source: Checkpoint, folder: Path, matrices: str) -> int:
    """Write model-TYPE.gguf, the licence files and minitron/ (see `model_card.complete_folder`) into `folder`, on one process.

    Args:
        matrices: type of the matrices, as in `gguf_writer.FILE_TYPES`.

    Returns:
        Number of parameters.

    Raises:
        UserError: see `gguf_writer.write_file` and `check_file`.
    """
    origin, path = model_card.checkpoint_origin(source), folder / f"model-{matrices}.gguf"
    about = {"general.name": model_card.parent_name(origin)}
    if licence := model_card.parent_card_data(origin).license:
        about["general.license"] = licence
    types = gguf_writer.write_file(path, source.arch, streaming.Reader(source), source.hf, matrices, about)
    check_file(path, source.arch, source.hf)
    for file in (file for pattern in LICENCE_PATTERNS for file in source.hf.glob(pattern)):
        shutil.copyfile(file, folder / file.name)
    model_card.write_record(origin, folder)
    stored = ", ".join(f"{count} tensors {name}" for name, count in types.most_common())
    process_groups.log(f"{path.name} is read back: {stored}")
    return parameter_table.count(source.arch)


def check_file(path: Path, arch: Architecture, hf_folder: Path) -> None:
    """Check that a GGUF file describes `arch`, holds its tensors and gives the token ids of the tokenizer in `hf_folder`.

    Raises:
        UserError: a size or constant differs, a tensor is missing or misshapen, or the tokenizer gives other ids.
    """
    file, expected = GGUFFile(path, torch.float32), gguf_layout.as_stored(arch)
    found = architecture.from_hf(file.config(), path)
    # Of the rope scaling the file has only the factors, which `check` compares.
    names = vars(expected).keys() - {"rope_scaling"}
    if different := sorted(name for name in names if not _equal(getattr(found, name), getattr(expected, name))):
        raise UserError(f"{path} describes another model than was exported: {', '.join(different)} differ.")
    file.check(expected)
    if has_tokenizer(hf_folder):
        gguf_tokenizer.check(file, hf_folder)


def _equal(found: object, expected: object) -> bool:
    """Equality; of floats in fp32."""
    return math.isclose(found, expected, rel_tol=1e-6) if isinstance(expected, float) else found == expected
