"""Reads a Hugging Face config.json with transformers' config class and maps its attributes to an `Architecture`'s fields.

The class supplies defaults, the rope spellings of all versions and type checks. What the class refuses, and what it accepts but
this package cannot represent, is a UserError that names the key. transformers is imported when the first config is read.
"""

import copy
from typing import Any

from minitron_mcore.errors import UserError
from minitron_mcore.models.families import FAMILIES, Family

LIMITS = {"blocks": 2000, "experts": 2000}
"""Largest accepted sizes, several times those of any published model; tables of this length are built."""
MAX_SIZE = 10**8
"""Largest accepted value of all other sizes."""
MAX_NUMBER = 1e18
ELSEWHERE = {
    "configuration_files": "the name of another config file",
    "transformers_weights": "the name of another weights file",
    "quantization_config": "the quantisation of the weights (dequantise the model first)",
    "fusion_config": "a fusion of modules",
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder"), "one of several models"),
}
"""Keys that make transformers load something other than config.json and the plain weights. Refused unless null, and the first, of
which transformers reads null too, always."""
BOUNDED = {"num_hidden_layers": LIMITS["blocks"], "num_labels": 10**6, "head_dim": 10**6, "hidden_size": 10**6}
"""Integers from which transformers builds lists or tables while it reads the config or builds the model."""
FLAGS = ("tied", "normalize_experts")
_AUTO = "AutoModelForCausalLM"
ROPE_TYPES = ("default", "llama3")


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `Architecture`, from the content of a config.json.

    Raises:
        UserError: transformers refuses the config, or this package cannot represent its model.
    """
    name = _family(raw)
    family, config = FAMILIES[name], _load(name, raw)
    _check_demands(family, config)
    values = {"family": name} | _rope(config.rope_parameters, family)
    for field, (key, *_) in family.keys.items():
        value = getattr(config, key, None)
        if field == "rotary_fraction":
            values[field] = _number(f"rope_parameters.{key}", config.rope_parameters.get(key))
        elif field == "norm_eps":
            values[field] = _number(key, value)
        elif field in FLAGS:
            values[field] = value  # the class has checked that it is a bool
        elif field == "head_dim":
            values[field] = _size(key, _head_dim(config), MAX_SIZE)
        elif field != "window" or value is not None:
            values[field] = _size(key, value, LIMITS.get(field, MAX_SIZE))
    _check_rotary(values)
    _check_aliases(raw, family, values)
    if config.pad_token_id is not None and not -values["vocab"] <= config.pad_token_id < values["vocab"]:
        raise UserError(f"pad_token_id {config.pad_token_id} is outside the vocabulary of {values['vocab']} tokens.")
    return values


def rope_keys(arch: Any) -> dict[str, Any]:
    """The rotary constants as config keys: `rope_parameters` of transformers 5; `rope_theta`, `rope_scaling` of transformers 4."""
    scaling = None
    if s := arch.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    partial = {"partial_rotary_factor": arch.rotary_fraction} if "rotary_fraction" in arch.traits.keys else {}
    theta = {"rope_theta": arch.rope_theta}
    new = (scaling or {"rope_type": "default"}) | theta | partial
    return theta | {"rope_scaling": scaling, "rope_parameters": new}


def _family(raw: dict[str, Any]) -> str:
    """The family that transformers selects by `model_type`; `architectures` must agree if present."""
    blocks = raw.get("block_configs") or []
    kind, named = raw.get("model_type"), raw.get("architectures")
    if named is not None and not (isinstance(named, list) and named and all(isinstance(x, str) for x in named)):
        raise UserError(f"architectures is {_short(named)}: expected a list with one class name.")
    supported = {family.hf_class: name for name, family in FAMILIES.items()}
    hf_class = named[0] if named else kind
    # ModelOpt's Puzzletron writes one of these for models whose blocks have different shapes.
    if not isinstance(blocks, list) or raw.get("per_layer_config") or any(block != blocks[0] for block in blocks):
        raise UserError(
            f"{hf_class} whose blocks differ (a Puzzletron model) is not supported: expected blocks of one shape."
        )
    if named and hf_class not in supported:
        raise UserError(f"architecture {hf_class} is not supported; supported: {', '.join(supported)}.")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"model_type {_short(kind)} is not supported; supported: {', '.join(FAMILIES)}. transformers chooses the model's "
            "class by it."
        )
    if named and supported[named[0]] != kind:
        raise UserError(
            f"architectures is {hf_class}, but model_type {kind} makes transformers build a {FAMILIES[kind].hf_class}: make "
            "them agree."
        )
    return kind


def _load(name: str, raw: dict[str, Any]) -> Any:
    """transformers' config object."""
    for key, what in ELSEWHERE.items():
        if key in raw and (raw[key] is not None or key == "configuration_files"):
            raise UserError(
                f"{key} is {_short(raw[key])}, which transformers reads as {what}: this package does not support it."
            )
    if name == "mistral" and "layer_types" in raw:
        raise UserError("layer_types turns a mistral model into a ministral in transformers, which is not supported.")
    code = raw.get("auto_map", {})  # never run
    if not isinstance(code, dict) or not all(isinstance(code.get(key, ""), str) for key in ("AutoConfig", _AUTO)):
        raise UserError(f"auto_map is {_short(code)}: expected an object of names.")
    check_counts(raw)
    import transformers
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # this module refuses what its warnings are about
    try:
        config_class = getattr(transformers, FAMILIES[name].hf_class.removesuffix("ForCausalLM") + "Config")
        return config_class.from_dict(copy.deepcopy(raw))
    except Exception as error:  # values of wrong types can raise anything in transformers' validation
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers refuses it: {type(error).__name__}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def check_counts(raw: dict[str, Any]) -> None:
    """Raise UserError if a count exceeds its limit in `BOUNDED`: transformers would build lists or tables of that length."""
    for key, limit in BOUNDED.items():
        if isinstance(raw.get(key), int):
            _size(key, raw[key], limit)


