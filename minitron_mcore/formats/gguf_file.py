"""llama.cpp's GGUF files as a source of weights, dequantised by rows from a memory map."""

import functools
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from minitron_mcore.errors import UserError
from minitron_mcore.formats.hf_folder import Weights
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture

HF_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""general.architecture -> class name in transformers."""
ROPE_FACTORS = "rope_freqs.weight"
CHUNK_BYTES = 1 << 25
MAX_FIELDS = MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 20
"""Of all arrays together. Llama 3's tokens, types and merges have half as many."""
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> bytes per value."""


class GGUFFile(Weights):
    """A GGUF file of a supported architecture. Tensors are dequantised to `dtype`.

    Raises:
        UserError: not a complete GGUF file, or an unsupported architecture, or one part of a split file.
    """

    kind = "gguf"

    def __init__(self, path: Path, dtype: torch.dtype):
        super().__init__()
        self.path, self.target = Path(path), dtype
        try:
            _check_header(self.path)
            reader = gguf.GGUFReader(path)
        except FileNotFoundError as error:
            raise UserError(f"no GGUF file at {path}: give the right path (model.hf=/path/to/model.gguf).") from error
        except Exception as error:  # a truncated file can raise nearly anything
            raise UserError(f"{path} is not a whole GGUF file ({error}): download it again.") from error
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
        self.name = self.field("general.architecture")
        if not isinstance(self.name, str) or self.name not in HF_CLASSES:
            raise UserError(f"{path} holds a {self.name} model; supported in GGUF: {', '.join(HF_CLASSES)}.")
        if (parts := self.field("split.count") or 1) != 1:
            raise UserError(f"{path} is one of {parts} parts: join them first (llama-gguf-split --merge).")

    def field(self, name: str):
        """A metadata value, or None if the file does not have it. `*` in `name` stands for the architecture's name."""
        field = self.fields.get(name.replace("*", self.name if "*" in name else ""))
        try:
            return None if field is None else field.contents()
        except ValueError as error:  # text that is not UTF-8
            raise UserError(f"{name} in {self.path} cannot be read ({error}): download it again.") from error

    def config(self) -> dict[str, Any]:
        """Content of an equivalent Hugging Face config.json.

        Raises:
            UserError: a size is missing or differs between layers, or the rope scaling is not Llama 3's.
        """
        sizes = {
            "num_hidden_layers": self.field("*.block_count"),
            "hidden_size": self.field("*.embedding_length"),
            "intermediate_size": self.field("*.feed_forward_length"),
            "num_attention_heads": self.field("*.attention.head_count"),
            "max_position_embeddings": self.field("*.context_length"),
            "rms_norm_eps": self.field("*.attention.layer_norm_rms_epsilon"),
        }
        for key, value in sizes.items():
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(
                    f"{self.path} gives {key} as {value}: expected one positive number, the same for all layers."
                )
        if sizes["num_hidden_layers"] > len(self.tensors):
            raise UserError(
                f"{self.path} claims {sizes['num_hidden_layers']} layers, but has {len(self.tensors)} tensors."
            )
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim = self.field("*.attention.key_length") or self.field("*.rope.dimension_count") or hidden // heads
        return sizes | {
            "architectures": [HF_CLASSES[self.name]],
            "model_type": self.name,
            "num_key_value_heads": self.field("*.attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in self.tensors else 0,
            # Converts the float32 9.999999747378752e-06 to 1e-05.
            "rms_norm_eps": float(str(np.float32(sizes["rms_norm_eps"]))),
            "rope_parameters": {"rope_theta": float(self.field("*.rope.freq_base") or 1e4), **self._rope_scaling()},
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **{f"{role}_token_id": self.field(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")},
        }

    def _rope_scaling(self) -> dict[str, Any]:
        """Llama 3's constants. The file has only the resulting factors, which `check` compares with them."""
        if (kind := self.field("*.rope.scaling.type") or "none") != "none":
            raise UserError(f"{self.path} has rope scaling {kind!r}; supported in GGUF: none, Llama 3's.")
        if ROPE_FACTORS not in self.tensors:
            return {"rope_type": "default"}
        return {
            "rope_type": "llama3",
            "factor": float(self.tensors[ROPE_FACTORS].data.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": self.field("*.rope.scaling.original_context_length") or 8192,
        }

    def check(self, arch: Architecture) -> None:
        expected = {ROPE_FACTORS}
        for parameter in parameter_table.parameters(arch):
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
                key = self._key(name, arch)
                expected.add(key)
                if key not in self.tensors:
                    raise UserError(f"tensor {key or name} is missing from {self.path}: its config requires it.")
                stored_shape = tuple(int(n) for n in reversed(self.tensors[key].shape))
                if stored_shape != shape:
                    raise UserError(
                        f"tensor {key} in {self.path} has shape {stored_shape}, but its config requires {shape}."
                    )
                if len(shape) == 1 and self.tensors[key].data.shape != shape:
                    raise UserError(f"tensor {key} in {self.path} is a vector in blocks: expected F32 or F16.")
        if unexpected := sorted(self.tensors.keys() - expected):
            raise UserError(
                f"{self.path} holds {unexpected[0]}, which a {arch.family} model does not have: it is another model's."
            )
        if ROPE_FACTORS in self.tensors and not np.allclose(self.tensors[ROPE_FACTORS].data, _rope_factors(arch)):
            raise UserError(
                f"{ROPE_FACTORS} in {self.path} is not what {arch.rope_scaling or 'no rope scaling'} makes: give the model's "
                "Hugging Face config and tokenizer (model.hf=/path/to/folder) beside model.weights=/path/to/file.gguf."
            )
        for tensor in {tensor.tensor_type: tensor for tensor in self.tensors.values()}.values():
            try:
                gguf.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise UserError(
                    f"{tensor.name} in {self.path} is stored as {tensor.tensor_type.name}, which the gguf package cannot "
                    "dequantise: convert it with llama.cpp first."
                ) from error

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        return self.target

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `Weights.read`. Needs about CHUNK_BYTES of memory besides the result."""
        rows = parameter_table.packing(parameter.row.axes[0], parameter.arch)[offset[0] : offset[0] + shape[0]]
        columns = tuple(slice(low, low + count) for low, count in zip(offset[1:], shape[1:], strict=True))
        out, start = torch.empty(shape, dtype=self.target), 0
        step = max(1, CHUNK_BYTES // (4 * math.prod(parameter.shape[1:])))
        for name, (count, *_) in zip(parameter.hf, parameter.hf_shapes(), strict=True):
            in_tensor = np.flatnonzero((rows >= start) & (rows < start + count))
            tensor = self._tensor(name, parameter.arch)
            stored_rows = self._stored_rows(name, rows[in_tensor] - start, parameter.arch)
            for first in range(0, len(in_tensor), step):
                part = gguf.dequantize(tensor.data[stored_rows[first : first + step]], tensor.tensor_type)[:, *columns]
                out[torch.from_numpy(in_tensor[first : first + step])] = torch.from_numpy(part).to(self.target)
            start += count
        return out

    def stored_tensors(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        for name in parameter.hf:  # the weights also depend on the dtype
            yield f"{name} {self.target}", [self._tensor(name, parameter.arch).data]

    def describe(self) -> str:
        """One line with the stored and the dequantised dtypes."""
        types = Counter(tensor.tensor_type.name for tensor in self.tensors.values())
        stored = ", ".join(f"{name} ({n} tensors)" for name, n in types.most_common())
        return f"{self.path.name}: dequantised to {str(self.target).removeprefix('torch.')} from {stored}"

    def _key(self, name: str, arch: Architecture) -> str:
        """Name in the file of a Hugging Face tensor."""
        return _names(self.name, arch.blocks).get_name(name, try_suffixes=(".weight", ".bias"))

    def _tensor(self, name: str, arch: Architecture) -> gguf.ReaderTensor:
        return self.tensors[self._key(name, arch)]

    def _stored_rows(self, name: str, rows: np.ndarray, arch: Architecture) -> np.ndarray:
        """Positions of rows in the file. For Llama, llama.cpp interleaves the two halves of each query and key head."""
        if self.name != "llama" or name.split(".")[-2] not in ("q_proj", "k_proj"):
            return rows
        head, within = np.divmod(rows, arch.head_dim)
        half, index = np.divmod(within, arch.head_dim // 2)
        return head * arch.head_dim + 2 * index + half


@functools.cache
def _names(architecture: str, blocks: int) -> gguf.TensorNameMap:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def _rope_factors(arch: Architecture) -> np.ndarray:
    """Factor by which each rotary wavelength is scaled, [head_dim / 2]; 1 without rope scaling."""
    rope = arch.rope_scaling
    wavelength = 2 * np.pi * arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    if rope is None:
        return np.ones_like(wavelength)
    turns = rope.original_max_positions / wavelength
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def _check_header(path: Path) -> None:
    """Check the counts in a header against the file's size and the limits above: the gguf package creates objects for all array
    elements that a header claims, even beyond the end of the file. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        ValueError, struct.error: a count exceeds the file or a limit, or a value type is unknown.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        tensors, fields = struct.unpack_from(f"{order}QQ", data, 8)
        _check_limit("tensors", tensors, MAX_TENSORS)
        _check_limit("fields", fields, MAX_FIELDS)
        position, elements = 24, 0
        for _ in range(fields):
            position = _end_of_string(data, position, order)
            (kind,), count, position = struct.unpack_from(f"{order}I", data, position), 1, position + 4
            if kind == ARRAY:
                (kind, count), position = struct.unpack_from(f"{order}IQ", data, position), position + 12
                elements += count
                _check_limit("array elements", elements, MAX_ELEMENTS)
            if kind == STRING:
                for _ in range(count):
                    position = _end_of_string(data, position, order)
            elif kind in SIZES:
                position += count * SIZES[kind]
            else:
                raise ValueError(f"a field has the type {kind}")
            if position > len(data):
                raise ValueError(f"a field reaches to byte {position} of {len(data)}")


def _end_of_string(data: mmap.mmap, position: int, order: str) -> int:
    return position + 8 + struct.unpack_from(f"{order}Q", data, position)[0]


def _check_limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"it claims {count:,} {what}, at most {limit:,} are read")
