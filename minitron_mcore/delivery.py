"""What makes an exported folder a delivery: a model card, generation settings, licences, and loaders that take it.

All that the card says is read from the checkpoint: its lineage (model.json), which holds its ancestors', and the metrics and
evaluations beside it.
"""

from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.ticker import EngFormatter
from transformers import GenerationConfig

from minitron_mcore import ancestry, loaders, prune, report
from minitron_mcore.checkpoint import Checkpoint, command, identity, versions
from minitron_mcore.data import parse_blend
from minitron_mcore.models import hf_config, table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.folder import LICENCES
from minitron_mcore.plan.plan import Plan, compare
from minitron_mcore.reading import read_json, read_json_lines, readable

CARD = "README.md"
RECORD = "minitron"
SHOWN = ("step", "tokens", "kd_loss", "lm_loss", "teacher_entropy", "lr")
NOT_SHOWN = ("distributed_optimizer", "log_every", "save_every", "stop_after", "teacher_ahead")
"""Settings that don't change what is learnt."""
MINITRON = "[2407.14679](https://arxiv.org/abs/2407.14679), [2408.11796](https://arxiv.org/abs/2408.11796)"


class Origin(NamedTuple):
    """The weights that a folder was written from."""

    arch: Architecture
    shipped: Path
    """Where config, tokenizer, licence and card of the parent lie."""
    identity: dict
    lineage: dict
    plans: dict[str, str]
    """Text of the plans that made it, by digest."""


def exported(source: Checkpoint) -> Origin:
    return Origin(source.arch, source.hf, identity(source), source.lineage, ancestry.plans(source.path))


def cut(source: str | Path, plan: Plan, folder: str | Path) -> Origin:
    """Of what `prune.cut_folder` made of the folder `source`."""
    found = {"path": str(folder), "fingerprint": prune.fingerprint(plan)}
    plans = {plan.digest(): plan.to_json()}
    return Origin(plan.target, Path(source), found, prune.cut_lineage(source, plan), plans)


def deliver(origin: Origin, folder: str | Path) -> list[dict]:
    """Complete a Hugging Face folder that `export_folder` or `cut_folder` wrote; returns the rows of `loaders.verdict`.

    `generation_config.json`, the tokenizer and the parent's licence files stay as shipped; a missing generation_config.json is
    made from config.json. README.md becomes this model's card. minitron/ gets what a program can trace it by: lineage.json, and
    every kept index in plan_DIGEST.json; loaders look at no folder within theirs.

    Raises:
        UserError: see `loaders.verdict`; no card is written then.
    """
    folder = Path(folder)
    config = hf_config.read_json(folder / "config.json")
    if not (folder / "generation_config.json").is_file():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(folder)
    taken = loaders.verdict(folder, origin.arch)
    with readable(f"the lineage in {origin.identity['path']}", "make the checkpoint again"):
        text = card(origin, config, taken).encode("utf-8", "replace")  # JSON can hold half a character
    (folder / CARD).write_bytes(text)
    (folder / RECORD).mkdir(exist_ok=True)
    for digest, text in origin.plans.items():
        (folder / RECORD / _plan_file(digest)).write_text(text)
    made = {**origin.identity, "lineage": origin.lineage, "command": command(), "versions": versions()}
    report.write_json(folder / RECORD / "lineage.json", made)
    return taken


def _plan_file(digest: str) -> str:
    return f"plan_{digest}.json"


