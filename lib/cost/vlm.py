"""The cost of a vision-language model, without running anything: tower, projector, language model.

Where a compressor leaves a memory, what layers of the language model read of it is counted apart.

Axes: C crops of a row, I images of a row, V tokens of an image (`models.backbones.images.Images`),
W width of the tower, D width of the language model.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lib.cost import lm as lm_cost
from lib.cost import memory as memory_cost
from lib.cost import projector as projector_cost
from lib.cost import vit as vit_cost
from models.backbones.images import Layout
from models.backbones.lm import LM
from models.backbones.spans import grids_read
from models.backbones.vlm import VLM


@dataclasses.dataclass(frozen=True)
class VLMCost:
  """Holds the cost of a model for one row: its images, and a prompt.

  Attributes:
    vlm: the model.
    crops: C, rows of the tower.
    passed: tokens of a crop that the tower passes on.
    projected: tokens of the row behind the projector, before they are laid out.
    visual_in: visual tokens of the row before the projector's reduction.
    visual: visual slots that the language model reads.
    tower: the cost of one crop, its parameters in the dtype of the language model's, as checkpoints
      are loaded.
    projector: the cost of what stands between both, for all crops.
    lm: the cost of the language model, visual slots included.
    memory: what its layers read beside them.
  """

  vlm: VLM
  crops: int
  passed: int
  projected: int
  visual_in: int
  visual: int
  tower: vit_cost.Cost
  projector: projector_cost.ProjectorCost
  lm: lm_cost.LMCost
  memory: memory_cost.MemoryCost

  @property
  def tower_macs(self) -> int:
    """MACs of the tower over all crops."""
    return self.crops * self.tower.macs

  @property
  def projector_macs(self) -> int:
    """MACs of the projector over all crops."""
    return self.projector.macs

  @property
  def projector_parameters(self) -> int:
    """Numbers between tower and language model: projector, newline, and the patches' probe."""
    vlm = self.vlm
    return (self.projector.parameters + vlm.newline * vlm.lm.width
            + vlm.patch_labels * (vlm.tower.width + 1))

  @property
  def macs(self) -> int:
    """MACs of reading the images and the prompt."""
    return self.tower_macs + self.projector_macs + self.lm.macs + self.memory.macs

  @property
  def weight_bytes(self) -> int:
    """Bytes of all parameters."""
    size = jnp.dtype(self.vlm.lm.dtype).itemsize
    between = self.projector_parameters + self.memory.parameters
    return self.tower.weight_bytes + size * between + self.lm.weight_bytes

  @property
  def projector_activation_bytes(self) -> int:
    """Bytes that the projector's products read and write."""
    return self.projector.activation_bytes

  @property
  def activation_bytes(self) -> int:
    """Bytes that all products read and write beside the parameters."""
    return (self.crops * self.tower.activation_bytes + self.projector_activation_bytes
            + self.lm.activation_bytes)


def macs_of(model: LM | VLM, prompt: int, layout: Layout | None) -> float:
  """Returns the MACs of reading a prompt and its images, under the plans of a model.

  Args:
    model, prompt, layout: as in `of`; an LM, or None for layout, reads text alone.
  """
  if isinstance(model, VLM) and layout is not None:
    return of(model, prompt, layout).macs
  return lm_cost.of(model.lm if isinstance(model, VLM) else model, prompt).macs


def kv_bytes_of(model: LM | VLM, prompt: int, layout: Layout | None) -> float:
  """Returns the bytes that the cache of one row holds behind a prompt and its images.

  Args:
    model, prompt, layout: as in `macs_of`.
  """
  if isinstance(model, VLM) and layout is not None:
    return of(model, prompt, layout).lm.kv_bytes
  return lm_cost.of(model.lm if isinstance(model, VLM) else model, prompt).kv_bytes


def of(vlm: VLM, prompt: int, layout: Layout, *, room: int = 0) -> VLMCost:
  """Returns the cost of a model under its plans.

  Args:
    vlm: with its plans, those of its language model for prompts of `prompt` ids and these images.
    prompt: ids of a row. Counted as they run, with placeholders and padding, all is what the
      program costs; without them, what the row's own tokens cost.
    layout: (C, I, V) of the images, as `models.backbones.images.Images.layout`.
    room: tokens that may be decoded after the prompt.

  Raises:
    ValueError: plans of the language model that are about other prompts.
  """
  arch = dataclasses.replace(vit_cost.architecture(vlm.tower),
                             parameter_bytes=jnp.dtype(vlm.lm.dtype).itemsize)
  visual, visual_in = vlm.visual_slots(layout), layout[1] * vlm.each_image(layout)
  whole, left = vlm.passed_on
  projected = layout[0] * left
  if vlm.compressor:
    number, grid = grids_read(vlm.compressor, vlm.tower.grid, layout)
    projected = number * vlm.compressor.slots(grid)
  return VLMCost(
      vlm, layout[0], left, projected, visual_in, visual, vit_cost.of(vlm.tower, arch),
      projector_cost.of(vlm, prompt, layout),
      lm_cost.of(vlm.lm, prompt + visual, room=room, originals=prompt + layout[1] * whole,
                 texts=prompt),
      memory_cost.of(vlm, prompt, layout[0]))
