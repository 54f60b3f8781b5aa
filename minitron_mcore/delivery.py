"""What makes an exported folder a delivery: a model card, generation settings, licences, and loaders that take it.

All that the card says is read from the checkpoint: its lineage (model.json), which holds its ancestors', and the metrics and
evaluations beside it.
"""

import json
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig

from minitron_mcore import loaders, report
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.models import table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.folder import LICENCES
from minitron_mcore.plan.plan import compare

CARD = "README.md"
SHOWN = ("step", "tokens", "kd_loss", "lm_loss", "teacher_entropy", "lr")
MINITRON = "[2407.14679](https://arxiv.org/abs/2407.14679), [2408.11796](https://arxiv.org/abs/2408.11796)"


def deliver(source: Checkpoint, folder: str | Path) -> list[dict]:
    """Complete a folder that `hf.export_folder` wrote from `source`; returns the rows of `loaders.verdict`.

    `generation_config.json`, the tokenizer and the parent's licence files stay as shipped; a missing generation_config.json is
    made from config.json. README.md becomes this model's card.

    Raises:
        UserError: see `loaders.verdict`; no card is written then.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    if not (folder / "generation_config.json").is_file():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(folder)
    taken = loaders.verdict(folder, source.arch)
    (folder / CARD).write_text(card(source, config, taken))
    return taken


class Step(NamedTuple):
    """One checkpoint on the way from the parent to the delivered one."""

    lineage: dict
    fingerprint: str
    folder: Path
    """Where it was written; it may be gone."""
    number: int
    """Of its training step."""


def history(source: Checkpoint) -> list[Step]:
    """The checkpoints that `source` was made from, the oldest first, and itself."""
    steps, lineage = [], source.lineage
    fingerprint, folder, number = source.fingerprint, source.path, source.step_dir.name
    while True:
        steps.insert(0, Step(lineage, fingerprint, folder, int(number.removeprefix("step_"))))
        made_from = lineage["parents"].get("student") or lineage["parents"].get("source")
        if made_from is None or "ancestry" not in lineage:
            return steps
        lineage, fingerprint = lineage["ancestry"], made_from["fingerprint"]
        folder, number = Path(made_from["path"]), made_from["step"]


def card(source: Checkpoint, config: dict, taken: list[dict]) -> str:
    """The model card, with Hugging Face's front matter.

    Args:
        source: the exported checkpoint.
        config: of the exported folder.
        taken: rows of `loaders.verdict`.
    """
    steps, parent = history(source), _parent(source)
    cuts = [Architecture(**step.lineage["before"]) for step in steps if "before" in step.lineage]
    total = table.count(source.arch)
    size = f"{total / 1e9:.2f} B" if total >= 1e9 else f"{total / 1e6:.0f} M"
    made = " and ".join(dict.fromkeys(filter(None, map(_deed, steps)))) or "converted"
    tables = report.markdown(compare(cuts[0] if cuts else source.arch, source.arch))
    parts = [
        _front_matter(source, parent),
        f"# {parent}, {made}: {size}",
        f"{total:,} parameters in {config['dtype']}, {made} from {parent} with minitron_mcore on Megatron-Core, by the Minitron "
        f"recipe ({MINITRON}).",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```',
        "## Sizes",
        tables,
        f"Every block has these sizes. head_dim is {source.arch.head_dim}, the vocabulary {source.arch.vocab:,} tokens.",
        "## How it was made",
        *(_told(number, step) for number, step in enumerate(steps, 1)),
        *_evaluations(source),
        "## Who loads it",
        report.markdown(taken),
        "transformers was asked; the others were not run: their rows follow from their published rules.",
        "## Licence",
        _licence(source, parent),
    ]
    return "\n\n".join(parts) + "\n"


def _parent(source: Checkpoint) -> str:
    """The first ancestor's name: what its config says, or its folder's."""
    origin = next(iter(history(source)[0].lineage["parents"].values()), {"path": source.path})
    config = json.loads((source.hf / "config.json").read_text())
    return Path(config.get("_name_or_path") or origin["path"]).name


def _deed(step: Step) -> str | None:
    if "plan" in step.lineage:
        return "pruned"
    if "settings" in step.lineage:
        return "distilled" if step.lineage["parents"]["teacher"] else "trained"
    return None


def _told(number: int, step: Step) -> str:
    """A numbered paragraph: what was done to what, with what, and which command did it."""
    lineage, lines = step.lineage, [f"{number}. Weights `{step.fingerprint}`"]
    if "plan" in lineage:
        of = ", ".join(f"{key} {value}" for key, value in lineage["statistic"].items() if key not in ("fingerprint",))
        lines[0] += (
            f": pruned by plan `{lineage['plan']}`, ranked by scores `{lineage['scores']}` ({of or 'no details'})."
        )
        lines += [f"Blocks dropped, counted from 0: {', '.join(map(str, lineage['dropped_blocks'])) or 'none'}."]
    elif "settings" in lineage:
        teacher = lineage["parents"]["teacher"]
        lines[0] += (
            f": distilled from teacher `{teacher['fingerprint']}` ({teacher['path']})." if teacher else ": trained."
        )
        lines += [f"Data `{lineage['data']['hash']}`: {', '.join(lineage['data']['files'])}."]
        lines += [f"Settings: {', '.join(f'{key} {value}' for key, value in lineage['settings'].items())}."]
        lines += _losses(step)
    else:
        origin = ", ".join(f"{kind} {Path(found['path']).name}" for kind, found in lineage["parents"].items())
        lines[0] += f": {origin}."
    versions = ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())
    lines += [f"`{lineage['command']}` ({versions})"]
    return "\n\n   ".join(lines)


def _losses(step: Step) -> list[str]:
    """First and last figures of a training run up to its checkpoint, in nats a token; nothing where its folder is gone."""
    path = step.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [{key: row[key] for key in SHOWN} for row in rows if row["step"] <= step.number]
    return [report.markdown([rows[0], rows[-1]]).replace("\n", "\n   ")] if rows else []


def _evaluations(source: Checkpoint) -> list[str]:
    """Evaluations of this very checkpoint in the folders beside it."""
    rows = []
    for path in sorted(source.path.parent.glob("*/evaluation.json")):
        found = json.loads(path.read_text())
        if Path(found["source"]).resolve() == source.path.resolve() and path.stat().st_mtime > _finished(source):
            rows += found["files"]
    return ["## Evaluation", report.markdown(rows)] if rows else []


def _finished(source: Checkpoint) -> float:
    return (source.path / "latest").stat().st_mtime


def _parents_card(source: Checkpoint) -> ModelCardData:
    """The front matter of the parent's own card, empty where it has none that can be read."""
    path = source.hf / CARD
    text = path.read_text(errors="replace") if path.is_file() else ""
    try:
        return ModelCard(text).data if text.startswith("---") else ModelCardData()
    except (yaml.YAMLError, ValueError, TypeError):
        return ModelCardData()


def _licence_files(source: Checkpoint) -> list[str]:
    return sorted({file.name for pattern in LICENCES for file in source.hf.glob(pattern)})


def _front_matter(source: Checkpoint, parent: str) -> str:
    given, files = _parents_card(source), _licence_files(source)
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


def _licence(source: Checkpoint, parent: str) -> str:
    named, files = _parents_card(source).license, _licence_files(source)
    return (
        f"These weights are made from those of {parent}, so its licence holds for them too"
        f"{f': {named}' if named else ''}. "
        + (f"It came with {', '.join(files)}, which lie here. " if files else "It came without a licence file. ")
        + "Check what it asks of models made from it: a notice or a name, for instance. Llama 3.1's wants "
        '"Built with Llama" shown and a name that begins with "Llama".'
    )
