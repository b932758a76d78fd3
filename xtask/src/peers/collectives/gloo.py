"""One rank of torch.distributed's gloo: times all_reduce (sum, f32) as crates/collectives/src/bench.rs does.

A call's time is the median over samples, each taken on its slowest rank, from a barrier on; short vectors are timed in
batches. Rank 0 prints one JSON object for each length.
"""
import json
import sys
import time

import torch
import torch.distributed as dist

rank, world, master, budget = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"tcp://{master}")
for size in map(int, sys.argv[5:]):
    count = size // 4
    batch = max(1, min(100, 65536 // (count + 1)))
    vector, samples = torch.zeros(count), []
    dist.all_reduce(vector)
    began, again = time.perf_counter(), True
    while again:
        vector.zero_()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(batch):
            dist.all_reduce(vector)
        samples.append((time.perf_counter() - start) / batch)
        more = len(samples) < 5 or (time.perf_counter() - began < budget and len(samples) < 1000)
        flag = torch.tensor([1 if more else 0])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        again = bool(flag.item())
    slowest = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if rank == 0:
        micros = sorted(slowest.tolist())[len(samples) // 2] * 1e6
        print(json.dumps({"bytes": size, "micros": micros}), flush=True)
dist.destroy_process_group()
