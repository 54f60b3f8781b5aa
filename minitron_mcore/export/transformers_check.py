"""Exported folders, loaded by transformers as a user would load them."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minitron_mcore.data.tokenizer import check_vocabulary, has_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture, hf_config, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reading import first_line, read_json


def load(folder: str | Path, **placement: Any) -> PreTrainedModel:
    """Load a Hugging Face folder with transformers: no remote code, safetensors only, no network.

    Args:
        placement: `dtype` or `device_map`. With device_map="meta" only the headers of the weight files are read.

    Raises:
        UserError: transformers cannot load the folder, or the files have missing or misshapen tensors.
    """
    config = Path(folder) / "config.json"
    if config.is_file():
        hf_config.check_counts(read_json(config, "download it again"))
    if placement.get("device_map") != "meta":
        # transformers allocates a parameter in config.json's size if the files have it in another size.
        load(folder, **placement | {"device_map": "meta"})
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the problems that it would warn of are errors below
    model: PreTrainedModel
    loading: dict[str, Any]
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair by output_loading_info
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in `loading`
            output_loading_info=True,
            **placement,
        )
    except Exception as error:  # values of any type in config.json make transformers raise nearly anything
        raise UserError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers initialises missing tensors at random.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            name = sorted(map(str, loading[problem]))[0]
            raise UserError(f"{folder}: the weights don't fit its config.json ({problem}: {name} and maybe more).")
    return model


def check_folder(folder: str | Path, arch: Architecture) -> str:
    """Check that transformers loads an exported folder as the exported model, without reading the weights' values.

    Args:
        arch: of the exported checkpoint.

    Returns:
        One line for a person: model class, number of parameters, size of the tokenizer.

    Raises:
        UserError: transformers cannot load model or tokenizer, or the model has another architecture or parameter count.
    """
    folder = Path(folder)
    exported, _ = architecture.read_hf(folder)
    if different := [name for name, value in vars(arch).items() if getattr(exported, name) != value]:
        raise UserError(
            f"{folder}/config.json describes another model than was exported: {', '.join(different)} differ."
        )
    HFFolder(folder).check(arch)
    model, expected = load(folder, device_map="meta"), parameter_table.count(arch)
    if model.num_parameters() != expected:
        raise UserError(f"transformers finds {model.num_parameters():,} parameters in {folder}, not {expected:,}.")
    return f"{type(model).__name__}, {expected:,} parameters, {_check_tokenizer(folder)}"


def _check_tokenizer(folder: Path) -> str:
    if not has_tokenizer(folder):
        return "no tokenizer: the source came with none"
    check_vocabulary(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UserError(f"transformers cannot load the tokenizer in {folder}: {first_line(error)}") from error
    return f"tokenizer of {len(tokenizer):,} tokens"
