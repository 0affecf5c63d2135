"""Before the first step: a packed row must give what its documents give alone, on this machine with this attention."""

from __future__ import annotations

import torch

from pandallm import log
from pandallm.data.loader import Document, collate
from pandallm.data.shards import Shards
from pandallm.train.objectives import CausalLM

TOKENS = 512  # of a row that are looked at
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the output's norm


class Contaminated(Exception):
    """Documents of a row see each other: a loss computed so would be wrong."""


@torch.no_grad()
def check(module: CausalLM, shards: Shards, device: torch.device) -> None:
    """Raises Contaminated where the output [T, D] of a packed row differs from that of its documents alone.

    Every rank looks at the same row, which ZeRO-3 needs.
    """
    documents = _documents(shards)
    training = module.training
    module.eval()  # dropout would draw anew
    packed = module.hidden(collate(documents, rows=[]).to(device))[0].float()
    alone = torch.cat([module.hidden(collate([d], rows=[]).to(device))[0].float() for d in documents])
    module.train(training)
    error = float((packed - alone).norm(dim=-1).max() / alone.norm(dim=-1).mean())
    dtype = next(module.parameters()).dtype
    if not error <= TOLERANCE[dtype] and torch.isfinite(alone).all():
        raise Contaminated(
            f"a row of {len(documents)} documents gives another output than they give alone ({error:.2g} of its norm):"
            f" attention crosses their borders. torch {torch.__version__}, {module.model.config.model_type},"
            f" {device.type}, {dtype}"
        )
    log.say(f"packed = alone: checked on {len(documents)} documents")


def _documents(shards: Shards) -> list[Document]:
    """The beginnings of up to four documents, of the first row that has two, else of the first two rows."""
    rows = [shards.row(i).tolist() for i in range(min(len(shards), 64))]
    numbers = next((row for row in rows if len(row) > 1), [number for row in rows[:2] for number in row])
    found = [shards.document(number) for number in numbers[:4]]
    return [(ids[: TOKENS // len(found)], mask[: TOKENS // len(found)]) for ids, mask in found]
