"""A rank of a program that hpcpar is measured beside, over gloo; no hpcpar in here.

    MASTER_PORT=29511 mpirun -n 8 .venv-peers/bin/python benchmarks/peers/rank.py PROGRAM TP PP DP FILE

FILE holds the first weights. Rank 0 prints one JSON object: seconds_per_step, losses, and of every rank its memory.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import import_module

import torch
import torch.distributed as dist
from work import WARM_UP, Work, peak_memory, timed

PROGRAMS = {"plain": "plain", "zero_bubble": "zero_bubble", "fsdp2": "fsdp2", "deepspeed": "zero_deepspeed",
            "accelerate": "gpt2_accelerate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("sizes", type=int, nargs=3, metavar=("TP", "PP", "DP"))
    parser.add_argument("weights", help="hpcpar's first weights by name (torch.save)")
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="what is sharded over dp")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=1, help="sequences, of a pipeline")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    rank, size = os.environ.get("PMI_RANK", "0"), os.environ.get("PMI_SIZE", "1")
    # the names of torchrun, which libraries read themselves
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1")
    if size != "1":
        os.environ["LOCAL_RANK"] = rank
    dist.init_process_group("gloo")
    program, work = import_module(PROGRAMS[args.program]), Work(*args.sizes, args.zero, args.batch, args.microbatch)
    step = program.open_program(work, torch.load(args.weights, mmap=True))
    seconds, losses = timed(step, dist.barrier, args.steps)
    mine = losses, peak_memory(lambda: step(WARM_UP + args.steps))
    ranks: list = [None] * int(size)
    dist.all_gather_object(ranks, mine)
    if rank == "0":
        known = [losses for losses, _ in ranks if losses[0] is not None]
        means = [sum(step) / len(known) for step in zip(*known, strict=True)]
        memory = [memory for _, memory in ranks]
        print(json.dumps({"seconds_per_step": seconds, "losses": means, "memory": memory}), flush=True)
    dist.barrier()
    os._exit(0)  # taking gloo's groups down has hung


if __name__ == "__main__":
    main()
