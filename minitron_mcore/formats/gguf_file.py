"""llama.cpp's GGUF files as a source of weights, dequantised by rows from a memory map."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from minitron_mcore.errors import UserError
from minitron_mcore.formats import gguf_header, gguf_layout
from minitron_mcore.formats.gguf_layout import ROPE_FACTORS
from minitron_mcore.formats.hf_folder import Weights
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.families import FAMILIES

CHUNK_BYTES = 1 << 25


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
            gguf_header.check(self.path)
            reader = gguf.GGUFReader(path)
        except FileNotFoundError as error:
            raise UserError(f"no GGUF file at {path}: give the right path (model.hf=/path/to/model.gguf).") from error
        except Exception as error:  # a truncated file can raise nearly anything
            raise UserError(f"{path} is not a whole GGUF file ({error}): download it again.") from error
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
        self.name = self.field("general.architecture")
        names = dict.fromkeys(gguf_layout.ARCHITECTURES.values())
        if not isinstance(self.name, str) or self.name not in names:
            raise UserError(f"{path} holds a {self.name} model; supported in GGUF: {', '.join(names)}.")
        if (parts := self.field("split.count") or 1) != 1:
            raise UserError(f"{path} is one of {parts} parts: join them first (llama-gguf-split --merge).")

    def field(self, name: str):
        """A metadata value, or None if the file does not have it. `*` in `name` stands for the architecture's name."""
        field = self.fields.get(name.replace("*", self.name if "*" in name else ""))
        try:
            return None if field is None else field.contents()
        except ValueError as error:  # text that is not UTF-8
            raise UserError(f"{name} in {self.path} cannot be read ({error}): download it again.") from error

    def config(self) -> dict:
        """Content of an equivalent Hugging Face config.json.

        Raises:
            UserError: a size is missing or differs between layers, or the rope scaling is not Llama 3's.
        """
        family = FAMILIES[self.name]
        eps, norm = family.keys["norm_eps"][0], "norm_rms" if family.norm == "RMSNorm" else "norm"
        sizes = {
            "num_hidden_layers": self.field("*.block_count"),
            "hidden_size": self.field("*.embedding_length"),
            "intermediate_size": self.field("*.feed_forward_length"),
            "num_attention_heads": self.field("*.attention.head_count"),
            "max_position_embeddings": self.field("*.context_length"),
            eps: self.field(f"*.attention.layer_{norm}_epsilon"),
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
        head_dim = self.field("*.attention.key_length") or hidden // heads
        rope = {"rope_theta": float(self.field("*.rope.freq_base") or 1e4), **self._rope_scaling()}
        if "rotary_fraction" in family.keys:
            rope["partial_rotary_factor"] = (self.field("*.rope.dimension_count") or head_dim) / head_dim
        return sizes | {
            "architectures": [family.hf_class],
            "model_type": self.name,
            "num_key_value_heads": self.field("*.attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in self.tensors else 0,
            # Converts the float32 9.999999747378752e-06 to 1e-05.
            eps: float(str(np.float32(sizes[eps]))),
            "rope_parameters": rope,
            "hidden_act": family.demands["hidden_act"],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **{f"{role}_token_id": self.field(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")},
        }

    def _rope_scaling(self) -> dict:
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
        factors = gguf_layout.rope_factors(arch)
        if ROPE_FACTORS in self.tensors and not np.allclose(self.tensors[ROPE_FACTORS].data, factors):
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
            stored_rows = gguf_layout.stored_rows(self.name, name, rows[in_tensor] - start, parameter.arch.head_dim)
            norm_offset = gguf_layout.norm_offset(self.name, name)
            for first in range(0, len(in_tensor), step):
                part = gguf.dequantize(tensor.data[stored_rows[first : first + step]], tensor.tensor_type)[:, *columns]
                part = part - norm_offset if norm_offset else part
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
        return gguf_layout.tensor_name(self.name, name, arch.blocks)

    def _tensor(self, name: str, arch: Architecture) -> gguf.ReaderTensor:
        return self.tensors[self._key(name, arch)]