def _check_demands(family: Family, config: Any) -> None:
    for key, wanted in family.demands.items():
        if (value := getattr(config, key, wanted)) not in (None, wanted):
            raise UserError(f"{family.hf_class} with {key}={_short(value)} is not supported: expected {wanted!r}.")
    # transformers' key/value cache reads it in all classes.
    if "window" not in family.keys and getattr(config, "sliding_window", None) is not None:
        raise UserError(f"{family.hf_class} with sliding_window={_short(config.sliding_window)} is not supported.")
    # transformers' masks read it; null counts as false there.
    if getattr(config, "is_causal", True) is not True:
        raise UserError(f"is_causal is {_short(config.is_causal)}, which lets tokens see later ones: expected true.")
    kinds = getattr(config, "layer_types", None) or []
    if len(set(kinds)) > 1:
        raise UserError(f"{family.hf_class} whose layer_types differ is not supported: expected one kind of attention.")
    if set(kinds) - {"full_attention"}:
        raise UserError(f"layer_types is {_short(kinds[0])} for every block: expected full_attention.")


def _rope(rope: dict[str, Any], family: Family) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from transformers' standardised `rope_parameters`."""
    fraction = rope.get("partial_rotary_factor")
    if "rotary_fraction" not in family.keys and fraction not in (None, 1):  # only some rope types read it
        raise UserError(
            f"{family.hf_class} with partial_rotary_factor={_short(fraction)} is not supported: expected 1.0."
        )
    kind = rope.get("rope_type")
    if kind not in ROPE_TYPES:
        raise UserError(f"rope type {_short(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}.")
    constants: dict[str, Any] = {"rope_theta": _number("rope_theta", rope.get("rope_theta")), "rope_scaling": None}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling: dict[str, float] = {name: _number(f"rope_parameters.{name}", rope.get(name)) for name in names}
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if high <= low:
            raise UserError(f"rope_parameters.high_freq_factor {high:g} must be above low_freq_factor {low:g}.")
        key = "original_max_position_embeddings"
        scaling["original_max_positions"] = _size(f"rope_parameters.{key}", rope.get(key), MAX_SIZE)
        constants["rope_scaling"] = scaling
    return constants


def _head_dim(config: Any) -> object:
    """head_dim as transformers reads it: hidden / heads if it is absent, or if null in a class that declares the field."""
    has_field = hasattr(type(config), "head_dim")
    if not hasattr(config, "head_dim") or (config.head_dim is None and has_field):
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def _check_rotary(arch_fields: dict[str, Any]) -> None:
    """The rotary embedding rotates pairs of channels."""
    fraction = arch_fields.get("rotary_fraction", 1.0)
    rotated = int(arch_fields["head_dim"] * fraction) if 0 < fraction <= 1 else 0
    if rotated < 2 or rotated % 2:
        raise UserError(
            f"head_dim {arch_fields['head_dim']} with partial_rotary_factor {fraction:g} is not supported: their product must be "
            "an even number of channels, at most head_dim."
        )


def _check_aliases(raw: dict[str, Any], family: Family, arch_fields: dict[str, Any]) -> None:
    """All spellings of a key in an older folder must agree, since transformers reads only some of them."""
    for field, keys in family.keys.items():
        for key in keys:
            if raw.get(key) is not None and raw[key] != arch_fields.get(field):
                raise UserError(
                    f"{key} is {_short(raw[key])}, but transformers reads {arch_fields.get(field)} for {keys[0]}: make them agree."
                )


def _size(key: str, value: object, limit: int) -> int:
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{key} is {_short(value)}: expected an integer from 1 to {limit:,}.")
    return value


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
        raise UserError(f"{key} is {_short(value)}: expected a number above 0 and at most {MAX_NUMBER:g}.")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
