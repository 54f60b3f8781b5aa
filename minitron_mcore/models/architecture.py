"""A model's shape and constants, and their translation from and to Hugging Face's `config.json`. No torch import."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import hf_config
from minitron_mcore.models.families import FAMILIES, Family


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths (config key `rope_scaling`, type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """Everything that decides a model's tensors and its mathematics; sizes are global, blocks as papers count them."""

    family: str
    blocks: int
    hidden: int
    ffn: int
    """Channels between the two MLP projections; of one expert in a mixture of experts."""
    heads: int
    groups: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    """The output head is the embedding table."""
    rotary_fraction: float = 1.0
    """Share of head_dim that the rotary embedding turns."""
    window: int | None = None
    """Positions that a token attends to, itself among them; None is all before it."""
    experts: int = 0
    """Experts of a block; 0 is a plain MLP."""
    experts_per_token: int = 0
    normalize_experts: bool = True
    """The chosen experts' probabilities are scaled to sum to 1."""
    no_attention: tuple[int, ...] = ()
    """Blocks without an attention layer (and without the norm before it), ascending."""
    no_mlp: tuple[int, ...] = ()
    """Blocks without an MLP layer, or without experts; other blocks than those above."""

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        _check_types(self)
        for name in ("no_attention", "no_mlp"):
            object.__setattr__(self, name, gone := tuple(sorted(set(getattr(self, name)))))
            if gone and not 0 <= gone[0] <= gone[-1] < self.blocks:
                raise UserError(f"{name} names blocks {list(gone)}, but the model has blocks 0 to {self.blocks - 1}.")
        if empty := set(self.no_attention) & set(self.no_mlp):
            raise UserError(f"block {min(empty)} has neither attention nor MLP: such a block does not exist.")
        if self.heads % self.groups:
            raise UserError(f"{self.heads} query heads cannot be shared out over {self.groups} key/value groups.")
        if self.experts and self.experts_per_token == 1 and self.normalize_experts:
            raise UserError(
                "one expert a token with normalised probabilities (norm_topk_prob, always so in Mixtral) is not supported: the "
                "router would have no gradient; expected at least 2 experts a token."
            )
        if self.experts_per_token > self.experts:
            raise UserError(f"{self.experts_per_token} experts a token cannot be chosen from {self.experts} experts.")

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    @property
    def layers(self) -> list[tuple[int, str]]:
        """(block, "attention" or "mlp") of each layer that is there, in order; a layer's number is its position here."""
        return list(_layers(self.blocks, self.no_attention, self.no_mlp))

    def layer(self, block: int, part: str) -> int | None:
        """The number of a block's "attention" or "mlp" layer; None where the block has none."""
        return _layers(self.blocks, self.no_attention, self.no_mlp).get((block, part))

    def having(self, part: str) -> list[int]:
        """The blocks that have an "attention" or "mlp" layer."""
        return [block for block, found in self.layers if found == part]

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _check_types(arch: Architecture) -> None:
    """Of values that a file says; sizes have limits, since tables of so many blocks and experts are built."""
    for name, value in vars(arch).items():
        kind = Architecture.__annotations__[name]
        if name in ("no_attention", "no_mlp"):
            right = isinstance(value, tuple | list) and all(type(block) is int for block in value)
        elif name == "rope_scaling":
            right = value is None or (isinstance(value, RopeScaling) and all(map(_is_number, vars(value).values())))
        elif kind is float:
            right = _is_number(value)
        elif kind in (bool, str):
            right = type(value) is kind
        else:
            least = 0 if name in ("experts", "experts_per_token") else 1
            limit = hf_config.LIMITS.get(name, hf_config.MAX_SIZE)
            right = (value is None and name == "window") or (type(value) is int and least <= value <= limit)
        if not right:
            raise UserError(f"{name} is {str(value)[:40]!r}, which no model has: expected {kind} as in conf/model.")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= hf_config.MAX_NUMBER


@functools.cache
def _layers(blocks: int, no_attention: tuple[int, ...], no_mlp: tuple[int, ...]) -> dict[tuple[int, str], int]:
    gone = {"attention": no_attention, "mlp": no_mlp}
    there = [(block, part) for block in range(blocks) for part in gone if block not in gone[part]]
    return {layer: number for number, layer in enumerate(there)}


