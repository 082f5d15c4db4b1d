"""The GPT on DeepSpeed's ZeRO-1, 2, 3 over dp, with torch's fused AdamW (none of DeepSpeed's compiled operations)."""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, adamw
from work import CLIP, Step, rows

BUCKET = 2**23  # elements: 32 MiB, as hpcpar's; the default of 5e8 would take 2 GB a rank


def open_program(tp: int, pp: int, dp: int, batch: int, zero: int) -> Step:
    """Return this rank's training step."""
    assert tp == pp == 1 and zero in (1, 2, 3)
    model, own_batch = GPT(0, 1), batch // dp
    wish = {
        "train_batch_size": batch, "train_micro_batch_size_per_gpu": own_batch, "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET,
                              "stage3_prefetch_bucket_size": BUCKET},
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model), config=wish)

    def step(number: int) -> float:
        mine = rows(number * batch + dist.get_rank() * own_batch, own_batch)
        loss = F.cross_entropy(engine(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step
