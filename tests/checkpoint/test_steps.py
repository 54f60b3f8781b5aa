"""Steps of a run folder: a failure means that a damaged step is used, a good one is lost, or an old one stays for ever."""

import json
import os

import pytest

from minitron_mcore.checkpoint import disk, steps
from minitron_mcore.errors import UserError


def write_step(out_dir, number, sizes=True):
    """A published step with one file of the number's digits."""
    part = steps.part_folder(out_dir, number)
    part.mkdir(parents=True)
    (part / "data").write_text(str(number))
    manifest = {"files": {"data": disk.sha256(part / "data")}} | (
        {"sizes": {"data": len(str(number))}} if sizes else {}
    )
    (part / steps.MANIFEST).write_text(json.dumps(manifest))
    return steps.publish(part)


def numbers(out_dir):
    return [step.number for step in steps.published(out_dir)]


def test_the_newest_complete_step_is_found_by_looking(tmp_path):
    assert steps.published(tmp_path / "none") == [] and steps.newest_complete(tmp_path) is None
    for number in (5, 10, 15, 20):
        write_step(tmp_path, number, sizes=number > 5)
    (tmp_path / "latest").write_text("step_0000099")  # of older versions: ignored
    (tmp_path / "step_0000030.part").mkdir()
    (tmp_path / "step_x").mkdir()
    assert numbers(tmp_path) == [20, 15, 10, 5]
    (tmp_path / "step_0000020" / steps.MANIFEST).unlink()
    (tmp_path / "step_0000015" / "data").write_text("1")
    newest, short, *_ = steps.published(tmp_path)
    assert "integrity.json" in newest.problem() and "data has 1 bytes, 2 were written" in short.problem()
    assert steps.newest_complete(tmp_path).number == 10
    (tmp_path / "step_0000010" / "data").unlink()
    assert steps.newest_complete(tmp_path).number == 5, "a manifest without sizes"


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({"keep_last": 2, "keep_every": None}, [30, 25]),
        ({"keep_last": 1, "keep_every": 10}, [30, 20, 10]),
        ({"keep_last": 9, "keep_every": None}, [30, 25, 20, 15, 10]),
    ],
)
def test_older_steps_are_removed_after_a_newer_one(tmp_path, kept, expected):
    for number in (10, 15, 20, 25, 35):
        write_step(tmp_path, number)
    (tmp_path / "step_0000028.part").mkdir()  # of a writer that was killed
    steps.remove_old(write_step(tmp_path, 30), **kept)
    assert numbers(tmp_path) == expected, "35 was refused by the resume that led to 30"
    assert not [path.name for path in tmp_path.glob("step_*") if path.suffix]


def test_the_best_step_stays(tmp_path):
    def best(content):
        (tmp_path / steps.BEST).write_text(json.dumps(content) if isinstance(content, dict) else content)

    for number in (10, 20):
        write_step(tmp_path, number)
    assert steps.best(tmp_path) is None
    best({"step": 40, "previous": 10})  # 40 is not saved yet
    steps.remove_old(write_step(tmp_path, 30), 1, None)
    assert numbers(tmp_path) == [30, 10] and steps.best(tmp_path) == 10
    steps.remove_old(write_step(tmp_path, 40), 1, None)
    assert numbers(tmp_path) == [40] == [steps.best(tmp_path)]
    best("{")
    with pytest.raises(UserError, match="best.json"):
        steps.remove_old(write_step(tmp_path, 50), 1, None)
    assert numbers(tmp_path) == [50, 40], "nothing is removed where it is not known which step is the best"


def test_a_step_is_published_whole_or_not_at_all(tmp_path):
    write_step(tmp_path, 10)
    (tmp_path / "step_0000010" / "data").unlink()
    assert write_step(tmp_path, 10).problem() == "", "it replaces the refused one"
    part = steps.part_folder(tmp_path, 20)
    part.mkdir()
    with pytest.raises(UserError, match="integrity.json"):
        steps.publish(part)
    assert numbers(tmp_path) == [10]


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "figures.json"
    disk.write_json(path, {"rows": [{"blocks": 2, "loss": 1.5}]})
    disk.write_json(path, {"rows": [1]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert os.listdir(tmp_path) == ["figures.json"]
    with pytest.raises(TypeError):
        disk.write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