def from_hf(config: dict, where: str | Path = "config.json") -> Architecture:
    """The model that transformers builds from a config.json's content; `where` names the file in messages.

    Raises:
        UserError: see `hf_config.fields`; sizes that don't fit each other.
    """
    try:
        return Architecture(**hf_config.fields(config))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def to_hf(arch: Architecture, shipped: dict, dtype: str) -> dict:
    """The config of an exported model: the shipped one with this architecture's sizes, all of them written.

    transformers 4 and 5 read the same model: rotary constants and dtype stand under the keys of both. Old keys keep their place
    beside those that transformers reads today. `auto_map` goes, since the code that it names is not exported.
    """
    dropped = ("_name_or_path", "auto_map", "quantization_config", "block_configs")
    config = {key: value for key, value in shipped.items() if key not in dropped}
    for name, keys in arch.traits.keys.items():
        config |= {key: getattr(arch, name) for key in keys if key in shipped or key == keys[0]}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: arch.blocks]
    config.setdefault("transformers_version", version("transformers"))
    names = {"architectures": [arch.traits.hf_class], "dtype": dtype, "torch_dtype": dtype}
    return config | hf_config.rope_keys(arch) | names


def export_problems(arch: Architecture) -> Iterator[str]:
    """What the family's Hugging Face class cannot hold: a block without attention or MLP, and in LlamaConfig a hidden size that
    the heads don't divide, whatever head_dim says."""
    yield from missing_layers(arch, f"transformers' {arch.traits.hf_class}")
    if arch.traits.heads_divide_hidden and arch.hidden % arch.heads:
        below = arch.hidden - arch.hidden % arch.heads
        yield (
            f"hidden {arch.hidden} is not a multiple of {arch.heads} heads, which transformers' LlamaConfig demands: "
            f"use {below} or {below + arch.heads}."
        )


def missing_layers(arch: Architecture, holder: str) -> Iterator[str]:
    """What keeps a model from a class whose blocks all have attention and MLP; `holder` names the class."""
    gone = {"attention": arch.no_attention, "MLP": arch.no_mlp}
    if named := [f"no {part} in {', '.join(map(str, blocks))}" for part, blocks in gone.items() if blocks]:
        yield (
            f"the model has blocks with {' and '.join(named)}, which {holder} cannot hold: keep it in sharded checkpoints "
            "(prune.exportable=false lets the plan pass), or drop whole blocks."
        )


def check_exportable(arch: Architecture) -> None:
    """Raises UserError with the `export_problems`."""
    refuse(export_problems(arch))


def given(fields: dict | None) -> Architecture | None:
    """The architecture that a config spells out (`model.architecture`), None where it takes any.

    Raises:
        UserError: a field that is missing or unknown, a family that is not there.
    """
    if fields is None:
        return None
    try:
        found = Architecture(**fields)
    except TypeError as error:
        raise UserError(f"model.architecture is not one ({error}): see conf/model for the fields.") from error
    if found.family not in FAMILIES:
        raise UserError(f"model.architecture.family is {found.family!r}; supported: {', '.join(FAMILIES)}.")
    return found


def expect(found: Architecture, wanted: Architecture | None, where: str | Path) -> None:
    """Refuse a model that is not the one asked for.

    Raises:
        UserError: names every field that differs, both values, and where `found` was found.
    """
    pairs = {} if wanted is None else {k: (v, getattr(wanted, k)) for k, v in vars(found).items()}
    wrong = [f"{name} is {has}, not {should}" for name, (has, should) in pairs.items() if has != should]
    if wrong:
        raise UserError(
            f"{where} is not the model that the config names: {', '.join(wrong)}. Give the right folder, or the model that "
            "it is (+model=...; model.architecture=null takes any)."
        )


def read_hf(folder: Path) -> tuple[Architecture, dict]:
    """Architecture and raw config of a Hugging Face folder.

    Raises:
        UserError: no such folder, no readable config.json, an unsupported model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"no Hugging Face model at {folder}: expected config.json, *.safetensors and tokenizer files there "
            "(give the folder with model.hf=/path/to/folder)."
        )
    config = hf_config.read_json(path)
    return from_hf(config, path), config
