"""Time to enter and leave a world of one rank, with megatron-core's groups: NCCL's communicators made as they are used, or at once."""

import time
from unittest.mock import patch

import torch
import torch.distributed as dist

from minitron_mcore import runtime
from minitron_mcore.config import ParallelConfig

make = dist.init_process_group
for name, options in {"lazy": {}, "eager": {"device_id": torch.device("cuda", 0)}}.items():
    for _ in range(2):
        start = time.perf_counter()
        with (
            patch.object(dist, "init_process_group", lambda *a, **k: make(*a, **k, **options)),
            runtime.distributed(ParallelConfig()),
        ):
            dist.all_reduce(torch.ones(1, device="cuda"))
            torch.cuda.synchronize()
            entered = time.perf_counter()
            before = torch.cuda.mem_get_info()[0]
        left = time.perf_counter()
        print(
            f"{name}: {entered - start:.2f} s to enter, {left - entered:.2f} s to leave, {before / 2**30:.2f} GiB free",
            flush=True,
        )
