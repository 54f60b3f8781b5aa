"""Model card, generation settings and lineage record of an exported Hugging Face folder.

The card's content comes from the checkpoint: its lineage (model.json), which contains the lineages of its ancestors, and the
metrics and evaluations in the folders beside it.
"""

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.ticker import EngFormatter
from transformers import GenerationConfig

from minitron_mcore.checkpoint import claim, disk, lineage
from minitron_mcore.checkpoint.hf_assets import LICENCE_PATTERNS
from minitron_mcore.checkpoint.run_folder import Checkpoint, command, identity, versions
from minitron_mcore.config.identity import CONFIG_GROUPS, identifies, identifying
from minitron_mcore.config.settings import DistillConfig
from minitron_mcore.config.stages import STAGES, StageRun
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.export import transformers_check
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import Plan, compare
from minitron_mcore.reading import FORMAT_VERSION, damage_as_user_error, read_json, read_json_lines
from minitron_mcore.reporting import artefacts, costs, measurements, overview, sections, tables

CARD = "README.md"
RECORD = "minitron"
LOSSES = ("loss", "perplexity", "bits_per_byte")
METRICS = ("step", "tokens", "kd_loss", "lm_loss", "teacher_entropy", "lr")
RESULTS = ("<!-- results: rewritten by minitron report -->", "<!-- end of results -->")
"""Lines around the part of the card that `update_results` replaces."""
_SETTING = re.compile(r"\+{0,2}([\w.]+)=([^/~\\]*)")
"""Name and value of an override whose value holds no path."""
_CHOICE = re.compile(r"[\w-]+")
"""Value of an override that chooses a file of conf/."""
MINITRON = "[2407.14679](https://arxiv.org/abs/2407.14679), [2408.11796](https://arxiv.org/abs/2408.11796)"


class Origin(NamedTuple):
    """Description of the weights in an exported folder."""

    arch: Architecture
    hf_folder: Path
    """Folder with the parent's config, tokenizer, licence and model card."""
    identity: dict[str, Any]
    """Path, fingerprint and, for checkpoints, training step."""
    lineage: dict[str, Any]
    plans: dict[str, str]
    """Digest -> text of each plan by which the weights were pruned."""


def checkpoint_origin(source: Checkpoint) -> Origin:
    """Origin of the export of a checkpoint."""
    return Origin(source.arch, source.hf, identity(source), source.lineage, lineage.plans(source.path))


def cut_origin(source: str | Path, plan: Plan, folder: str | Path) -> Origin:
    """Origin of `folder`, which `apply.cut_folder` made from the Hugging Face folder `source`."""
    cut_identity = {"path": str(folder), "fingerprint": apply.fingerprint(plan)}
    plans = {plan.digest(): plan.to_json()}
    return Origin(plan.target, Path(source), cut_identity, apply.cut_lineage(source, plan), plans)


def complete_folder(origin: Origin, folder: str | Path) -> str:
    """Check and complete a Hugging Face folder that `export_folder` or `cut_folder` wrote.

    Adds README.md (the model card), generation_config.json if it is missing, and minitron/ with lineage.json and the kept
    indices of each plan as plan_DIGEST.json. Loaders ignore minitron/.

    Returns:
        What transformers loaded, in one line.

    Raises:
        UserError: see `transformers_check.check_folder`; no card is written.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "export again")
    if not (folder / "generation_config.json").is_file():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(folder)
    loaded = transformers_check.check_folder(folder, origin.arch)
    with damage_as_user_error(f"the lineage in {origin.identity['path']}", "make the checkpoint again"):
        text = model_card(origin, config, loaded).encode("utf-8", "replace")  # JSON may contain unpaired surrogates
    (folder / CARD).write_bytes(text)
    write_record(origin, folder)
    return loaded


def write_record(origin: Origin, folder: Path) -> None:
    """Write minitron/ of `complete_folder`."""
    (folder / RECORD).mkdir(exist_ok=True)
    for digest, text in origin.plans.items():
        (folder / RECORD / _plan_file(digest)).write_text(text)
    record = {**origin.identity, "lineage": origin.lineage, "command": command(), "versions": versions()}
    disk.write_json(folder / RECORD / "lineage.json", {"format_version": FORMAT_VERSION, **record})


def _plan_file(digest: str) -> str:
    return f"plan_{digest}.json"


def model_card(origin: Origin, config: dict[str, Any], loaded: str) -> str:
    """Text of the model card, with Hugging Face's front matter.

    Args:
        config: content of the exported config.json.
        loaded: see `complete_folder`.
    """
    chain, parent, total = lineage.model_chain(origin.lineage), parent_name(origin), parameter_table.count(origin.arch)
    before = [Architecture(**record["before"]) for record in chain if "before" in record]
    operations = " and ".join(dict.fromkeys(filter(None, map(lineage.operation, chain)))) or "converted"
    steps = lineage.history(origin.lineage, origin.identity)
    parts = [
        _front_matter(origin, parent),
        f"# {parent}, {operations}: {EngFormatter(places=1)(total)}",
        f"{total:,} parameters in {config['dtype']}, {operations} from {parent} with minitron_mcore on Megatron-Core, by the "
        f"Minitron recipe ({MINITRON}).",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```',
        f"transformers {version('transformers')} loaded this folder: {loaded}. Other runtimes were not run; `docs/serving.md` of "
        "minitron_mcore lists the sizes that vLLM and TensorRT-LLM accept.",
        "## Sizes",
        tables.markdown(compare(before[0] if before else origin.arch, origin.arch)),
        f"Every block has these sizes. head_dim is {origin.arch.head_dim}, the vocabulary {origin.arch.vocab:,} tokens.",
        "## How it was made",
        *(_step_paragraph(number, step, origin.plans) for number, step in enumerate(steps, 1)),
        f"`{RECORD}/lineage.json` holds the same in machine-readable form.",
        _results(_readable(Path(origin.identity["path"]).parent), steps),
        "## Licence",
        _licence(origin, parent),
    ]
    return "\n\n".join(parts) + "\n"


def parent_name(origin: Origin) -> str:
    """Name of the first ancestor: the one in its config.json, else its folder's."""
    first = next(iter(lineage.model_chain(origin.lineage)[0]["parents"].values()), origin.identity)
    config = read_json(origin.hf_folder / "config.json", "make the checkpoint again")
    return Path(config.get("_name_or_path") or first["path"]).name


