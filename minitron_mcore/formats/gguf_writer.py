"""Writing a model as one GGUF file, tensor by tensor."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint import streaming
from minitron_mcore.data.tokenizer import has_tokenizer
from minitron_mcore.formats import gguf_layout, gguf_tokenizer
from minitron_mcore.formats.gguf_layout import ROPE_FACTORS
from minitron_mcore.formats.hf_folder import Weights
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

Q = gguf.GGMLQuantizationType
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Type of the matrices -> general.file_type."""
CHUNK_ROWS = 4096
"""Rows that are converted at a time, so that no matrix is held in fp32."""


def write_file(
    path: Path,
    arch: Architecture,
    weights: Weights | streaming.Reader,
    hf_folder: Path,
    matrices: str,
    about: dict[str, str],
) -> Counter[str]:
    """Write a GGUF file. Holds one parameter at a time.

    Args:
        hf_folder: with the tokenizer; without one the file has none.
        matrices: key of FILE_TYPES. Vectors are F32, as llama.cpp demands; matrices whose rows Q8_0's blocks of 32 do not divide
            are F16.
        about: further metadata, such as general.name.

    Returns:
        Number of tensors of each type.

    Raises:
        UserError: see `gguf_tokenizer.write`, and the source of the weights.
    """
    name = gguf_layout.ARCHITECTURES[arch.family]
    writer = gguf.GGUFWriter(path, name)
    for key, text in about.items():
        writer.add_string(key, text)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[matrices]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, arch)
    if has_tokenizer(hf_folder):
        gguf_tokenizer.write(writer, hf_folder, arch.vocab)
    else:
        writer.add_tokenizer_model("none")
    types, parameters = [], list(parameter_table.parameters(arch))
    if arch.rope_scaling:
        writer.add_tensor(ROPE_FACTORS, gguf_layout.rope_factors(arch).astype(np.float32))
    for parameter in parameters:
        for hf_name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
            types.append(_type(shape, Q[matrices.upper()]))
            block, size = gguf.GGML_QUANT_SIZES[types[-1]]
            key = gguf_layout.tensor_name(name, hf_name, arch.blocks)
            writer.add_tensor_info(key, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, types[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    left, progress = iter(types), process_groups.Progress("export", len(parameters), "parameters")
    if arch.rope_scaling:
        writer.write_tensor_data(gguf_layout.rope_factors(arch).astype(np.float32))
    for done, parameter in enumerate(parameters, 1):
        for hf_name, tensor in zip(parameter.hf, _hf_tensors(parameter, weights), strict=True):
            writer.write_tensor_data(_stored(tensor, name, hf_name, arch.head_dim, next(left)))
        progress.update(done)
    writer.close()
    return Counter(kind.name for kind in types)


def _type(shape: tuple[int, ...], matrices: Q) -> Q:
    if len(shape) == 1:
        return Q.F32
    return matrices if shape[-1] % gguf.GGML_QUANT_SIZES[matrices][0] == 0 else Q.F16


def _add_sizes(writer: gguf.GGUFWriter, arch: Architecture) -> None:
    writer.add_vocab_size(arch.vocab)
    writer.add_context_length(gguf_layout.as_stored(arch).max_positions)
    writer.add_block_count(arch.blocks)
    writer.add_embedding_length(arch.hidden)
    writer.add_feed_forward_length(arch.ffn)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.groups)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(round(arch.head_dim * arch.rotary_fraction))
    writer.add_rope_freq_base(arch.rope_theta)
    if arch.rope_scaling:
        writer.add_rope_scaling_orig_ctx_len(arch.rope_scaling.original_max_positions)
    if arch.traits.norm == "RMSNorm":
        writer.add_layer_norm_rms_eps(arch.norm_eps)
    else:
        writer.add_layer_norm_eps(arch.norm_eps)


def _hf_tensors(parameter: parameter_table.Parameter, weights: Weights | streaming.Reader) -> Iterator[Tensor]:
    """The Hugging Face tensors of a parameter."""
    packed = torch.cat([weights.read(parameter, *part) for part in streaming.shard_slices(parameter)])
    order = np.argsort(parameter_table.packing(parameter.row.axes[0], parameter.arch))
    start = 0
    for rows, *_ in parameter.hf_shapes():
        yield packed[torch.from_numpy(order[start : start + rows])]
        start += rows


def _stored(tensor: Tensor, name: str, hf_name: str, head_dim: int, kind: Q) -> np.ndarray:
    """The tensor as llama.cpp stores it in a file of architecture `name`."""
    rows = np.argsort(gguf_layout.stored_rows(name, hf_name, np.arange(len(tensor)), head_dim))
    offset = gguf_layout.norm_offset(name, hf_name)
    parts = [torch.from_numpy(rows[low : low + CHUNK_ROWS]) for low in range(0, len(rows), CHUNK_ROWS)]
    return np.concatenate([gguf.quantize((tensor[part].float() + offset).numpy(), kind) for part in parts])
