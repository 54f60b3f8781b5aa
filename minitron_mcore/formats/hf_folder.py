"""Reading and writing Hugging Face folders in slices, without a whole model in memory."""

import contextlib
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from minitron_mcore.checkpoint import disk
from minitron_mcore.checkpoint.hf_assets import copy_path, hf_asset_files, tensor_bytes
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.prefetch import run_ahead
from minitron_mcore.reading import open_tensors, read_json

CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
MAX_FILE_BYTES = 5 * 10**9
HASH_ELEMENTS = 8 << 20


type Rows = Callable[[parameter_table.Parameter], Iterable[Callable[[], Tensor]]]
"""Parameter -> functions whose results, concatenated, are all rows of the parameter in packed order."""


class Weights(ABC):
    """A source of one model's weights, read in slices of the parameter table's tensors."""

    kind: str
    """Name of the format, which becomes the parent's role in the lineage."""
    path: Path

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @abstractmethod
    def check(self, arch: Architecture) -> None:
        """Check that the source holds exactly the tensors of `arch`.

        Raises:
            UserError: a tensor is missing or unexpected, or has another shape or an unsupported dtype.
        """

    @abstractmethod
    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype: ...

    @abstractmethod
    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The slice of a parameter at `offset` in its global tensor, in the packed row order of the parameter table."""

    @abstractmethod
    def stored_tensors(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        """Name and bytes (in parts) of each stored tensor that a parameter consists of."""

    def hash(self, parameter: parameter_table.Parameter) -> None:
        """Hash a parameter's stored tensors if that was not done. Called just before they are read, which caches them."""
        for name, parts in self.stored_tensors(parameter):
            if name not in self.hashes:
                sha = hashlib.sha256()
                for part in parts:
                    sha.update(part)
                self.hashes[name] = sha.hexdigest()

    def fingerprint(self, arch: Architecture) -> str:
        """16 hex digits that identify the weights, however they are split into files: SHA-256 over the tensors' hashes.

        Collective if torch.distributed is initialised: ranks share their hashes. Tensors that no rank has hashed are hashed now.
        """
        every = process_groups.from_all_ranks(self.hashes)
        self.hashes = {name: digest for part in every for name, digest in part.items()}
        for parameter in parameter_table.parameters(arch):
            self.hash(parameter)
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()[:16]


