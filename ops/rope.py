"""Rotary positions: angles from carried position ids, whatever the slot.

RoFormer (Su et al., 2021), Sec. 3.2, arXiv:2104.09864. Features turn in pairs (i, i + d / 2), as
checkpoints of the Llama family on the hub store their weights.

Axes: B batch, N slots, H heads, d features a head, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ops.values import Count, CountOrZero, NotNegative, OneOf, Positive, Width, check_fields

Array = jax.Array

SCALINGS = ('none', 'linear', 'llama3', 'yarn')
SPREADS = ('blocks', 'interleaved')
# Strides of V2PE that make up a position.
V2PE_STEPS = 256


@dataclasses.dataclass(frozen=True)
class Rope:
  """Turns positions into rotations.

  Attributes:
    width: d, features that are rotated, an even number.
    theta: base of the frequencies theta^(-2 i / d).
    scaling: 'none'; 'linear' (positions divided by `factor`, arXiv:2306.15595); 'llama3' (long
      wavelengths divided, short ones left, a ramp between; Llama 3.1, arXiv:2407.21783); 'yarn'
      (a ramp over the dimensions and warmer logits, arXiv:2309.00071, Sec. 3).
    factor: by how much the context grows.
    original: context that the model was first trained on ('llama3', 'yarn').
    low, high: 'llama3': wavelengths over original / low are divided, under original / high left.
    fast, slow: 'yarn': turns within `original` at which its ramp begins and ends.
    temperature: 'yarn': factor of cosines and sines, 0 for 0.1 ln(factor) + 1.
    rounded: 'yarn': whether the ends of its ramp are whole dimensions, as released.
    sections: M-RoPE (Qwen2-VL, arXiv:2409.12191): how many of the d / 2 frequencies turn with time,
      height and width; empty for one position a token.
    spread: how the sections lie: in 'blocks', or 'interleaved' (Qwen3-VL).
    steps: what the sections' positions count: 1 / steps of a position each (V2PE).
  """

  width: Width
  theta: Positive = 10000.0
  scaling: Annotated[str, OneOf(SCALINGS)] = 'none'
  factor: Positive = 1.0
  original: CountOrZero = 0
  low: Positive = 1.0
  high: Positive = 4.0
  fast: Positive = 32.0
  slow: Positive = 1.0
  temperature: NotNegative = 0.0
  rounded: bool = True
  sections: tuple[CountOrZero, ...] = ()
  spread: Annotated[str, OneOf(SPREADS)] = 'blocks'
  steps: Count = 1

  def __post_init__(self) -> None:
    check_fields(self)
    if self.width % 2 or (self.sections and sum(self.sections) != self.width // 2):
      raise ValueError(f'RoPE turns pairs of features: width={self.width} must be even, and '
                       f'sections={self.sections} add up to half of it')

  def frequencies(self) -> np.ndarray:
    """float32[d / 2], radians a position."""
    plain = self.theta ** (-np.arange(0, self.width, 2, dtype=np.float64) / self.width)
    if self.scaling == 'none':
      scaled = plain
    elif self.scaling == 'linear':
      scaled = plain / self.factor
    elif self.scaling == 'llama3':
      turns = self.original * plain / (2 * math.pi)
      share = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
      scaled = share * plain + (1 - share) * plain / self.factor
    else:
      begin, end = (self.width * math.log(self.original / (turns * 2 * math.pi))
                    / (2 * math.log(self.theta)) for turns in (self.fast, self.slow))
      if self.rounded:
        begin, end = math.floor(begin), math.ceil(end)
      begin, end = max(begin, 0), min(end, self.width - 1)
      share = np.clip((np.arange(self.width // 2) - begin) / max(end - begin, 1e-3), 0, 1)
      scaled = (1 - share) * plain + share * plain / self.factor
    return scaled.astype(np.float32)

  @property
  def amplitude(self) -> float:
    """Factor of cosines and sines."""
    if self.scaling != 'yarn':
      return 1.0
    return self.temperature or (0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)

  def axes(self) -> np.ndarray:
    """int[d / 2]: which column of a position each frequency turns with."""
    columns = np.repeat(np.arange(len(self.sections)), self.sections)
    if self.spread == 'interleaved':
      columns = np.zeros(self.width // 2, int)
      for axis in range(1, len(self.sections)):
        columns[axis:len(self.sections) * self.sections[axis]:len(self.sections)] = axis
    return columns

  def split(self, parts: int) -> Rope:
    """Returns the same with every section in so many, which then turn with their own positions.

    Raises:
      ValueError: sections that cannot be divided so, or none.
    """
    if not self.sections or any(section % parts for section in self.sections):
      raise ValueError(f'sections={self.sections} of RoPE cannot be divided into {parts} parts '
                       'each: give a model with M-RoPE, and a number that divides every section')
    sections = tuple(section // parts for section in self.sections for _ in range(parts))
    return dataclasses.replace(self, sections=sections)

  def after(self, pos: Array, step: Array) -> Array:
    """Returns the position of text that comes `step` tokens after a position int[B] or [B, P]."""
    if self.steps == 1:
      return pos + step
    return pos + step * jnp.asarray([[1] + [self.steps] * len(self.sections)])

  def rotate(self, x: Array, pos: Array) -> Array:
    """Turns float[..., H, d] by int[...] (or, with sections, [..., P]): the same shape and dtype.

    With sections, P = 1 + their number: column 0 is the place in the sequence, which attention is
    causal by, and the others are what is turned with. Positions may also be floats.

    Raises:
      ValueError: a position without the columns that the sections need, or with too many.
    """
    columns = pos.shape[x.ndim - 2:]
    if columns != ((1 + len(self.sections),) if self.sections else ()):
      raise ValueError(f'positions of shape {pos.shape} do not fit features {x.shape}: RoPE with '
                       f'{len(self.sections)} sections takes '
                       + (f'{1 + len(self.sections)} numbers a token, the place in the sequence '
                          'and one a section' if self.sections else 'one number a token'))
    angles = pos.astype(jnp.float32)
    angles = angles[..., 1 + self.axes()] / self.steps if self.sections else angles[..., None]
    frequencies = self.frequencies()
    angles = angles * frequencies.reshape((1,) * (angles.ndim - 1) + frequencies.shape)
    cos, sin = (self.amplitude * f(angles)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

  def turn_back(self, x: Array, pos: Array) -> Array:
    """Undoes `rotate`, which takes the same: float32[..., H, d]."""
    return self.rotate(x.astype(jnp.float32), -pos) / self.amplitude ** 2


def member_positions(pos: Array, group: Array, *, groups: int, parts: int) -> Array:
  """Gives every group the positions of several of its members, side by side.

  Positional preservation embedding (PPE, 2025), arXiv:2510.22936, as released, with its members in
  slot order, which there an unstable sort mixes up.

  Args:
    pos: int32[B, N, A * K], K = `parts` columns an axis.
    group: int32[B, N], `groups` for none.
    groups: M.
    parts: K.

  Returns:
    int32[B, M, A * K]; column j of an axis is that of the j-th member from the end, and so on in
    turn where a group has fewer than K. A group without members gets any.
  """
  batch, slots = group.shape
  order = jnp.argsort(group, axis=1, stable=True)
  members = jax.vmap(lambda g: jnp.bincount(g, length=groups + 1))(group)[:, :groups]
  last = jnp.cumsum(members, axis=1) - 1
  turn = jnp.arange(parts)[None, None] % jnp.maximum(members, 1)[..., None]
  place = jnp.clip(last[..., None] - turn, 0, slots - 1).reshape(batch, -1)
  index = jnp.take_along_axis(order, place, axis=1)
  by_part = pos.reshape(batch, slots, -1, parts)
  picked = jnp.take_along_axis(by_part, index[..., None, None], axis=1)
  picked = picked.reshape(batch, groups, parts, -1, parts)
  # Part j of what member j has.
  return jnp.diagonal(picked, axis1=2, axis2=4).reshape(batch, groups, -1)


def sequence_index(pos: Array) -> Array:
  """int32[B, N]: places in the sequence, of positions with one or several numbers a token."""
  return pos if pos.ndim == 2 else pos[..., 0]


def v2pe_positions(visual: Array, *, stride: int, steps: int = V2PE_STEPS,
                   valid: Array | None = None) -> Array:
  """Positions by which visual tokens take less room than text.

  V2PE (Ge et al., 2024), arXiv:2412.09616. Text moves on by 1 and a visual token by
  stride / steps; text after an image starts at the next whole number. An image that nothing comes
  before starts at stride / steps - 1.

  Args:
    visual: bool[B, N], visual tokens; those in a row are one image, tiles and all.
    stride: of visual tokens, 1 to `steps`; trained on powers of two.
    steps: strides to a position.
    valid: bool[B, N] or None, False for padding, which counts for nothing.

  Returns:
    float32[B, N], for rotations (`Rope.rotate`); of padding, that of the token before.

  Raises:
    ValueError: a stride that is not in 1 to `steps`.
  """
  return v2pe_steps(visual, stride=stride, steps=steps, valid=valid) / steps


def v2pe_steps(visual: Array, *, stride: int, steps: int = V2PE_STEPS,
               valid: Array | None = None) -> Array:
  """Returns `v2pe_positions` counted in steps, int32[B, N]; it takes and raises the same."""
  if not 1 <= stride <= steps:
    raise ValueError(f'stride={stride} must be in 1 to {steps}')
  real = jnp.ones(visual.shape, bool) if valid is None else valid
  visual, text = (flags.astype(jnp.int32) for flags in (visual & real, real & ~visual))
  seen = jnp.cumsum(visual, axis=1)
  # Visual tokens so far where the last text was, and so of all images that have ended.
  ended = jax.lax.cummax(jnp.where(text > 0, seen, 0), axis=1)
  before = jnp.pad(ended, ((0, 0), (1, 0)))[:, :-1]
  whole = -(-(ended - before) * stride // steps)
  start = jnp.cumsum(text + whole, axis=1) - 1
  return start * steps + (seen - ended) * stride