def _step_paragraph(number: int, step: lineage.Step, plans: dict[str, str]) -> str:
    """Numbered paragraph on one step: inputs, settings, command."""
    record, lines = step.lineage, [f"{number}. Weights `{step.identity['fingerprint']}`"]
    parents, operation = record["parents"], lineage.operation(record)
    if operation == "pruned":
        lines[0] += f": `{parents['source']['fingerprint']}`, pruned by plan `{record['plan']}`."
        statistic = ", ".join(
            f"{key} {value}" for key, value in record["statistic"].items() if key not in ("fingerprint", "architecture")
        )
        lines += [f"Scores `{record['scores']}`: {statistic or 'no metadata'}."]
        lines += [f"Blocks dropped, counted from 0: {', '.join(map(str, record['dropped_blocks'])) or 'none'}."]
        if record["plan"] in plans:
            lines[-1] += f" Every kept index: `{RECORD}/{_plan_file(record['plan'])}`."
        if merged := record.get("merged_heads"):
            lines += [f"Dropped query heads merged into kept ones: {merged}."]
    elif operation:
        teachers = [f"`{p['fingerprint']}`" for role, p in parents.items() if role.split()[0] == "teacher" and p]
        plural = "s" if len(teachers) > 1 else ""
        teacher = f" from teacher{plural} {', '.join(teachers)}" if teachers else " on cross-entropy"
        lines[0] += f": `{parents['student']['fingerprint']}`, {operation}{teacher}."
        files, weights = parse_blend(record["data"]["files"])
        names = [Path(file).name for file in files]
        names = [f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True)] if weights else names
        lines += [f"Data `{record['data']['hash']}`: {', '.join(names)}."]
        settings = artefacts.shown_settings(identifying(record["settings"], DistillConfig))
        lines += [f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}."]
        lines += _losses(step.identity)
    else:
        lines[0] += ": " + ", ".join(f"{Path(source['path']).name} ({kind})" for kind, source in parents.items()) + "."
    libraries = ", ".join(f"{name} {release}" for name, release in record["versions"].items())
    return "\n\n   ".join([*lines, f"{_command(record['command'])}{libraries}."])


def _command(line: str) -> str:
    """The stage and the settings of a command that identify its run, so none that is a path, in code; "" if unknown."""
    stage, options = lineage.stage_of(line)
    if not stage:
        return ""
    settings = [option for option in options if _is_shown(option, STAGES[stage])]
    return f"`{shlex.join(['minitron', stage, *settings])}`, with "


def _is_shown(option: str, schema: type[StageRun]) -> bool:
    if not (found := _SETTING.fullmatch(option)):
        return False
    name, value = found.groups()
    return bool(name in CONFIG_GROUPS and _CHOICE.fullmatch(value)) or identifies(name, schema)


