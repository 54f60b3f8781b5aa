"""The measured points of a depth study, one line each, so that an interrupted study resumes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import claim, disk
from minitron_mcore.config.identity import differences
from minitron_mcore.depth.study import FIGURES, Measure
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups, stop_signal
from minitron_mcore.reading import damage_as_user_error, read_json_lines

FILE = "points.jsonl"


class PointLog:
    """A cache of points in FILE (collective). Its first line identifies what is measured; each other line is a point."""

    def __init__(self, out_dir: str | Path, measure: Measure, total: int, has_accuracy: bool, **subject: str):
        """
        Args:
            out_dir: claimed folder.
            measure: computes a point that is not in the file.
            total: upper bound of the number of points, for the progress.
            has_accuracy: whether points have an accuracy; otherwise it is None.
            subject: identifies model, text and questions.

        Raises:
            UserError: the file is damaged, or holds points of another subject.
        """
        self.path, self._measure = Path(out_dir) / FILE, measure
        with process_groups.raise_on_all_ranks(), claim.writing(self.path.parent):
            points = self._read(subject, has_accuracy) if process_groups.rank() == 0 else {}
        self.points: dict[tuple[int, ...], dict[str, Any]] = process_groups.from_rank_0(points)
        if self.points:
            process_groups.log(f"depth: resuming after {len(self.points)} points")
        self.measured, self.total = 0, total
        self.progress = process_groups.Progress("depth", max(0, total - len(self.points)), "points")

    def _read(self, subject: dict[str, Any], has_accuracy: bool) -> dict[tuple[int, ...], dict[str, Any]]:
        if not self.path.is_file():
            disk.replace_text(self.path, json.dumps(subject) + "\n")
            return {}
        remedy = "remove its folder and study again"
        first, *lines = read_json_lines(self.path, remedy) or [{}]
        if changes := differences(first, subject):
            raise UserError(
                f"{self.path} has points of another model, text or questions ({'; '.join(changes)}): choose another out_dir, "
                "or remove that file."
            )
        names = FIGURES if has_accuracy else [name for name in FIGURES if name != "accuracy"]
        with damage_as_user_error(self.path, remedy):
            whole, _, partial_line = self.path.read_text().rpartition("\n")
            points = {tuple(map(int, point["dropped"])): point for point in lines}
            for point in lines:
                if not all(type(point[name]) in (int, float) for name in names):
                    raise TypeError(f"one of {', '.join(names)} is no number in {str(point)[:80]}")
                if not has_accuracy and point["accuracy"] is not None:
                    raise TypeError(f"accuracy {point['accuracy']} without questions")
        if partial_line:
            disk.replace_text(self.path, whole + "\n")
        return points

    def __call__(self, dropped: Sequence[int]) -> dict[str, Any]:
        """The point without these blocks, from the file or measured (collective); the same on every rank."""
        if tuple(dropped) not in self.points:
            stop_signal.stop_point(f"after {len(self.points)} of at most {self.total} points")
            # Ranks differ in the last bit, and must choose the same blocks.
            point = process_groups.from_rank_0(self._measure(dropped))
            with process_groups.raise_on_all_ranks(), claim.writing(self.path.parent):
                if process_groups.rank() == 0:
                    self._append(point)
            self.points[tuple(dropped)] = point
            self.measured += 1
            self.progress.update(self.measured)
        return self.points[tuple(dropped)]

    def _append(self, point: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(point) + "\n")
            file.flush()
            os.fsync(file.fileno())
