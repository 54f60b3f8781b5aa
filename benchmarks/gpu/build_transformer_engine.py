"""Build Transformer Engine on a machine without a GPU, packed small enough to copy to an H100 without network access.

    python benchmarks/gpu/build_transformer_engine.py OUT_DIR     # writes OUT_DIR/transformer_engine.tar.xz

Needs Linux x86-64, CPython 3.12 (the interpreter of the target), g++, strip, access to a package index, 10 GB of disk
and 10 to 20 minutes on two cores. No CUDA toolkit: the headers come from NVIDIA's Python packages, and only C++ is
compiled.
Three measures bring 350 MB of libraries down to an archive of 24 MiB:

- the machine code for every architecture other than ``ARCH`` is overwritten with zeros, which compress to nothing;
- symbol tables, the JAX bindings and the NCCL expert-parallel library (it needs NCCL 2.30.4 or newer) are left out;
- packages that the target has (torch, triton, numpy, einops, onnx, onnxscript, the nvidia-* libraries) are not carried.

On the target, with the same torch and Python versions:

    mkdir te && tar -xJf transformer_engine.tar.xz -C te
    export PYTHONPATH=$PWD/te
    python3 -c "import torch, transformer_engine.pytorch"     # torch first: it loads NCCL
"""

import argparse
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

PYTHON = (3, 12)
TORCH = "2.11.0"  # its default wheel is built with CUDA 13.0
CUDA = "13.0"
TRANSFORMER_ENGINE = "2.20.2"
ARCH = 90  # compute capability times 10; 90 also keeps the sm_90a variants

BUILD_PACKAGES = [
    f"torch=={TORCH}",
    *(f"nvidia-cuda-crt=={CUDA}.*", f"nvidia-cuda-cccl=={CUDA}.*"),  # headers that torch's own CUDA packages lack
    *("setuptools", "wheel", "ninja", "pybind11", "numpy", "packaging"),
    *("einops", "onnx", "onnxscript"),  # imported by Transformer Engine; the target has them
]
# Python modules, core library and torch extension; the last is a source distribution and is compiled here.
TARGET_PACKAGES = [f"transformer-engine{part}=={TRANSFORMER_ENGINE}" for part in ("", "-cu13", "-torch")]
TARGET_DEPENDENCIES = ["pydantic"]
EXCLUDED = ["jax", "wheel_lib/nccl_ep", "wheel_lib/libnccl_ep.so"]  # in the package transformer_engine

FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, header bytes, payload bytes
# Kind, version, header bytes, payload bytes, (8 bytes), minor and major version of the payload, architecture.
ENTRY_HEADER = struct.Struct("<HHIQ8xHHI")
CUBIN = 2  # kind of an entry that holds machine code; 1 is PTX


def create_environment(work: Path) -> Path:
    """Create a virtual environment with torch and the build tools in `work`/venv; returns its interpreter."""
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *BUILD_PACKAGES], check=True)
    return python


def install(python: Path, site: Path) -> None:
    """Install Transformer Engine and the dependencies missing on the target into the folder `site`.

    The torch extension is compiled against the torch and the CUDA headers of `python`'s environment.
    """
    packages = python.parents[1] / "lib" / "python{}.{}".format(*PYTHON) / "site-packages"
    environment = os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        "CPATH": str(packages / "nvidia" / "cu13" / "include" / "cccl"),
        # One header of the extension defines this macro, but not all files include it before pybind11. The layout of
        # pybind11::arg_v then differs between files, and the import can end in a double free. Define it for all files.
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} -DPYBIND11_DETAILED_ERROR_MESSAGES=".strip(),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",  # headers from the nvidia-* packages, not from a local toolkit
        "NVTE_CUDA_ARCHS": str(ARCH),
        "NVTE_WITH_NCCL_EP": "0",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # do not search for a prebuilt wheel
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),  # about 1 GB of memory a job
    }
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--target", site]
    # One call, because the first two packages share the folder transformer_engine.
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *TARGET_PACKAGES], check=True, env=environment)
    subprocess.run([*pip, *TARGET_DEPENDENCIES], check=True)


