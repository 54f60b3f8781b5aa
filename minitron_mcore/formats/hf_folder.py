"""Hugging Face folders: safetensors read as slices and written from front to back, without a model in memory."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from minitron_mcore.checkpoint import disk
from minitron_mcore.checkpoint.hf_assets import copy_path, hf_asset_files, tensor_bytes
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, hf_config, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
MAX_FILE_BYTES = 5 * 10**9
HASH_ELEMENTS = 8 << 20


class Weights(ABC):
    """One model's weights where another tool left them, read box by box in the table's positions."""

    kind: str
    path: Path

    def __init__(self):
        self.hashes = {}

    @abstractmethod
    def check(self, arch: Architecture) -> None:
        """Refuse a tensor that is missing, too many, or of another shape or dtype, by name."""

    @abstractmethod
    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype: ...

    @abstractmethod
    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box of a parameter."""

    @abstractmethod
    def stored(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        """Name and bytes, in parts, of each stored tensor behind a parameter."""

    def hash(self, parameter: parameter_table.Parameter) -> None:
        """Hash a parameter's tensors, once; just before they are read, so that the disk is read once."""
        for name, parts in self.stored(parameter):
            if name not in self.hashes:
                sha = hashlib.sha256()
                for part in parts:
                    sha.update(part)
                self.hashes[name] = sha.hexdigest()

    def fingerprint(self, arch: Architecture) -> str:
        """Names the weights, however they are spread over files: sha256 over the hashes of the architecture's tensors.

        Collective where there are groups: a rank gives what it has hashed; what none has, all hash now.
        """
        every = [self.hashes]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, self.hashes)
        self.hashes = {name: digest for part in every for name, digest in part.items()}
        for parameter in parameter_table.parameters(arch):
            self.hash(parameter)
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()[:16]


