"""The cost of what stands between a tower and a language model, without running anything.

An MLP is counted by formula. A compressor is traced on shapes alone (lib/cost/jaxpr.py): each has
products of its own, and published figures check the sums (tests/cost/test_projector_cost.py).

Axes: C crops of a row, I images of a row, V tokens of an image, W width of the tower, D width of
the language model.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lib.cost import jaxpr
from lib.cost import lm as lm_cost
from models.backbones.images import Layout
from models.backbones.spans import grids_read
from models.backbones.vlm import VLM
from models.checkpoints.compressors import example, shapes_of
from models.projectors.base import QUESTION, Compressor
from ops.primitives.grids import Grid


@dataclasses.dataclass(frozen=True)
class ProjectorCost:
  """Holds the cost of projecting the crops of one row.

  Attributes:
    macs: multiply-accumulates; those of reading the question alone, too, where that is read.
    parameters: numbers.
    activation_bytes: that its products read and write; of a compressor, of what goes in and comes
      out alone.
    question_macs: of the MACs, those of reading the question alone, through which no gradient
      flows.
  """

  macs: int
  parameters: int
  activation_bytes: int
  question_macs: int = 0

  @property
  def training_macs(self) -> int:
    """MACs of a forward and a backward pass."""
    return 3 * self.macs - 2 * self.question_macs


def of(vlm: VLM, prompt: int, layout: Layout = (1, 1, 0)) -> ProjectorCost:
  """Returns the cost of a model's projector for one row.

  Args:
    vlm: the model, with its plans.
    prompt: ids of the row.
    layout: (C, I, V), as `models.backbones.images.Images.layout`.

  Raises:
    ValueError: as `models.backbones.spans.grids_read`.
  """
  wide, size = vlm.lm.width, jnp.dtype(vlm.lm.dtype).itemsize
  if vlm.compressor:
    width = vlm.tower.width
    number, grid = grids_read(vlm.compressor, vlm.tower.grid, layout)
    macs, asked = number * traced_macs(vlm.compressor, grid, width, prompt), 0
    if QUESTION in vlm.compressor.reads:
      alone = lm_cost.of(vlm.lm.clone(plan=None, cache_plan=None), prompt)
      asked = alone.macs - alone.head
    shapes = shapes_of(vlm.compressor, grid, width)
    moved = math.prod(grid) * width + vlm.compressor.slots(grid) * wide
    return ProjectorCost(macs + asked, sum(map(math.prod, shapes.values())), number * moved * size,
                         asked)
  if not vlm.projection:
    return ProjectorCost(0, 0, 0)
  narrow = vlm.side ** 2 * vlm.tower.width
  # Once more for each layer of the tower that is added later.
  through = (1 + len(vlm.deepstack)) * layout[0] * vlm.passed_on[1]
  parameters = (narrow + 1) * wide + (wide + 1) * wide + (2 * narrow if vlm.side > 1 else 0)
  return ProjectorCost(through * (narrow + wide) * wide, parameters,
                       through * (vlm.tower.width + 3 * wide) * size)


@functools.lru_cache(maxsize=256)
def traced_macs(compressor: Compressor, grid: Grid, width: int, prompt: int = 1) -> int:
  """Counts the multiply-accumulates of compressing one crop, or all of an image at once.

  Args:
    compressor: the module.
    grid: of the patches.
    width: W.
    prompt: ids of the text, for one that reads it.
  """
  shapes = jax.eval_shape(lambda: example(compressor, grid, width, prompt))
  params = jax.eval_shape(compressor.init, jax.random.key(0), *shapes)
  return jaxpr.count(compressor.apply, params, *shapes).total