def section_range(data: bytes | bytearray, name: str) -> tuple[int, int]:
    """File offsets (start, end) of section `name` in the 64-bit ELF file `data`; raises KeyError if it has none."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    # A section header: offset of the name (4 bytes), ..., file offset and size (8 bytes each, from byte 24).
    headers = [struct.unpack_from("<I20xQQ", data, table + i * size) for i in range(count)]
    for name_offset, offset, length in headers:
        start = headers[names_index][1] + name_offset
        if data[start : data.index(b"\0", start)].decode() == name:
            return offset, offset + length
    raise KeyError(name)


def fatbin_entries(data: bytes | bytearray, start: int, end: int):
    """Yield (kind, architecture, payload start, payload end) of each entry, one list per fat binary in [start, end).

    The layout is not documented; it was read from the files. A wrong magic or length raises ValueError.
    """
    at = start
    while at < end:
        if not any(data[at : at + 8]):  # padding between two fat binaries
            at += 8
            continue
        magic, _, header, size = FATBIN_HEADER.unpack_from(data, at)
        if magic != FATBIN_MAGIC:
            raise ValueError(f"no fat binary at file offset {at:#x} of the library: found magic {magic:#x}")
        at, stop, entries = at + header, at + header + size, []
        while at < stop:
            kind, _, header, size, _, _, architecture = ENTRY_HEADER.unpack_from(data, at)
            entries.append((kind, architecture, at + header, at + header + size))
            at += header + size
        if at != stop or stop > end:
            raise ValueError(f"the entries of a fat binary end at file offset {at:#x}, not at {stop:#x}")
        yield entries


def zero_other_architectures(library: Path) -> tuple[int, int]:
    """Overwrite in place the cubins of `library` that are not for `ARCH`; returns the bytes (kept, zeroed).

    Headers, sizes and offsets stay, so that the CUDA runtime can still walk the entries. A fat binary without a cubin
    for `ARCH` stays whole.
    """
    data = bytearray(library.read_bytes())
    kept = zeroed = 0
    for entries in fatbin_entries(data, *section_range(data, ".nv_fatbin")):
        prune = any(kind == CUBIN and architecture == ARCH for kind, architecture, _, _ in entries)
        for kind, architecture, start, end in entries:
            if prune and kind == CUBIN and architecture != ARCH:
                data[start:end] = bytes(end - start)
                zeroed += end - start
            else:
                kept += end - start
    library.write_bytes(data)
    return kept, zeroed


def shrink(site: Path) -> None:
    """Remove from `site` what an `ARCH` GPU and torch do not need."""
    for name in EXCLUDED:
        path = site / "transformer_engine" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    kept, zeroed = zero_other_architectures(site / "transformer_engine" / "wheel_lib" / "libtransformer_engine.so")
    print(f"GPU code: kept {kept / 1e6:.1f} MB, zeroed {zeroed / 1e6:.1f} MB")
    for library in site.rglob("*.so"):
        subprocess.run(["strip", "--strip-unneeded", library], check=True)


def pack(site: Path, archive: Path) -> None:
    """Write the files of `site` to `archive` as .tar.xz, with the filter that makes x86 code compress better."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    with lzma.open(archive, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(site.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(site))
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    out = parser.parse_args().out_dir.resolve()
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"Python {sys.version.split()[0]} was found; the target needs {PYTHON[0]}.{PYTHON[1]}: run with that.")
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    python = create_environment(out)
    install(python, site)
    shrink(site)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([python, "-c", "import torch, transformer_engine.pytorch"], check=True, env=environment)
    pack(site, out / "transformer_engine.tar.xz")


if __name__ == "__main__":
    main()