class HFFolder(Weights):
    """The weights of a Hugging Face folder.

    A file is mapped only for as long as what was read from it lives, so memory shows what is in use and no more.

    The files are those that transformers takes: model.safetensors, or where it isn't there what the index names.

    Raises:
        UserError: no safetensors, a file that is cut short, an index that is damaged, names a missing file, or names others than a
            model.safetensors beside it, an adapter (transformers would add it to the weights).
    """

    kind = "huggingface"

    def __init__(self, path: Path):
        super().__init__()
        names = _files(path)
        self.path, self.where = path, {}
        for file in (path / name for name in names):
            try:
                found = safe_open(file, "pt").keys()
            except Exception as error:  # safetensors raises its own type for a cut or foreign file
                raise UserError(f"{file} is not a whole safetensors file ({error}): download it again.") from error
            if twice := sorted(self.where.keys() & set(found)):
                raise UserError(
                    f"{twice[0]} is in both {self.where[twice[0]].name} and {file.name} of {path}: remove one."
                )
            self.where |= dict.fromkeys(found, file)

    def slice(self, name: str):
        """A tensor to take slices of."""
        return safe_open(self.where[name], "pt").get_slice(name)

    def check(self, arch: Architecture) -> None:
        for parameter in parameter_table.parameters(arch):
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
                if name not in self.where:
                    raise UserError(f"tensor {name} is missing from {self.path}: its config.json asks for it.")
                stored = self.slice(name)
                if (found := tuple(stored.get_shape())) != shape:
                    raise UserError(f"tensor {name} has shape {found}, but config.json asks for {shape}.")
                if stored.get_dtype() not in CODES.values():
                    raise UserError(
                        f"tensor {name} is stored as {stored.get_dtype()}: expected {', '.join(CODES.values())} (dequantise the "
                        "model first)."
                    )
        known = {name for parameter in parameter_table.parameters(arch) for name in parameter.hf}
        # Old Llama folders store the rotary frequencies, some tied ones the head: both follow from the rest.
        spare = {"lm_head.weight"} if arch.tied else set()
        if spare & self.where.keys() and not self._equal("lm_head.weight", "model.embed_tokens.weight"):
            raise UserError(
                f"lm_head.weight in {self.path} differs from model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings: true: set it to false to keep both, as transformers does, or remove lm_head.weight."
            )
        extra = sorted(n for n in self.where.keys() - known - spare if not n.endswith("rotary_emb.inv_freq"))
        if extra:
            raise UserError(
                f"{self.path} holds {len(extra)} tensors that a {arch.family} model of its config.json does not have, "
                f"the first {extra[0]}: is the config another model's?"
            )

    def _equal(self, *names: str) -> bool:
        """Whether two matrices hold the same values, compared some rows at a time."""
        one, two = (self.slice(name) for name in names)
        if one.get_shape() != two.get_shape():
            return False
        rows, columns = one.get_shape()
        step = max(1, HASH_ELEMENTS // columns)
        return all(bool((one[i : i + step].float() == two[i : i + step].float()).all()) for i in range(0, rows, step))

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        return self.slice(parameter.hf[0])[:1].dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A view of the mapped file where the box's rows lie there in order."""
        rows = parameter_table.packing(parameter.row.axes[0], parameter.arch)[offset[0] : offset[0] + shape[0]]
        columns = [slice(low, low + count) for low, count in zip(offset[1:], shape[1:], strict=True)]
        parts, start = [], 0
        local = np.empty(len(rows), dtype=np.int64)  # where each wanted row lies in the concatenation of the parts
        filled = 0
        for name, (count, *_) in zip(parameter.hf, parameter.hf_shapes(), strict=True):
            mine = (rows >= start) & (rows < start + count)
            if mine.any():
                first, last = int(rows[mine].min()) - start, int(rows[mine].max()) - start + 1
                parts.append(self.slice(name)[slice(first, last), *columns])
                local[mine] = rows[mine] - start - first + filled
                filled += last - first
            start += count
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if np.array_equal(local, np.arange(len(whole))) else whole[torch.from_numpy(local)]

    def stored(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        for name in parameter.hf:
            length, *rest = self.slice(name).get_shape()
            step = max(1, HASH_ELEMENTS // int(np.prod(rest)))
            yield name, (tensor_bytes(self.slice(name)[low : low + step]) for low in range(0, length, step))


def _files(path: Path) -> list[str]:
    """Names of the weights' files, as transformers chooses them; see `Folder`."""
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
    content = hf_config.read_json(index)
    where = content.get("weight_map")
    if not isinstance(where, dict) or not where or not isinstance(content.get("metadata"), dict):
        raise UserError(f"{index} has no weight_map and metadata, as an index has: download it again.")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the file {name!r}: expected *.safetensors files beside it.")
        if not (path / name).is_file():
            raise UserError(f"{index} names {name}, which is not in {path}: download the model again.")
    if single.is_file() and single.name not in where.values():
        raise UserError(
            f"{path} holds model.safetensors, which transformers reads, and another model's index beside it: remove "
            f"{single.name}, or {index.name} and its files."
        )
    return sorted(set(where.values()))


class Writer:
    """Writes a Hugging Face folder from front to back: safetensors of at most MAX_FILE_BYTES, their index, the small files.

    Args:
        out_dir: claimed folder; until `finish` it holds nothing under a name that a reader looks for.
        arch: sizes.
        dtypes: of each parameter, in the table's order.
    """

    def __init__(self, out_dir: Path, arch: Architecture, dtypes: dict[parameter_table.Parameter, torch.dtype]):
        self.out_dir, self.arch, self.dtypes = out_dir, arch, dtypes
        files, held = [{}], 0
        for parameter, dtype in dtypes.items():
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
                tensor = torch.empty(shape, dtype=dtype, device="meta")
                if held and held + tensor.nbytes > MAX_FILE_BYTES:
                    files.append({})
                    held = 0
                files[-1][name] = tensor
                held += tensor.nbytes
        n = len(files)
        names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        self.files = dict(zip(names, files, strict=True))

    def write(self, label: str, rows: Callable[[parameter_table.Parameter], Iterable[Callable[[], Tensor]]]) -> None:
        """Write the weights; `rows` gives what makes all rows of a parameter in packed order, in one part or several. Parts are
        made by threads that run ahead."""
        jobs = list(self._jobs(rows))
        progress = process_groups.Progress(label, len(jobs), "pieces")
        with _Parts([(self._part(name), tensors) for name, tensors in self.files.items()]) as parts:
            for done, data in enumerate(process_groups.ahead(jobs), 1):
                parts.write(data)
                progress.update(done)

    def _jobs(self, rows) -> Iterator[Callable[[], np.ndarray]]:
        """What makes the bytes of the files, piece by piece; of rows that are packed in another order, all at once."""
        for parameter, dtype in self.dtypes.items():
            back = np.argsort(parameter_table.packing(parameter.row.axes[0], self.arch))
            if np.array_equal(back, np.arange(len(back))):
                yield from (partial(_bytes, [make], dtype) for make in rows(parameter))
            else:
                yield partial(_bytes, rows(parameter), dtype, torch.from_numpy(back))

    def finish(self, source: Path) -> None:
        """Give the files their names and add what `source`, a Hugging Face folder, holds beside weights; config.json last."""
        for name in self.files:
            self._part(name).rename(self.out_dir / name)
        if len(self.files) > 1:
            where = {tensor: name for name, tensors in self.files.items() for tensor in tensors}
            total = sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        write_config(source, self.arch, self.out_dir, list(self.dtypes.values())[-1])

    def _part(self, name: str) -> Path:
        return self.out_dir / f"{name}.part"


def _bytes(makes: Iterable[Callable[[], Tensor]], dtype: torch.dtype, order: Tensor | None = None) -> np.ndarray:
    parts = [make() for make in makes]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor_bytes((whole if order is None else whole[order]).to(dtype))


def write_config(source: Path, arch: Architecture, out_dir: Path, dtype: torch.dtype) -> None:
    """What `source`, a Hugging Face folder, holds beside weights, config.json last and with the sizes of `arch`."""
    for file in hf_asset_files(source):
        target = copy_path(file, source, out_dir)
        if file.name == "tokenizer_config.json":
            write_tokenizer_config(file, target)
        elif file.name not in ("config.json", "README.md"):  # the parent's card is not this model's
            shutil.copyfile(file, target)
    config = architecture.to_hf(arch, hf_config.read_json(source / "config.json"), str(dtype).removeprefix("torch."))
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer_config(source: Path, target: Path) -> None:
    """A tokenizer_config.json that transformers 4 and 5 read alike; a copy where the shipped one is.

    transformers 5 saves a class name and a list of special tokens that transformers 4 does not know, but reads the old ones. Code
    named by `auto_map` is not exported, so the name goes.
    """
    config = hf_config.read_json(source)
    found = {key: value for key, value in config.items() if key != "auto_map"}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        tokens = found.pop("extra_special_tokens")
        found["additional_special_tokens"] = [*found.get("additional_special_tokens", []), *tokens]
    if found == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Parts:
    """Safetensors files with known tensors, filled with one stream of bytes."""

    def __init__(self, files: list[tuple[Path, dict[str, Tensor]]]):
        self.files, self.file, self.left = iter(files), None, 0
        self.closer, self.closed = ThreadPoolExecutor(1), []

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *_) -> None:
        self._close()
        with self.closer:
            for closed in self.closed:
                closed.result()

    def write(self, data: np.ndarray) -> None:
        while len(data):
            if not self.left:
                self._next()
            here, data = data[: self.left], data[self.left :]
            self.file.write(here)
            self.left -= len(here)

    def _next(self) -> None:
        self._close()
        path, tensors = next(self.files)
        self.file = disk.NewFile(path)
        header, self.left = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in tensors.items():
            span = [self.left, self.left + tensor.nbytes]
            header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            self.left = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self.file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        """Let a full file reach the disk while the next one fills."""
        if self.file:
            self.closed.append(self.closer.submit(self.file.close))
