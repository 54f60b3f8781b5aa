"""A model's sizes and constants, and their translation from and to Hugging Face's `config.json`. Imports no torch."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron_mcore.config.model import ArchitectureConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import hf_config
from minitron_mcore.models.families import FAMILIES, Family
from minitron_mcore.reading import read_json


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies (config key `rope_scaling`, type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """Everything that determines a model's tensors and computation.

    Sizes are global (not per rank). A block is an attention and an MLP layer.

    Raises:
        UserError: sizes that do not fit each other, blocks out of range.
    """

    family: str
    blocks: int
    hidden: int
    ffn: int
    """Intermediate size of the MLP; in a mixture of experts, of one expert."""
    heads: int
    """Query heads."""
    groups: int
    """Key/value heads; each serves heads / groups query heads."""
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    """The output head shares the embedding table."""
    rotary_fraction: float = 1.0
    """Fraction of head_dim that the rotary embedding rotates."""
    window: int | None = None
    """Sliding window: number of positions that a token attends to, including its own; None: all before it."""
    experts: int = 0
    """Experts per block; 0: a dense MLP."""
    experts_per_token: int = 0
    normalize_experts: bool = True
    """Scale the probabilities of the selected experts to sum to 1."""
    no_attention: tuple[int, ...] = ()
    """Blocks without an attention layer and its norm, ascending."""
    no_mlp: tuple[int, ...] = ()
    """Blocks without an MLP layer (or experts) and its norm, ascending; disjoint from `no_attention`."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        _check_types(self)
        for name in ("no_attention", "no_mlp"):
            object.__setattr__(self, name, blocks := tuple(sorted(set(getattr(self, name)))))
            if blocks and not 0 <= blocks[0] <= blocks[-1] < self.blocks:
                raise UserError(f"{name} names blocks {list(blocks)}, but the model has blocks 0 to {self.blocks - 1}.")
        if empty := set(self.no_attention) & set(self.no_mlp):
            raise UserError(f"block {min(empty)} has neither attention nor MLP: such a block does not exist.")
        if self.heads % self.groups:
            raise UserError(f"{self.heads} query heads cannot be shared out over {self.groups} key/value groups.")
        if bool(self.experts) != self.traits.mixture:
            kind = "a mixture of experts" if self.traits.mixture else "dense"
            raise UserError(
                f"experts is {self.experts}, but {self.family} is {kind}: expected {'1 or more' if self.traits.mixture else 0}."
            )
        if self.experts and self.experts_per_token == 1 and self.normalize_experts:
            raise UserError(
                "one expert a token with normalised probabilities (norm_topk_prob, always so in Mixtral) is not supported: the "
                "router would have no gradient; expected at least 2 experts a token."
            )
        if self.experts_per_token > self.experts:
            raise UserError(f"{self.experts_per_token} experts a token cannot be chosen from {self.experts} experts.")

    @property
    def traits(self) -> Family:
        """The family's rows, config keys and layer variants."""
        return FAMILIES[self.family]

    @property
    def heads_per_group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.groups

    @property
    def layers(self) -> list[tuple[int, str]]:
        """(block, "attention" or "mlp") of each layer, by layer number."""
        return list(_layers(self.blocks, self.no_attention, self.no_mlp))

    def layer(self, block: int, part: str | None) -> int | None:
        """The number of a block's "attention" or "mlp" layer, from 0; None if the block has none."""
        return _layers(self.blocks, self.no_attention, self.no_mlp).get((block, part or ""))

    def blocks_with(self, part: str) -> list[int]:
        """Blocks that have a layer `part`: "attention" or "mlp"."""
        return [block for block, layer_part in self.layers if layer_part == part]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `Architecture(**fields)` reverses it."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """16 hexadecimal digits of a hash of all fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _check_types(arch: Architecture) -> None:
    """Raise UserError for a value of the wrong type or size. Sizes are limited because tables of that length are built."""
    for name, value in vars(arch).items():
        kind = Architecture.__annotations__[name]
        if name in ("no_attention", "no_mlp"):
            right = isinstance(value, tuple | list) and all(type(block) is int for block in value)
        elif name == "rope_scaling":
            right = value is None or (isinstance(value, RopeScaling) and all(map(_is_number, vars(value).values())))
        elif name == "family":
            right = isinstance(value, str) and value in FAMILIES
        elif kind is float:
            right = _is_number(value)
        elif kind in (bool, str):
            right = type(value) is kind
        else:
            least = 0 if name in ("experts", "experts_per_token") else 1
            limit = hf_config.LIMITS.get(name, hf_config.MAX_SIZE)
            right = (value is None and name == "window") or (type(value) is int and least <= value <= limit)
        if not right:
            raise UserError(
                f"{name} is {str(value)[:40]!r}, expected {kind} in the range of published models, as in conf/model."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= hf_config.MAX_NUMBER


@functools.cache
def _layers(blocks: int, no_attention: tuple[int, ...], no_mlp: tuple[int, ...]) -> dict[tuple[int, str], int]:
    missing = {"attention": no_attention, "mlp": no_mlp}
    present = [(block, part) for block in range(blocks) for part in missing if block not in missing[part]]
    return {layer: number for number, layer in enumerate(present)}


def from_json(fields: dict[str, Any], where: str | Path) -> Architecture:
    """Reverse `Architecture.to_json`. UserErrors begin with `where`; missing and unknown fields raise TypeError."""
    try:
        return Architecture(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def from_hf(config: dict[str, Any], where: str | Path = "config.json") -> Architecture:
    """The architecture that transformers would build from the content of a config.json.

    Args:
        where: names the file in messages.

    Raises:
        UserError: see `hf_config.fields` and `Architecture`.
    """
    try:
        return Architecture(**hf_config.fields(config))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def to_hf(arch: Architecture, parent: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of an exported model.

    Rotary constants and dtype are written under the keys of both transformers 4 and 5, other values under all keys of the
    parent's config. `auto_map` is removed, since the code that it names is not exported.

    Args:
        parent: content of the config.json of the model that this one was made from.
        dtype: of the exported weights, as in "bfloat16".
    """
    removed = ("_name_or_path", "auto_map", "quantization_config", "block_configs")
    config = {key: value for key, value in parent.items() if key not in removed}
    for name, keys in arch.traits.keys.items():
        config |= {key: getattr(arch, name) for key in keys if key in parent or key == keys[0]}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: arch.blocks]
    config.setdefault("transformers_version", version("transformers"))
    names = {"architectures": [arch.traits.hf_class], "dtype": dtype, "torch_dtype": dtype}
    return config | hf_config.rope_keys(arch) | names


def export_problems(arch: Architecture) -> Iterator[str]:
    """Messages about what the family's Hugging Face class cannot represent: blocks without attention or MLP, and in LlamaConfig a
    hidden size that is no multiple of the heads."""
    yield from missing_layer_problems(arch, f"transformers' {arch.traits.hf_class}")
    if arch.traits.heads_divide_hidden and arch.hidden % arch.heads:
        below = arch.hidden - arch.hidden % arch.heads
        yield (
            f"hidden {arch.hidden} is not a multiple of {arch.heads} heads, which transformers' LlamaConfig demands: "
            f"use {f'{below} or ' if below else ''}{below + arch.heads}, or prune.exportable=false."
        )


def missing_layer_problems(arch: Architecture, holder: str) -> Iterator[str]:
    """A message if the model has blocks without attention or MLP; `holder` names the class that cannot represent them."""
    missing = {"attention": arch.no_attention, "MLP": arch.no_mlp}
    if parts := [f"no {part} in {', '.join(map(str, blocks))}" for part, blocks in missing.items() if blocks]:
        yield (
            f"the model has blocks with {' and '.join(parts)}, which {holder} cannot hold: keep it in sharded checkpoints "
            "(prune.exportable=false lets the plan pass), or drop whole blocks."
        )


def check_exportable(arch: Architecture) -> None:
    """Raise a UserError with all `export_problems`."""
    refuse(export_problems(arch))


def from_config(config: ArchitectureConfig | None) -> Architecture | None:
    """The architecture of the config key `model.architecture`; None (null) accepts any. Raises as `Architecture` does."""
    return None if config is None else from_json(dataclasses.asdict(config), "model.architecture")


def check_matches(arch: Architecture, expected: Architecture | None, where: str | Path) -> None:
    """Compare the architecture of a model at `where` with the expected one; None accepts any.

    Raises:
        UserError: names all fields that differ, with both values.
    """
    if expected is None:
        return
    pairs = {name: (value, getattr(expected, name)) for name, value in vars(arch).items()}
    if wrong := [f"{name} is {value}, not {wanted}" for name, (value, wanted) in pairs.items() if value != wanted]:
        raise UserError(
            f"{where} is not the model that the config names: {', '.join(wrong)}. Give the right folder, or the model that "
            "it is (+model=...; model.architecture=null takes any)."
        )


def read_hf(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """(architecture, content of config.json) of a Hugging Face folder.

    Raises:
        UserError: no such folder, an unreadable config.json, an unsupported model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"no Hugging Face model at {folder}: expected config.json, *.safetensors and tokenizer files there "
            "(give the folder with model.hf=/path/to/folder)."
        )
    config = read_json(path, "download it again")
    return from_hf(config, path), config
