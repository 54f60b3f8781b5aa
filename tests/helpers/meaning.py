"""Edited config.json files read twice, by this package and by transformers: equal logits or a refusal, nothing else."""

import collections
import copy
import json
import shutil
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture, build, parameter_table
from tests.helpers import families, models

TOLERANCE = 2e-4
DROP = "(dropped)"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {key: value for key, value in families.SCALED.items() if key != "rope_theta"}
OTHERS = {
    "rope_theta": [None, 0, 1, 1e4, 1e6, "1e6", True, -1.0, float("nan"), 10**400],
    "rope_scaling": [None, {}, "yarn", YARN, LLAMA3, LLAMA3 | {"type": "llama3"}, {"type": "linear", "factor": 2.0}]
    + [{"rope_type": "default"}, {"rope_type": "default", "rope_theta": 1e3}, LLAMA3 | {"factor": "4"}, {"factor": 4.0}]
    + [
        LLAMA3 | {"partial_rotary_factor": 0.5},
        {"type": "mrope", "mrope_section": [1, 1, 2]},
        LLAMA3 | {"factor": 0.5},
    ],
    "rope_parameters": [None, {}, [], YARN, LLAMA3, families.SCALED, {"rope_theta": 1e3}, {"rope_theta": "1e6"}]
    + [{"rope_theta": None}, {"rope_type": "default"}, {"rope_type": "llama3"}, {"rope_type": 5, "rope_theta": 1e4}]
    + [{"full_attention": families.PLAIN}, families.PLAIN | {"partial_rotary_factor": 0.25}, LLAMA3 | {"rope_theta": 0}]
    + [families.SCALED | {"low_freq_factor": 4.0}, families.SCALED | {"original_max_position_embeddings": 64.0}],
    "partial_rotary_factor": [None, 0.25, 0.5, 1.0, 2.0, 0, "0.5"],
    "rope_percent": [0.5, 0.25],
    "kv_channels": [8, 4],
    "head_dim": [None, 0, 3, 8.0],
    "sliding_window": [None, 0, 3, -1, 5.0, True],
    "use_sliding_window": [True, None, "false"],
    "max_window_layers": [0, 1],
    "layer_types": [
        None,
        [],
        ["full_attention"] * 3,
        ["sliding_attention"] * 3,
        ["full_attention"] * 2,
        "full_attention",
    ],
    "num_experts": [4, 6, None, 2.0],
    "num_local_experts": [4, 6, None],
    "num_experts_per_tok": [1, 2, 0, 7],
    "norm_topk_prob": [None, 1],
    "mlp_only_layers": [None, [0], [7]],
    "decoder_sparse_step": [2, -1],
    "attention_bias": [True, None, "false"],
    "mlp_bias": [True, None],
    "hidden_act": ["swish", "gelu", None, "relu2"],
    "is_causal": [True, False, None, 0],
    "tie_word_embeddings": [True, "false", 0, None],
    "num_labels": [3, 10**9, "3"],
    "model_type": ["llama", "mistral", "qwen2", "bert", None, 5],
    "architectures": [None, [], "LlamaForCausalLM", ["LlamaForSequenceClassification"], ["MistralForCausalLM"]],
    "num_key_value_heads": [None, 12, 5],
    "pad_token_id": [0, -1, 100, 101, "0", 0.0],
    "dtype": ["bfloat16", "float64", "no such", None],
    "torch_dtype": ["float16", "no such"],
    "quantization_config": [None, {}, {"quant_method": "fp8"}],
    "transformers_weights": ["other.safetensors"],
    "per_layer_config": [None, {"0": {"intermediate_size": 7}}],
    "block_configs": [None, [], [{}, {"a": 1}], 3],
    "auto_map": [{"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}, None, {"AutoConfig": 5}],
    "configuration_files": [["config.4.0.0.json"], None],
    "id2label": [{"a": "b"}, {"0": "x"}],
    "use_cache": [False, "no"],
    "text_config": [{}],
}
"""Keys that a folder may have, of any family and version, and values for them."""

SCALAR = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=True) | st.text(max_size=3)
ANY = (
    SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.sampled_from(sorted(YARN | LLAMA3)), SCALAR, max_size=3)
)


def spellings(value) -> list:
    """Other values and types for a value of a config."""
    if isinstance(value, dict):
        return [value | {key: other} for key, now in value.items() for other in (*spellings(now), None)]
    near = [value + 1, value - 1, -value, value * 1.5] if type(value) in (int, float) else []
    whole = [float(value), 10**9, value == 1] if type(value) is int else []
    truth = [not value, int(value), str(value).lower()] if isinstance(value, bool) else []
    return [None, str(value), [value], {}, "", 0, 1, True, *near, *whole, *truth]


