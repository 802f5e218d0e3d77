"""The cost of what layers of a language model read of a memory, without running anything.

What a reader makes of a memory is traced on shapes alone (lib/cost/jaxpr.py); changes of low rank
to the layers' own products are counted by their factors.

Axes: C crops of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax

from lib.cost import jaxpr
from models.backbones.vlm import VLM
from models.checkpoints.compressors import reader_example, reader_shapes
from models.memory import Changes, Reader, States
from models.projectors.base import Compressor
from ops.primitives.grids import Grid


@dataclasses.dataclass(frozen=True)
class MemoryCost:
  """Holds the cost of a memory for one row.

  Bytes that its products read and write are not counted.

  Attributes:
    macs: multiply-accumulates of a prompt: what is made of the memory, and what its tokens read.
    decode_macs: of a token that is decoded.
    parameters: numbers of the reader.
    kept_bytes: of what the cache carries of it.
  """

  macs: int = 0
  decode_macs: int = 0
  parameters: int = 0
  kept_bytes: int = 0


def of(vlm: VLM, prompt: int, crops: int = 1) -> MemoryCost:
  """Returns the cost of a model's memory for one row, nothing where it leaves none.

  Args:
    vlm: the model.
    prompt: ids of the row.
    crops: C.
  """
  reader, compressor = vlm.lm.reader, vlm.compressor
  if reader is None or compressor is None:
    return MemoryCost()
  grid, width = vlm.tower.grid, vlm.tower.width
  shapes = reader_shapes(compressor, reader, grid, width)
  macs, decode_macs, kept = _traced(compressor, reader, grid, width, prompt, crops)
  return MemoryCost(macs, decode_macs, sum(map(math.prod, shapes.values())), kept)


@functools.lru_cache(maxsize=64)
def _traced(compressor: Compressor, reader: Reader, grid: Grid, width: int, prompt: int,
            crops: int) -> tuple[int, int, int]:
  """Counts MACs of a prompt and of a decoded token, and bytes that are kept."""
  memory, tokens = jax.eval_shape(
      lambda: reader_example(compressor, grid, width, prompt, crops))
  params = jax.eval_shape(reader.init, jax.random.key(0), memory, tokens)
  states, kept, _ = jax.eval_shape(reader.apply, params, memory, tokens)

  def follow(params: Any, kept: States, x: jax.Array) -> list[Any]:
    return [reader.apply(params, layer, x, state, method='read_text')
            for layer, state in kept.items()]

  one = jax.ShapeDtypeStruct((1, 1, compressor.width), compressor.dtype)
  decode = _of_factors(kept.values(), 1)
  if reader.site == 'between':
    decode += jaxpr.count(follow, params, kept, one).total
  macs = jaxpr.count(reader.apply, params, memory, tokens).total
  return (macs + _of_factors(states.values(), tokens.slots), decode,
          sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)))


def _of_factors(states: Iterable[Any], tokens: int) -> int:
  """MACs of the changes to products."""
  return sum(tokens * factors.a.shape[2] * (factors.a.shape[1] + factors.b.shape[1])
             for state in states if isinstance(state, Changes)
             for factors in state.products.values())
