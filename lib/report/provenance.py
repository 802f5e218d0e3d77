"""Traces which patches of an image a vision-language model still sees after each reduction.

Axes: B batch, C crops of a row, I images of a row, n patches (cells of a Qwen tower) of a crop, V
tokens of an image, N slots of a sequence, T original tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.backbones.qwen_vision import QwenVision
from models.backbones.vlm import VLM
from ops.primitives.grids import nearest_cell
from ops.tokens import TokenSet

Array = np.ndarray
GONE = -1


@dataclasses.dataclass(frozen=True)
class Stage:
  """Holds the patches of a row's crops after one reduction.

  Attributes:
    name: where, as 'vision', 'projector' or 'language, layer 2'.
    labels: int[C, rows, columns], which token holds each patch, -1 where none does any more. A
      patch of several tokens has the first that is left.
    merged: bool[C, rows, columns], whether a reduction joined it with others.
    tokens: int[I], tokens left that hold something of each image, line ends among them.
  """

  name: str
  labels: Array
  merged: Array
  tokens: Array


def grid(vlm: VLM) -> tuple[int, int]:
  """Returns rows and columns of the tower's features."""
  return vlm.tower.cells if isinstance(vlm.tower, QwenVision) else vlm.tower.grid


def stages(vlm: VLM, out: Mapping[str, Any], row: int = 0) -> list[Stage]:
  """Returns the patches of a row's images after each reduction, in the order of the model.

  Args:
    vlm: the model with its reductions.
    out: the auxiliary outputs of a prompt (`VLM.__call__`).
    row: of the batch.

  Raises:
    ValueError: a projector whose tokens are no grid of a crop, so that each stands for all patches,
      or for several crops.
  """
  if vlm.compressor and (vlm.joins_crops or not vlm.compressor.grid_after(vlm.tower.grid)):
    raise ValueError(f'each token of {type(vlm.compressor).__name__} stands for all patches of its '
                     'crop, or for several crops: there is no picture of which went where')
  seen, visual, projected = out['tower_tokens'], out['visual'], out.get('projector')
  batch, images = visual.x.shape[:2]
  crops, each = len(seen.x) // batch, seen.slots
  # Patches to what the tower passes on, and tokens to what of that they are made of.
  owners = [_now(seen, row * crops + crop) for crop in range(crops)]
  if vlm.side > 1:  # Several patches are one token before the projector.
    cells = nearest_cell(grid(vlm), tuple(length // vlm.side for length in grid(vlm)))
    owners = [_follow(cells, own) for own in owners]
  passed = _numbered(owners, each)
  if out['layout'] is None:
    index = np.arange(crops * each)[:, None]
    holds = np.isin(index, passed)
  else:
    index, weight = (np.asarray(part[row]).reshape(-1, part.shape[-1]) for part in out['layout'])
    holds = weight > 0
  now = np.where(holds.any(axis=1), np.arange(len(index)), GONE)
  # Line ends are made of no patch.
  holds = holds & (index < crops * each)

  def stage(name: str, now: Array) -> Stage:
    token, tap = np.nonzero(holds & (now >= 0)[:, None])
    holder = np.full(crops * each, GONE)
    holder[index[token, tap][::-1]] = now[token][::-1]
    labels = _follow(passed, holder)
    patches, members = (np.bincount(part[part >= 0], minlength=1) for part in (passed, now))
    merged = (labels >= 0) & (
        (_follow(passed, patches) > 1) | (_follow(labels, members) > 1))
    tokens = [len(np.unique(own[own >= 0])) for own in np.split(now, images)]
    shape = (crops, *grid(vlm))
    return Stage(name, labels.reshape(shape), merged.reshape(shape), np.asarray(tokens))

  reduced = vlm.compressor or (vlm.tower.plan and vlm.tower.plan.events)
  traced = [stage('vision', now)] if reduced else []
  pooled = projected is not None and len(projected.owner) == batch and images > 1
  if projected is not None:
    across = len(projected.owner) // batch
    now = _follow(now, _numbered([_now(projected, row * across + part) for part in range(across)],
                                 projected.slots))
    traced.append(stage('projector', now))
  now = _follow(now, _entered(out, row, pooled))
  for layer, cut in sorted(out['cuts'].items()):
    traced.append(stage(f'language, layer {layer}', _follow(now, _now(cut, row))))
  return traced


def _entered(out: Mapping[str, Any], row: int, pooled: bool) -> Array:
  """Returns int[I * M], or int[M] of a pool: the slot of the sequence of each visual token."""
  visual, group = out['visual'], np.asarray(out['sequence'].stats['group'][row])
  images, left = visual.x.shape[1:3]
  real = np.ones((images, left), bool) if visual.valid is None else np.asarray(visual.valid[row])
  slots = np.full(left if pooled else images * left, GONE)
  for image in range(images):
    tokens, places = np.flatnonzero(real[image]), np.flatnonzero(group == image)
    # An image without a placeholder went nowhere.
    tokens = tokens[:len(places)]
    slots[tokens + (0 if pooled else image * left)] = places
  return slots


def _now(tokens: TokenSet, row: int) -> Array:
  """Returns int[T], the real slot that holds each original token, -1 for none."""
  owner, real = np.asarray(tokens.owner[row]), np.asarray(tokens.real[row])
  return np.where((owner >= 0) & real[np.maximum(owner, 0)], owner, GONE)


def _numbered(parts: list[Array], slots: int) -> Array:
  """Numbers the slots of several parts, of `slots` each, as slots of the whole."""
  return np.concatenate([np.where(part >= 0, part + number * slots, GONE)
                         for number, part in enumerate(parts)])


def _follow(now: Array, then: Array) -> Array:
  """Composes two slot maps: for each token, the slot after the second reduction."""
  return np.where(now >= 0, then[np.maximum(now, 0)], GONE)