def cases(config: dict) -> list[dict]:
    """One edit each: every key dropped or spelled otherwise, then the others' values."""
    found = [{key: DROP} for key in config]
    found += [{key: other} for key, value in config.items() for other in spellings(value)]
    found += [{key: value} for key, values in OTHERS.items() for value in values]
    new = config["rope_parameters"]
    old = {"rope_theta": new["rope_theta"], "rope_scaling": None if new["rope_type"] == "default" else dict(new)}
    found += [old | {"rope_parameters": DROP}, old, old | {"rope_theta": 1e3}]
    found += [
        {"rope_scaling": scaling, "rope_theta": theta} for scaling in OTHERS["rope_scaling"] for theta in (DROP, 1e3)
    ]
    return found


class Both:
    """A family's folder, and what both readers make of it under edited configs. In a world of one rank."""

    def __init__(self, which: str, root: Path):
        self.folder, self.ids = families.tiny(which, root / which), models.tokens(batch=1)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.weights, self.seen = HFFolder(self.folder), {}
        self.edited = root / f"{which}-edited"
        self.edited.mkdir()
        shutil.copyfile(self.folder / "model.safetensors", self.edited / "model.safetensors")

    def edit(self, edits: dict) -> dict:
        return {key: copy.deepcopy(value) for key, value in (self.config | edits).items() if value is not DROP}

    def outcome(self, edits: dict) -> str:
        """ "equal" or "refused"; anything else is a fault."""
        config = self.edit(edits)
        try:
            arch = architecture.from_hf(copy.deepcopy(config))
            self.weights.check(arch)
        except UserError:
            return "refused"
        except Exception as error:
            return f"traceback: {type(error).__name__} {error}"
        try:
            expected = self._theirs(config)
        except Exception as error:
            return f"silent: transformers refuses it ({type(error).__name__} {error})"[:200]
        try:
            difference = (self._ours(arch) - expected).abs().max().item()
        except Exception as error:
            return f"traceback: {type(error).__name__} {error}"[:200]
        return "equal" if difference <= TOLERANCE else f"silent: logits differ by {difference:.2g}"

    def _theirs(self, config: dict) -> torch.Tensor:
        (self.edited / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(self.edited, local_files_only=True)
        key = type(read).__name__ + read.to_json_string(use_diff=False)
        if key not in self.seen:
            model = AutoModelForCausalLM.from_pretrained(
                self.edited, dtype=torch.float32, use_safetensors=True, local_files_only=True, **models.EAGER
            )
            with torch.no_grad():
                self.seen[key] = model(self.ids).logits
        return self.seen[key]

    def _ours(self, arch) -> torch.Tensor:
        if (key := arch.digest()) not in self.seen:
            model, stored = (
                build.build(arch, ParallelConfig(), "fp32"),
                {p.name: p for p in parameter_table.parameters(arch)},
            )
            with torch.no_grad():
                for name, parameter in build.named_parameters(model):
                    row = stored[name]
                    parameter.copy_(self.weights.read(row, (0,) * len(row.shape), row.shape))
            self.seen[key] = models.model_logits(model, arch, self.ids)
        return self.seen[key]


@st.composite
def edits(draw, config: dict) -> dict:
    """Up to four edits of a config at once, of its own keys and of others'."""
    keys = draw(st.lists(st.sampled_from(sorted(config.keys() | OTHERS)), min_size=1, max_size=4, unique=True))
    values = {key: [DROP, *OTHERS.get(key, []), *(spellings(config[key]) if key in config else [])] for key in keys}
    return {key: draw(st.one_of(st.sampled_from(values[key]), ANY)) for key in keys}


def generate(which: str, root: Path, examples: int) -> tuple[dict, list]:
    """As `count`, for generated cases of one family."""
    quiet()
    both, counts, faults = Both(which, root), collections.Counter(), []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(edits(both.config))
    def run(changes):
        outcome = both.outcome(changes)
        counts[outcome.split(":")[0]] += 1
        if outcome not in ("equal", "refused"):
            faults.append((which, changes, outcome))

    run()
    return dict(counts), faults


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def count(names: list[str], root: Path) -> tuple[dict, list]:
    """Number of cases by family and outcome, and the faults among them. In a world of one rank."""
    quiet()
    counts, faults = {}, []
    for which in names:
        both, counts[which] = Both(which, root), collections.Counter()
        for edits in cases(both.config):
            outcome = both.outcome(edits)
            counts[which][outcome.split(":")[0]] += 1
            if outcome not in ("equal", "refused"):
                faults.append((which, edits, outcome))
    return counts, faults