def _losses(identity: dict[str, Any]) -> list[str]:
    """First and last metrics of a training run up to its checkpoint (losses in nats per token). Empty without metrics.jsonl."""
    path, last = Path(identity["path"]) / "metrics.jsonl", int(identity["step"].removeprefix("step_"))
    rows = read_json_lines(path, "move it away") if path.is_file() else []
    with damage_as_user_error(path, "move it away"):
        rows = [{key: row[key] for key in METRICS} for row in rows if row["step"] <= last]
    return [tables.markdown([rows[0], rows[-1]]).replace("\n", "\n   ")] if rows else []


def _readable(work_dir: Path) -> dict[str, list[Path]]:
    return sections.readable(artefacts.classified(work_dir) | {artefacts.FIGURES: []})[0]


def _results(folders: dict[str, list[Path]], steps: list[lineage.Step]) -> str:
    """Results of a model, its teacher and its student in a work_dir, from the data of the page, between the lines RESULTS."""
    models, locate = artefacts.models(folders, steps), artefacts.locator(folders)
    parts = []
    if rows := [
        {"model": model.role, "file": name, **{key: row.get(key) for key in LOSSES}}
        for model in models
        for name, row in model.losses.items()
    ]:
        parts += ["## Evaluation", overview.headline(models), tables.markdown(tables.without_empty(rows))]
    for folder in folders["benchmark"][-1:]:
        found = measurements.read_benchmarks(folder, models, locate)
        roles = {model.role: found.models[model.role] for model in models if model.role in found.models}
        rows = measurements.benchmark_rows(found._replace(models=roles))
        parts += ["## Benchmarks", "Per cent ± standard error, by lm-eval.", tables.markdown(rows)] if roles else []
    made = {locate(step.identity["path"]) for step in steps}
    own = folders | {"stage": [folder for folder in folders["stage"] if folder.resolve() in made]}
    if rows := overview.cost_rows(costs.rows(own, {})):
        rows = tables.without_empty([{k: v for k, v in row.items() if k != "folder"} for row in rows])
        parts += ["## Cost", "Tokens and floating-point operations of student and teacher.", tables.markdown(rows)]
    return "\n\n".join([RESULTS[0], *filter(None, parts), RESULTS[1]])


def update_results(work_dir: str | Path) -> list[Path]:
    """Write the present results into the cards of the exported folders in `work_dir`; other parts of a card stay as they are.

    Returns:
        the cards that have the lines RESULTS.

    Raises:
        UserError: a card cannot be written.
    """
    cards, folders = [], _readable(Path(work_dir))
    for folder in folders["export"]:
        card, path = folder / CARD, folder / RECORD / "lineage.json"
        if not card.is_file():
            continue
        with damage_as_user_error(card, "export again"):
            before, _, rest = card.read_text(encoding="utf-8").partition(RESULTS[0])
        _, end, after = rest.partition(RESULTS[1])
        if not end:
            continue
        record = read_json(path, "export again")
        with damage_as_user_error(path, "export again"):
            made = lineage.history(record["lineage"], {"path": str(folder), "step": ""} | record)
            text = before + _results(folders, made) + after
        with claim.writing(folder):
            disk.replace_text(card, text.encode("utf-8", "replace").decode())
        cards.append(card)
    return cards


def parent_card_data(origin: Origin) -> ModelCardData:
    """Front matter of the parent's card, empty if there is none or it cannot be parsed."""
    path = origin.hf_folder / CARD
    text = path.read_text(errors="replace") if path.is_file() else ""
    try:
        data = ModelCard(text).data if text.startswith("---") else None
    except (yaml.YAMLError, ValueError, TypeError):
        data = None
    return data if isinstance(data, ModelCardData) else ModelCardData()


def _licence_files(origin: Origin) -> list[str]:
    return sorted({file.name for pattern in LICENCE_PATTERNS for file in origin.hf_folder.glob(pattern)})


def _front_matter(origin: Origin, parent: str) -> str:
    card_data, files = parent_card_data(origin), _licence_files(origin)
    licence: dict[str, Any] = {"license": card_data.license or "other"}
    if licence["license"] == "other":
        licence |= {
            "license_name": card_data.license_name or "that-of-the-parent",
            "license_link": card_data.license_link,
        }
    if files and not licence.get("license_link"):
        licence["license_link"] = files[0]
    data = ModelCardData(
        base_model=parent,
        language=card_data.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruning", "distillation", "megatron-core"],
        **licence,
    )
    return f"---\n{data.to_yaml()}\n---"


def _licence(origin: Origin, parent: str) -> str:
    named, files = parent_card_data(origin).license, _licence_files(origin)
    return (
        f"These weights are derived from {parent}, so its licence applies to them"
        f"{f': {named}' if named else ''}. "
        + (f"Its licence files are included: {', '.join(files)}. " if files else "It has no licence file. ")
        + "Check its terms for derived models, such as a notice or a name. Llama 3.1's requires a displayed "
        '"Built with Llama" and a name that begins with "Llama".'
    )