class HFFolder(Weights):
    """Weights of a Hugging Face folder, from the files that transformers uses: model.safetensors, else those in the index.

    A file is mapped for each read and unmapped with the last tensor that views it.

    Raises:
        UserError: no safetensors file; a truncated file; an index that is damaged, names a missing file, or does not name an
            existing model.safetensors; an adapter, which transformers would apply to the weights.
    """

    kind = "huggingface"

    def __init__(self, path: Path):
        super().__init__()
        names = _files(path)
        self.path = path
        self.file_of: dict[str, Path] = {}
        for file in (path / name for name in names):
            with open_tensors(file, "pt", "download it again") as tensors:
                keys = tensors.keys()
            if duplicates := sorted(self.file_of.keys() & set(keys)):
                raise UserError(
                    f"{duplicates[0]} is in both {self.file_of[duplicates[0]].name} and {file.name} of {path}: remove one."
                )
            self.file_of |= dict.fromkeys(keys, file)

    def slice(self, name: str) -> Any:
        """The stored tensor as a lazily read safetensors slice."""
        return safe_open(self.file_of[name], "pt").get_slice(name)

    def check(self, arch: Architecture) -> None:
        for parameter in parameter_table.parameters(arch):
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
                if name not in self.file_of:
                    raise UserError(f"tensor {name} is missing from {self.path}: its config.json requires it.")
                stored = self.slice(name)
                if (stored_shape := tuple(stored.get_shape())) != shape:
                    raise UserError(f"tensor {name} has shape {stored_shape}, but config.json requires {shape}.")
                if stored.get_dtype() not in CODES.values():
                    raise UserError(
                        f"tensor {name} is stored as {stored.get_dtype()}: expected {', '.join(CODES.values())} (dequantise the "
                        "model first)."
                    )
        expected = {name for parameter in parameter_table.parameters(arch) for name in parameter.hf}
        # Old Llama folders store the rotary frequencies, and some tied models the head. Both are redundant.
        redundant = {"lm_head.weight"} if arch.tied else set()
        if redundant & self.file_of.keys() and not self._equal("lm_head.weight", "model.embed_tokens.weight"):
            raise UserError(
                f"lm_head.weight in {self.path} differs from model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings: true: set it to false to keep both, as transformers does, or remove lm_head.weight."
            )
        unexpected = sorted(
            n for n in self.file_of.keys() - expected - redundant if not n.endswith("rotary_emb.inv_freq")
        )
        if unexpected:
            raise UserError(
                f"{self.path} holds {len(unexpected)} tensors that a {arch.family} model of its config.json does not have, "
                f"the first {unexpected[0]}: is the config another model's?"
            )

    def _equal(self, *names: str) -> bool:
        """Whether two stored matrices are equal. Compares blocks of rows."""
        one, two = (self.slice(name) for name in names)
        if one.get_shape() != two.get_shape():
            return False
        rows, columns = one.get_shape()
        step = max(1, HASH_ELEMENTS // columns)
        return all(bool((one[i : i + step].float() == two[i : i + step].float()).all()) for i in range(0, rows, step))

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        return self.slice(parameter.hf[0])[:1].dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `Weights.read`. A view of the mapped file if the rows are stored contiguously."""
        rows = parameter_table.packing(parameter.row.axes[0], parameter.arch)[offset[0] : offset[0] + shape[0]]
        columns = [slice(low, low + count) for low, count in zip(offset[1:], shape[1:], strict=True)]
        parts, start = [], 0
        local = np.empty(len(rows), dtype=np.int64)  # position of each row in the concatenation of the parts
        filled = 0
        for name, (count, *_) in zip(parameter.hf, parameter.hf_shapes(), strict=True):
            in_tensor = (rows >= start) & (rows < start + count)
            if in_tensor.any():
                first, last = int(rows[in_tensor].min()) - start, int(rows[in_tensor].max()) - start + 1
                parts.append(self.slice(name)[slice(first, last), *columns])
                local[in_tensor] = rows[in_tensor] - start - first + filled
                filled += last - first
            start += count
        rows_read = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows_read if np.array_equal(local, np.arange(len(rows_read))) else rows_read[torch.from_numpy(local)]

    def stored_tensors(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        for name in parameter.hf:
            length, *rest = self.slice(name).get_shape()
            step = max(1, HASH_ELEMENTS // int(np.prod(rest)))
            yield name, (tensor_bytes(self.slice(name)[low : low + step]) for low in range(0, length, step))


def _files(path: Path) -> list[str]:
    """Names of the weights files (see `HFFolder`)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if (adapter := path / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is an adapter, which is not applied here: merge it into the weights and remove it.")
    if not index.is_file():
        if not single.is_file():
            raise UserError(
                f"{path} holds no model.safetensors weights and no index of them: download the model with its weights, or "
                "convert them."
            )
        return [single.name]
    weight_map = (content := read_json(index, "download it again")).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise UserError(f"{index} has no weight_map and metadata, as an index has: download it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the file {name!r}: expected *.safetensors files beside it.")
        if not (path / name).is_file():
            raise UserError(f"{index} names {name}, which is not in {path}: download the model again.")
    if single.is_file() and single.name not in weight_map.values():
        raise UserError(
            f"{path} holds model.safetensors, which transformers reads, and another model's index beside it: remove "
            f"{single.name}, or {index.name} and its files."
        )
    return sorted(set(weight_map.values()))


class Writer:
    """Writes a Hugging Face folder in pieces: safetensors files of at most MAX_FILE_BYTES, their index, config and tokenizer.

    Args:
        out_dir: run folder. Until `finish`, weights files have the suffix .part.
        dtypes: parameter -> dtype of its tensors in the folder, in the parameter table's order.
    """

    def __init__(self, out_dir: Path, arch: Architecture, dtypes: dict[parameter_table.Parameter, torch.dtype]):
        self.out_dir, self.arch, self.dtypes = out_dir, arch, dtypes
        self.tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for parameter, dtype in dtypes.items()
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True)
        }
        self.shards = split_state_dict_into_shards_factory(
            self.tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=MAX_FILE_BYTES,
        )

    def write(self, label: str, rows: Rows) -> None:
        """Write the weights.

        Args:
            label: of the progress.
            rows: their functions are called in threads, ahead of writing.
        """
        jobs = list(self._jobs(rows))
        progress = process_groups.Progress(label, len(jobs), "pieces")
        with contextlib.ExitStack() as stack:
            regions = self._regions(stack)
            free = 0
            for done, data in enumerate(run_ahead(jobs), 1):
                while len(data):
                    if not free:
                        file, start, free = next(regions)
                        file.seek(start)
                    file.write(data[:free])
                    free, data = max(0, free - len(data)), data[free:]
                progress.update(done)

    def _regions(self, stack: contextlib.ExitStack) -> Iterator[tuple[disk.NewFile, int, int]]:
        """(file, first byte, number of bytes) of each tensor, in order. Files are opened on `stack`, with their headers."""
        places: dict[str, tuple[disk.NewFile, int]] = {}
        for name, tensors in self.shards.filename_to_tensors.items():
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for key in tensors:
                tensor, start = self.tensors[key], end
                end += tensor.nbytes
                header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # tensors start aligned
            file = stack.enter_context(disk.NewFile(self._part(name)))
            file.write(len(text).to_bytes(8, "little") + text)
            places |= {key: (file, 8 + len(text) + header[key]["data_offsets"][0]) for key in tensors}
        return ((*places[key], tensor.nbytes) for key, tensor in self.tensors.items())

    def _jobs(self, rows: Rows) -> Iterator[Callable[[], np.ndarray]]:
        """Functions that return the bytes of the tensors in order: one per piece, or one per parameter if its packed rows are
        not in the order of its Hugging Face tensors."""
        for parameter, dtype in self.dtypes.items():
            order = np.argsort(parameter_table.packing(parameter.row.axes[0], self.arch))
            if np.array_equal(order, np.arange(len(order))):
                yield from (partial(_bytes, [make], dtype) for make in rows(parameter))
            else:
                yield partial(_bytes, rows(parameter), dtype, torch.from_numpy(order))

    def finish(self, source: Path) -> None:
        """Rename the weights files, and add their index and the other files of `source`, a Hugging Face folder. Config last."""
        for name in self.shards.filename_to_tensors:
            self._part(name).rename(self.out_dir / name)
        if self.shards.is_sharded:
            index = {"metadata": self.shards.metadata, "weight_map": self.shards.tensor_to_filename}
            (self.out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        write_config(source, self.arch, self.out_dir, list(self.dtypes.values())[-1])

    def _part(self, name: str) -> Path:
        return self.out_dir / f"{name}.part"


def _bytes(makes: Iterable[Callable[[], Tensor]], dtype: torch.dtype, order: Tensor | None = None) -> np.ndarray:
    parts = [make() for make in makes]
    rows_read = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor_bytes((rows_read if order is None else rows_read[order]).to(dtype))


def write_config(source: Path, arch: Architecture, out_dir: Path, dtype: torch.dtype) -> None:
    """Copy the files other than weights of `source`, a Hugging Face folder. config.json is last and has the sizes of `arch`."""
    for file in hf_asset_files(source):
        target = copy_path(file, source, out_dir)
        if file.name == "tokenizer_config.json":
            write_tokenizer_config(file, target)
        elif file.name not in ("config.json", "README.md"):  # the model card describes the parent
            shutil.copyfile(file, target)
    config = architecture.to_hf(
        arch, read_json(source / "config.json", "download it again"), str(dtype).removeprefix("torch.")
    )
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer_config(source: Path, target: Path) -> None:
    """Write a tokenizer_config.json that transformers 4 and 5 read alike. An unaffected file is copied.

    transformers 5 writes a class name and a list of special tokens that transformers 4 cannot read, but reads the old forms.
    `auto_map` is removed, because the code that it names is not exported.
    """
    config = read_json(source, "download it again")
    portable = {key: value for key, value in config.items() if key != "auto_map"}
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(portable.get("extra_special_tokens"), list):
        tokens = portable.pop("extra_special_tokens")
        portable["additional_special_tokens"] = [*portable.get("additional_special_tokens", []), *tokens]
    if portable == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(portable, indent=2) + "\n")