def card(origin: Origin, config: dict, taken: list[dict]) -> str:
    """The model card, with Hugging Face's front matter.

    Args:
        origin: of its weights.
        config: of the exported folder.
        taken: rows of `loaders.verdict`.
    """
    line, parent, total = ancestry.line(origin.lineage), _parent(origin), table.count(origin.arch)
    cuts = [Architecture(**lineage["before"]) for lineage in line if "before" in lineage]
    made = " and ".join(dict.fromkeys(filter(None, map(ancestry.deed, line)))) or "converted"
    steps = ancestry.history(origin.lineage, origin.identity)
    parts = [
        _front_matter(origin, parent),
        f"# {parent}, {made}: {EngFormatter(places=1)(total)}",
        f"{total:,} parameters in {config['dtype']}, {made} from {parent} with minitron_mcore on Megatron-Core, by the Minitron "
        f"recipe ({MINITRON}).",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```',
        "## Sizes",
        report.markdown(compare(cuts[0] if cuts else origin.arch, origin.arch)),
        f"Every block has these sizes. head_dim is {origin.arch.head_dim}, the vocabulary {origin.arch.vocab:,} tokens.",
        "## How it was made",
        *(_told(number, step, origin.plans) for number, step in enumerate(steps, 1)),
        f"`{RECORD}/lineage.json` says the same to a program.",
        *_evaluations(Path(origin.identity["path"])),
        "## Loaders",
        report.markdown(taken),
        "transformers loaded the folder. The others were not run: their rows follow from their published rules, TensorRT-LLM's "
        "with the sizes that it is fast at, multiples of 64 x TP.",
        "## Licence",
        _licence(origin, parent),
    ]
    return "\n\n".join(parts) + "\n"


def _parent(origin: Origin) -> str:
    """The first ancestor's name: what its config says, or its folder's."""
    first = next(iter(ancestry.line(origin.lineage)[0]["parents"].values()), origin.identity)
    config = hf_config.read_json(origin.shipped / "config.json")
    return Path(config.get("_name_or_path") or first["path"]).name


def _told(number: int, step: ancestry.Step, plans: dict[str, str]) -> str:
    """A numbered paragraph: what was done to what, with what, and which command did it."""
    lineage, lines = step.lineage, [f"{number}. Weights `{step.identity['fingerprint']}`"]
    parents, deed = lineage["parents"], ancestry.deed(lineage)
    if deed == "pruned":
        lines[0] += f": `{parents['source']['fingerprint']}`, pruned by plan `{lineage['plan']}`."
        statistic = ", ".join(
            f"{k} {v}" for k, v in lineage["statistic"].items() if k not in ("fingerprint", "architecture")
        )
        lines += [f"Scores `{lineage['scores']}`: {statistic or 'nothing known of them'}."]
        lines += [f"Blocks dropped, counted from 0: {', '.join(map(str, lineage['dropped_blocks'])) or 'none'}."]
        if lineage["plan"] in plans:
            lines[-1] += f" Every kept index: `{RECORD}/{_plan_file(lineage['plan'])}`."
        if merged := lineage.get("merged_heads"):
            lines += [f"Dropped query heads merged into kept ones: {merged}."]
    elif deed:
        taught = f" from teacher `{parents['teacher']['fingerprint']}`" if parents["teacher"] else " on cross-entropy"
        lines[0] += f": `{parents['student']['fingerprint']}`, {deed}{taught}."
        files, weights = parse_blend(lineage["data"]["files"])
        names = [Path(file).name for file in files]
        names = [f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True)] if weights else names
        lines += [f"Data `{lineage['data']['hash']}`: {', '.join(names)}."]
        lines += [f"Settings: {', '.join(f'{k} {v}' for k, v in lineage['settings'].items() if k not in NOT_SHOWN)}."]
        lines += _losses(step.identity)
    else:
        lines[0] += ": " + ", ".join(f"{Path(found['path']).name} ({kind})" for kind, found in parents.items()) + "."
    versions = ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())
    return "\n\n   ".join([*lines, f"`{lineage['command']}` ({versions})"])


def _losses(identity: dict) -> list[str]:
    """First and last figures of a training run up to its checkpoint, in nats a token; nothing where its folder is gone."""
    path, last = Path(identity["path"]) / "metrics.jsonl", int(identity["step"].removeprefix("step_"))
    rows = read_json_lines(path, "move it away") if path.is_file() else []
    with readable(path, "move it away"):
        rows = [{key: row[key] for key in SHOWN} for row in rows if row["step"] <= last]
    return [report.markdown([rows[0], rows[-1]]).replace("\n", "\n   ")] if rows else []


def _evaluations(source: Path) -> list[str]:
    """Evaluations of a checkpoint, since it was finished, in the folders beside it."""
    rows, mark = [], source / "latest"
    for path in sorted(source.parent.glob("*/evaluation.json")) if mark.is_file() else []:
        found = read_json(path, "evaluate again, or move it away")
        with readable(path, "evaluate again, or move it away"):
            if Path(found["source"]).resolve() == source.resolve() and path.stat().st_mtime > mark.stat().st_mtime:
                rows += found["files"]
                report.markdown(rows)
    return ["## Evaluation", report.markdown(rows)] if rows else []


def _parents_card(origin: Origin) -> ModelCardData:
    """The front matter of the parent's own card, empty where it has none that can be read."""
    path = origin.shipped / CARD
    text = path.read_text(errors="replace") if path.is_file() else ""
    try:
        return ModelCard(text).data if text.startswith("---") else ModelCardData()
    except (yaml.YAMLError, ValueError, TypeError):
        return ModelCardData()


def _licence_files(origin: Origin) -> list[str]:
    return sorted({file.name for pattern in LICENCES for file in origin.shipped.glob(pattern)})


def _front_matter(origin: Origin, parent: str) -> str:
    given, files = _parents_card(origin), _licence_files(origin)
    licence = {"license": given.license or "other"}
    if licence["license"] == "other":
        licence |= {"license_name": given.license_name or "that-of-the-parent", "license_link": given.license_link}
    if files and not licence.get("license_link"):
        licence["license_link"] = files[0]
    data = ModelCardData(
        base_model=parent,
        language=given.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruning", "distillation", "megatron-core"],
        **licence,
    )
    return f"---\n{data.to_yaml()}\n---"


def _licence(origin: Origin, parent: str) -> str:
    named, files = _parents_card(origin).license, _licence_files(origin)
    return (
        f"These weights are made from those of {parent}, so its licence holds for them too"
        f"{f': {named}' if named else ''}. "
        + (f"It came with {', '.join(files)}, which lie here. " if files else "It came without a licence file. ")
        + "Check what it asks of models made from it: a notice or a name, for instance. Llama 3.1's wants "
        '"Built with Llama" shown and a name that begins with "Llama".'
    )
