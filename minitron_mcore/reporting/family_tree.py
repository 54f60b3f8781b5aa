"""Who was made from whom: rows over every checkpoint, score file, plan and exported folder of a work_dir and their ancestors."""

from pathlib import Path

from minitron_mcore.checkpoint import lineage
from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan import Plan
from minitron_mcore.reporting.read import KINDS, damage_as_user_error, read_json


def steps(found: dict[str, list[Path]]) -> list[lineage.Step]:
    """Every checkpoint that these folders hold or descend from, each once and after what it was made from."""
    merged: dict[str, lineage.Step] = {}
    for path in (folder / KINDS[kind] for kind in ("checkpoint", "export") for folder in found[kind]):
        record = read_json(path)
        with damage_as_user_error(path):
            identity = {"path": str(path.parent), "step": ""} | {
                k: v for k, v in record.items() if k in ("path", "step")
            }
            for step in lineage.history(record["lineage"], identity | {"fingerprint": record["fingerprint"]}):
                merged.setdefault(step.identity["fingerprint"], step)
    return list(merged.values())


def weights_of(found: dict[str, list[Path]]) -> dict[Path, str]:
    """The weights' hash of each checkpoint and exported folder that is there."""
    kinds = ("export", "checkpoint")
    return {f.resolve(): read_json(f / KINDS[kind]).get("fingerprint") for kind in kinds for f in found[kind]}


def rows(
    found: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]
) -> tuple[list[dict], list[dict]]:
    """(who was made from whom, the commands that did it), rows for tables."""
    made = steps(found)
    here = {
        hashed: folder.name for folder, hashed in weights_of(found).items()
    }  # the checkpoint's, where both are there
    weights = [_weights(step, here) for step in made]
    lines = [row for row in weights if row["how"] == "converted"]
    for folder, of in scores.items():
        lines.append(_line("scores", of.digest(), "scored", f"weights {of.metadata.get('fingerprint')}", folder.name))
    for folder, plan in plans.items():
        lines.append(
            _line("plan", plan.digest(), "planned", f"weights {plan.fingerprint}, scores {plan.scores}", folder.name)
        )
    lines += [row for row in weights if row["how"] != "converted"]
    commands = [{"hash": step.identity["fingerprint"], **_command(step.lineage)} for step in made]
    for folder in found["export"]:
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


def _weights(step: lineage.Step, here: dict[str, str]) -> dict:
    record, fingerprint = step.lineage, step.identity["fingerprint"]
    parents = {role: parent for role, parent in record["parents"].items() if parent}
    of = [_parent(role, parent) for role, parent in parents.items()]
    used = [f"{kind} {record[kind]}" for kind in ("plan", "scores") if kind in record]
    used += [f"data {record['data']['hash']}"] if "data" in record else []
    row = _line(
        "weights", fingerprint, lineage.operation(record) or "converted", ", ".join(of), here.get(fingerprint, "")
    )
    return row | {"with": ", ".join(used), "folder": row["folder"] or _elsewhere(step.identity)}


def _parent(role: str, parent: dict) -> str:
    """A checkpoint by its hash; what another tool left by its own, and where it lay."""
    if "fingerprint" in parent:
        return f"{role} {parent['fingerprint']}"
    return f"{role} {parent['sha256']} in {parent['path']}"


def _elsewhere(identity: dict) -> str:
    """Where weights lie that are not in this work_dir, and whether they still do."""
    path = Path(identity["path"]) / KINDS["checkpoint"]
    if not path.is_file():
        return f"{path.parent} (not there now)"
    same = read_json(path).get("fingerprint") == identity["fingerprint"]
    return f"{path.parent}" if same else f"{path.parent} (holds other weights now)"
