"""Every stand-in for and patch of torch and megatron-core; written for megatron-core 0.19.2.

    cpu_backend     torch.cuda functions and megatron-core's CUDA calls on machines without CUDA
    groups          a second parallel layout in one process; process groups that span two torch.distributed worlds
    models          final norm by the layer spec, hidden states without the output head, Llama 3.1's rotary scaling,
                    gradient accumulation by Transformer Engine without Apex
    key_value_cache attention over cached keys and values
    training        check of the gradient norm before the optimizer step, early wait for the output head's weights
    optimizer_state the distributed optimizer's state by parameter
    checkpoint      safe readers in `dist_checkpointing.load`, private functions of the save path

Each docstring says why its patch is needed; tests/parallel/test_megatron_patches.py
fails when the library stops needing one. Importing
this package prepares the CPU backend, so a patch may import megatron.core.

These private names are used elsewhere, because they are part of what is written or read there, not of a patch:
`checkpoint.safe_metadata` names the classes of torch's checkpoint index and overrides `FileSystemReader._slice_file` to check
each item; `distill.profile` calls `torch.cuda.memory._record_memory_history`, which torch documents under this name.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version

from minitron_mcore.parallel.megatron_patches import cpu_backend

MEGATRON_CORE = "0.19.2"

try:
    _installed = version("megatron-core")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    _installed = ""
# A warning, not an error: setup.py already pins the version, so another one was installed on purpose.
if _installed and _installed.rsplit(".", 1)[0] != MEGATRON_CORE.rsplit(".", 1)[0]:
    warnings.warn(
        f"megatron-core is {_installed}, but this package's patches are for {MEGATRON_CORE}: install that version, or run "
        "tests/parallel/test_megatron_patches.py to see which patches still fit.",
        stacklevel=2,
    )
cpu_backend.prepare()
