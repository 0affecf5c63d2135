"""Learning-rate schedules: pure functions of the step. All warm up linearly; steps count from 1."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["warmup_decay", "cosine", "wsd", "constant"]
WSD_DECAY = 0.1  # warmup-stable-decay: the last tenth of the steps decays


def factor(schedule: Schedule, step: int, total: int, warmup_ratio: float) -> float:
    """The share of the peak learning rate at `step` of `total`, in (0, 1].

    warmup_decay: linear to 0 (RECIPE section 3; as DeepSpeed's WarmupDecayLR with linear warmup). cosine: half a
    cosine to 0. wsd: flat, then linear to 0 (arXiv 2404.06395). constant: flat. The decay would reach 0 at step
    total + 1, so the last step still learns.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    left = total + 1 - step
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        return min(1.0, left / (math.ceil(WSD_DECAY * total) + 1))
    linear = left / (total + 1 - max(warmup, 1))  # 1 at the step that ends the warmup
    return linear if schedule == "warmup_decay" else 0.5 * (1 - math.cos(math.pi * linear))
