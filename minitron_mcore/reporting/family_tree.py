"""Lineage of every checkpoint, score file, plan and exported folder of a work_dir, as rows for tables."""

from pathlib import Path

from minitron_mcore.checkpoint import lineage
from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan import Plan
from minitron_mcore.reporting.read import KINDS, damage_as_user_error, read_json


def steps(folders: dict[str, list[Path]]) -> list[lineage.Step]:
    """All checkpoints in these folders and their ancestors, each once and after its parents."""
    merged: dict[str, lineage.Step] = {}
    for path in (folder / KINDS[kind] for kind in ("checkpoint", "export") for folder in folders[kind]):
        record = read_json(path)
        with damage_as_user_error(path):
            identity = {"path": str(path.parent), "step": ""} | {
                k: v for k, v in record.items() if k in ("path", "step")
            }
            for step in lineage.history(record["lineage"], identity | {"fingerprint": record["fingerprint"]}):
                merged.setdefault(step.identity["fingerprint"], step)
    return list(merged.values())


def weights_of(folders: dict[str, list[Path]]) -> dict[Path, str]:
    """Resolved folder -> fingerprint, of the checkpoints and exported folders of the work_dir."""
    kinds = ("export", "checkpoint")
    return {f.resolve(): read_json(f / KINDS[kind]).get("fingerprint") for kind in kinds for f in folders[kind]}


def rows(
    folders: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]
) -> tuple[list[dict], list[dict]]:
    """Rows for two tables: each artefact with its parents, and the commands that made them."""
    made = steps(folders)
    names = {
        fingerprint: folder.name for folder, fingerprint in weights_of(folders).items()
    }  # checkpoints before exports
    weights = [_weights(step, names) for step in made]
    lines = [row for row in weights if row["how"] == "converted"]
    for folder, of in scores.items():
        lines.append(_line("scores", of.digest(), "scored", f"weights {of.metadata.get('fingerprint')}", folder.name))
    for folder, plan in plans.items():
        lines.append(
            _line("plan", plan.digest(), "planned", f"weights {plan.fingerprint}, scores {plan.scores}", folder.name)
        )
    lines += [row for row in weights if row["how"] != "converted"]
    commands = [{"hash": step.identity["fingerprint"], **_command(step.lineage)} for step in made]
    for folder in folders["export"]:
        path = folder / KINDS["export"]
        record = read_json(path)
        with damage_as_user_error(path):
            kept = sorted(file.stem.removeprefix("plan_") for file in path.parent.glob("plan_*.json"))
            line = _line("folder", record["fingerprint"], "exported", f"weights {record['fingerprint']}", folder.name)
            lines.append(line | ({"with": f"plan {', '.join(kept)}"} if kept else {}))
            commands.append({"hash": record["fingerprint"], **_command(record)})
    return lines, commands


def _line(what: str, digest: str, how: str, of: str, folder: str) -> dict:
    return {"what": what, "hash": digest, "how": how, "from": of, "with": "", "folder": folder}


def _command(record: dict) -> dict:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return {"command": record.get("command", ""), "versions": versions}


def _weights(step: lineage.Step, names: dict[str, str]) -> dict:
    record, fingerprint = step.lineage, step.identity["fingerprint"]
    parents = {role: parent for role, parent in record["parents"].items() if parent}
    of = [_parent(role, parent) for role, parent in parents.items()]
    used = [f"{kind} {record[kind]}" for kind in ("plan", "scores") if kind in record]
    used += [f"data {record['data']['hash']}"] if "data" in record else []
    row = _line(
        "weights", fingerprint, lineage.operation(record) or "converted", ", ".join(of), names.get(fingerprint, "")
    )
    return row | {"with": ", ".join(used), "folder": row["folder"] or _elsewhere(step.identity)}


def _parent(role: str, parent: dict) -> str:
    """A parent by its fingerprint; a converted folder by its hash and path."""
    if "fingerprint" in parent:
        return f"{role} {parent['fingerprint']}"
    return f"{role} {parent['sha256']} in {parent['path']}"


def _elsewhere(identity: dict) -> str:
    """Path of weights outside the work_dir, and whether they are still there."""
    path = Path(identity["path"]) / KINDS["checkpoint"]
    if not path.is_file():
        return f"{path.parent} (not there now)"
    same = read_json(path).get("fingerprint") == identity["fingerprint"]
    return f"{path.parent}" if same else f"{path.parent} (holds other weights now)"
