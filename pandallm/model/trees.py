"""Texts that begin alike, run as one: what they share is computed once, and each token sees its own text alone.

A tree holds every token of its texts once; a token's place in its text is its depth. B = trees, T = tokens of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

WORTH = 0.25  # of a text: the least that it shares with its neighbour for both to be in one tree
ROOM = 1024  # tokens of a tree, or twice its first text: attention is over all pairs in a tree
IN_CACHE = 1024  # tokens that a CPU reads at once: more are slower there (a third at 4096), fewer no faster

Segment = tuple[int, list[int]]  # where new tokens start in a tree, and the path that leads to them


@dataclass(frozen=True)
class Tree:
    ids: list[int]  # [T]
    paths: dict[int, list[int]]  # number of a text -> its tokens' places in `ids`
    segments: list[Segment]

    def positions(self) -> list[int]:
        """Each token's place in its text."""
        found = [0] * len(self.ids)
        for path in self.paths.values():
            for depth, place in enumerate(path):
                found[place] = depth
        return found

    def mask(self, width: int) -> torch.Tensor:
        """[width, width]: who sees whom. Padding sees itself: a row of nothing would be no number."""
        seen = torch.eye(width, dtype=torch.bool)
        ends = [start for start, _ in self.segments[1:]] + [len(self.ids)]
        for (start, before), end in zip(self.segments, ends, strict=True):
            seen[start:end, before] = True
            seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        return seen


def grow(texts: Sequence[Sequence[int]], share: bool = True) -> list[Tree]:
    """Trees that hold every text once, in no special order. `share`: False for a tree a text.

    What is in a tree depends on the texts alone, never on how many are run at once.
    """
    trees: list[Tree] = []
    before: list[int] = []
    for number in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        text = list(texts[number])
        common = len(commonprefix([before, text]))  # of any sequences
        tree = trees[-1] if trees else None
        if tree is None or not share or not _fits(tree, len(text), common):
            trees.append(tree := Tree([], {}, []))
            common = 0
        else:
            last = next(reversed(tree.paths.values()))
        start = len(tree.ids)
        path = last[:common] if common else []
        if common < len(text):
            tree.segments.append((start, path))
            tree.ids.extend(text[common:])
        tree.paths[number] = path + list(range(start, len(tree.ids)))
        before = text
    return trees


def _fits(tree: Tree, length: int, common: int) -> bool:
    first = len(next(iter(tree.paths.values())))
    return common >= WORTH * length and len(tree.ids) + length - common <= max(ROOM, 2 * first)


def can_share(model: PreTrainedModel, longest: int) -> bool:
    """Whether a mask of ours can stand for the model's own: not where its attention has a window that texts outgrow."""
    window = getattr(model.config, "sliding_window", None)
    return window is None or longest <= window


def run(model: PreTrainedModel, trees: Sequence[Tree], cache: DynamicCache | None = None) -> torch.Tensor:
    """The last layer's states [B, T, H] of trees, padded on the right to the longest; keys and values go to `cache`."""
    width = max(len(tree.ids) for tree in trees)

    def padded(rows: Sequence[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)  # [B, T]

    how = {}  # a text alone is plain causal attention: it doesn't look at the padding behind it
    if any(len(tree.segments) > 1 for tree in trees):
        mask = torch.stack([tree.mask(width) for tree in trees])[:, None].to(model.device)  # [B, 1, T, T]
        how = {"attention_mask": mask, "position_ids": padded([tree.positions() for tree in trees])}
    states: torch.Tensor = model.base_model(
        input_ids=padded([tree.ids for tree in trees]), past_key_values=cache, use_cache=cache is not None, **how
    ).last_hidden_state
    return states


def runs(trees: Sequence[Tree], at_once: int) -> list[tuple[int, int]]:
    """First and last of trees in a row, as many as hold `at_once` tokens with their padding; one at least."""
    found: list[tuple[int, int]] = []
    start = width = 0
    for i, tree in enumerate(trees):
        width = max(width, len(tree.ids))
        if i > start and (i + 1 - start) * width > at_once:
            found.append((start, i))
            start, width = i, len(tree.ids)
    return [*found, (start, len(trees))]


def unfold(cache: DynamicCache, trees: Sequence[Tree], width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's keys and values [N, K, W, D] of every text on its own, in the order of the trees and of their paths,
    padded on the left to `width`."""
    paths = [(row, path) for row, tree in enumerate(trees) for path in tree.paths.values()]
    rows = torch.tensor([[row] for row, _ in paths])  # [N, 1]
    places = torch.tensor([[0] * (width - len(path)) + path for _, path in paths])  # [N, W]
    layers: list[Any] = cache.layers
    found = []
    for layer in layers:
        device = layer.keys.device
        index = rows.to(device), slice(None), places.to(device)
        # Indices around a slice move to the front: [N, W, K, D]
        found.append((layer.keys[index].transpose(1, 2), layer.values[index].transpose(1, 2)))
    return found


def join(parts: Sequence[list[tuple[torch.Tensor, torch.Tensor]]]) -> DynamicCache:
    """One cache of the texts of several `unfold`s, which are of one width."""
    cache = DynamicCache()
    for i, layers in enumerate(zip(*parts, strict=True)):
        keys, values = zip(*layers, strict=True)
        cache.update(torch.cat(keys), torch.cat(values), i)
    return cache
