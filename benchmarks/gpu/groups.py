"""Seconds to enter and leave a world with megatron-core's groups: NCCL's communicators made as they are used, or all at once."""

import time
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import process_groups

make = dist.init_process_group


def main() -> None:
    for name, options in {"as used": {}, "at once": {"device_id": torch.device("cuda", 0)}}.items():
        for _ in range(2):
            start = time.perf_counter()
            with (
                patch.object(dist, "init_process_group", partial(make, **options)),
                process_groups.distributed_context(ParallelConfig()),
            ):
                dist.all_reduce(torch.ones(1, device="cuda"))
                torch.cuda.synchronize()
                entered, free = time.perf_counter(), torch.cuda.mem_get_info()[0] / 2**30
            seconds = entered - start, time.perf_counter() - entered
            print(f"{name}: {seconds[0]:.2f} s to enter, {seconds[1]:.2f} s to leave, {free:.2f} GiB free", flush=True)


if __name__ == "__main__":
    main()
