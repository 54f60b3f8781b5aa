"""Layouts by name: tp2_sp_pp2_virtual2_cp2_ep2_dp2."""

import re

from minitron_mcore.config.settings import ParallelConfig

AXES = {"tp": "tensor", "pp": "pipeline", "virtual": "virtual", "cp": "context", "ep": "expert"}


def layout(name: str) -> tuple[int, ParallelConfig]:
    """Number of processes, and sizes. Ranks of all axes but the pipeline's share the experts out."""
    sizes = {axis: int(size) for axis, size in re.findall(r"(tp|pp|virtual|cp|ep|dp)(\d+)", name)}
    written = [f"{axis}{size}" for axis, size in sizes.items()]
    assert sorted(name.split("_")) == sorted(written + ["sp"] * ("_sp" in name)), name
    tp, cp, dp, pp, ep = (sizes.get(axis, 1) for axis in ("tp", "cp", "dp", "pp", "ep"))
    parallel = {field: sizes[axis] for axis, field in AXES.items() if axis in sizes}
    return pp * max(tp * cp * dp, ep), ParallelConfig(**parallel, sequence="_sp" in name)


def layouts(*names: str) -> dict[str, tuple[int, ParallelConfig]]:
    return {name: layout(name) for name in names}
