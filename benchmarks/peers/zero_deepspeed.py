"""The GPT on DeepSpeed's ZeRO-1, 2, 3 over dp, with torch's fused AdamW (none of DeepSpeed's compiled operations)."""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, adamw
from work import CLIP, Step, Weights, Work, rows

BUCKET = 2**23  # elements: 32 MiB, as hpcpar's; the default of 5e8 would take 2 GB a rank


def open_program(work: Work, weights: Weights) -> Step:
    """Return this rank's training step."""
    assert work.tp == work.pp == 1 and work.zero in (1, 2, 3)
    model = GPT(0, 1, weights)
    wish = {
        "train_batch_size": work.batch, "train_micro_batch_size_per_gpu": work.own_batch, "gradient_clipping": CLIP,
        "zero_optimization": {"stage": work.zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET,
                              "stage3_prefetch_bucket_size": BUCKET},
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model), config=wish)

    def step(number: int) -> float:
        mine = rows(number * work.batch + dist.get_rank() * work.own_batch, work.own_batch)
        loss = F.cross_entropy(engine(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step
