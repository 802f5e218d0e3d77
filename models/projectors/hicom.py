"""HICom: what is asked picks what stays of each window of a video, and of all of it.

Axes: B batch, N patches, C windows, R patches of a window, M queries, G tokens of what is asked, W
width of the tower, E width of the embedding that patches and text share, D width of the language
model.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense, layer_norm
from models.projectors.attention import CrossAttention, attend
from models.projectors.base import (
  CROP,
  EMBED,
  GUIDE,
  IMAGE,
  SPANS,
  Array,
  Beside,
  Compressor,
  Names,
)
from models.projectors.frames import frames_of_windows, resampled, windows_of, windows_over
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, OneOf

EPS = 1e-6
GUIDES = ('none', 'direct', 'coarse', 'fine')
ADAPTED = ('query', 'key', 'value', 'guide')


def _mlp(path: str, name: str) -> dict[str, str]:
  """Names of the two products of an MLP in the release."""
  return {f'{path}/fc1': f'{name}.0.*', f'{path}/fc2': f'{name}.2.*'}


def _attention(path: str, name: str) -> dict[str, str | tuple[str, ...]]:
  """Names of an attention's products in the release."""
  return {f'{path}/qkv': tuple(f'{name}.{part}_proj.*' for part in 'qkv'),
          f'{path}/out': f'{name}.out_proj.*'}


def _injector(path: str, name: str) -> dict[str, str | tuple[str, ...]]:
  """Names of an injector's parameters in the release."""
  return {
      **_mlp(f'{path}/text', f'{name}.text2qk_proj'),
      **_mlp(f'{path}/guide', f'{name}.guide_proj'), f'{path}/norm_guide': f'{name}.guide_norm.*',
      f'{path}/guide_share': f'{name}.guide_alpha',
      **_mlp(f'{path}/coarse', f'{name}.coarse_proj'),
      f'{path}/norm_coarse': f'{name}.coarse_norm.*',
      **_attention(f'{path}/fine', f'{name}.fine_proj'), f'{path}/norm_fine': f'{name}.fine_norm.*'}


class HICom(Compressor):
  """Replaces each window by what the question reads of it, and adds a few tokens of the whole.

  HICom (Liu et al., 2025), arXiv:2503.16036, as released. In each window the keys are the patches'
  embeddings in a space that they share with text (their features where there are none), the values
  their features. Windows that do not divide an axis overlap by one patch at the end; the frames of
  a video with fewer than `frames` make one window. Behind these tokens come `queries` of learned
  ones, which attend to all patches with sines and cosines of their places. The release puts
  newlines between rows of windows, and can take scale and bias of its tower's logits in place of
  1 / sqrt(E); neither is here.

  Attributes:
    guide: how what is asked enters the query of a window: 'direct', it is the query; 'coarse', its
      vector scales and shifts the resampled features there; 'fine', these attend to its tokens;
      'none', they are the query. It enters the learned tokens as 'coarse', or not at all.
    frames, side: patches of a window along time, and each way in a frame; an image has no time.
    adapted: what of the windows' attention moves by a learned share, 0 at first, towards what a
      product or two make of it: 'query' (but of 'direct'), 'key', 'value', 'guide'. The releases
      have () and ('key', 'value').
    queries: learned tokens, 0 for none: then the windows are a grid.
    heads: of their attention, and of 'fine', 128 features each in the release.
    span: 'image' takes the crops of an image as the frames of one video, of which a row may have
      fewer than its batch. Any number of them will do: where windows that overlap by one frame at
      most do not end with the video, which the release refuses, the last one is shorter.
  """

  guide: Annotated[str, OneOf(GUIDES)] = 'direct'
  frames: Count = 4
  side: Count = 3
  adapted: tuple[Annotated[str, OneOf(ADAPTED)], ...] = ()
  queries: CountOrZero = 32
  heads: Count = 9
  span: Annotated[str, OneOf(SPANS)] = CROP
  released: ClassVar[Names] = {
      **_injector('local/injector', 'local_compressor.guide_injector'),
      **_injector('global/injector', 'global_compressor.guide_injector'),
      'local/query': 'local_compressor.q_proj.*', **_mlp('local/key', 'local_compressor.k_proj'),
      **_mlp('local/value', 'local_compressor.v_proj'),
      **{f'local/{name}_share': f'local_compressor.{name[0]}_alpha' for name in ADAPTED[:3]},
      **{f'local/norm_{name}': f'local_compressor.{name[0]}_norm.*' for name in ADAPTED[:3]},
      'global/query': 'global_compressor.query',
      **_attention('global/attention', 'global_compressor.attn_layer'),
      **_mlp('local/readout', 'local_compressor.readout'),
      **_mlp('global/readout', 'global_compressor.readout')}

  def __post_init__(self) -> None:
    super().__post_init__()
    unread = {'direct': 'query', 'none': 'guide'}.get(self.guide)
    if unread in self.adapted:
      raise ValueError(f'guide={self.guide!r} reads no {unread} that could be adapted: leave '
                       f'{unread!r} out of adapted={self.adapted}')

  @property
  def reads(self) -> frozenset[str]:
    """Names the embeddings, and what is asked where it is read."""
    return frozenset({EMBED, GUIDE} if self.guide != 'none' else {EMBED})

  def sides(self, grid: Grid) -> Grid:
    """Returns the patches of a window along each axis."""
    return (self.frames, self.side, self.side)[-len(grid):]

  def cells(self, grid: Grid) -> Grid:
    """Returns the grid of windows.

    Raises:
      ValueError: as `grid_after`.
    """
    sides = self.sides(grid)
    if self._counts_frames(grid):
      return (-(-grid[0] // self.frames), *grids.balanced_cells(grid[1:], sides[1:]))
    return grids.balanced_cells(grid, sides)

  def _counts_frames(self, grid: Grid) -> bool:
    """Returns whether rows may have fewer frames than the grid."""
    return self.span == IMAGE and len(grid) == len(grids.AXES)

  def grid_after(self, grid: Grid) -> Grid | None:
    """Returns the grid of windows where there are no learned tokens."""
    return None if self.queries else self.cells(grid)

  def slots(self, grid: Grid) -> int:
    """Returns the windows and the learned tokens."""
    return math.prod(self.cells(grid)) + self.queries

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`: windows in raster order, then learned tokens.

    Raises:
      ValueError: nothing that is asked where `guide` reads it, or a query of another width than the
        keys.
    """
    guide, seen = self._asked(beside, self.guide)
    grid, frames = beside.grid, None
    cells, sides = self.cells(grid), self.sides(grid)
    if self._counts_frames(grid):
      frames = beside.frames
      if frames is None:
        frames = jnp.full(len(tokens.x), grid[0], jnp.int32)
      sides = (min(sides[0], grid[0]), *sides[1:])
    parts = [Local(self.width, self.guide, self.adapted, sides, cells, self.heads, self.dtype,
                   name='local')(tokens.x, beside.replace(frames=frames), guide, seen)]
    if self.queries:
      vector, _ = self._asked(beside, 'none' if self.guide == 'none' else 'coarse')
      parts.append(Global(self.width, self.queries, self.heads, self.dtype, name='global')(
          tokens.x, grid, vector, frames))
    x = jnp.concatenate(parts, axis=1)
    if frames is None:
      return TokenSet.create(x)
    there = jnp.arange(cells[0])[None] < windows_over(frames, sides[0])[:, None]
    there = jnp.repeat(there, math.prod(cells[1:]), axis=1)
    learned = jnp.broadcast_to(frames[:, None] > 0, (len(x), self.queries))
    return TokenSet.create(x, valid=jnp.concatenate([there, learned], axis=1))

  def _asked(self, beside: Beside, kind: str) -> tuple[Array | None, Array | None]:
    """Returns what is asked, float[B, G, E], and which of it there is; G is 1 for a vector."""
    if kind == 'none':
      return None, None
    asked = beside.guide_tokens if kind == 'fine' else beside.guide
    if asked is None:
      name = 'guide_tokens' if kind == 'fine' else 'guide'
      raise ValueError(f'HICom with guide={self.guide!r} reads what is asked, and there is no '
                       f"{name} beside the features: give one, or set guide='none'")
    return (asked, beside.guide_valid) if kind == 'fine' else (asked[:, None], None)


def adapt(module: nn.Module, name: str, x: Array, change: nn.Module) -> Array:
  """Moves features by a learned share towards what a module of them makes, normed."""
  share = module.param(f'{name}_share', nn.initializers.zeros, (1,))[0]
  return (1 - share) * x + share * layer_norm(EPS, name=f'norm_{name}')(change(x))


class Injector(nn.Module):
  """Brings what is asked into queries.

  Attributes:
    kind: one of `GUIDES`, but 'none'.
    adapted: whether 'guide' is among what is adapted.
    heads: of 'fine'.
    dtype: of the products.
  """

  kind: str
  adapted: tuple[str, ...]
  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, query: Array, guide: Array, seen: Array | None, width: int) -> Array:
    """float[B, M, width] and float[B, G, E] -> float[B, M, width], M = 1 for 'direct'."""
    if guide.shape[-1] != width:
      guide = Projector(width, 'gelu', self.dtype, name='text')(guide)
    if 'guide' in self.adapted:
      guide = adapt(self, 'guide', guide, Projector(width, 'gelu', self.dtype, name='guide'))
    if self.kind == 'direct':
      return guide
    if self.kind == 'coarse':
      both = Projector(2 * width, 'gelu', self.dtype, name='coarse')(guide)
      scale, shift = jnp.split(both, 2, axis=-1)
      injected = query * (1 + scale) + shift
    else:
      injected = query + CrossAttention(self.heads, self.dtype, name='fine')(
          query, guide, guide, seen)
    return layer_norm(EPS, name=f'norm_{self.kind}')(injected)


class Local(nn.Module):
  """Attends in windows, one query each; attributes as of `HICom`."""

  width: int
  guide: str
  adapted: tuple[str, ...]
  sides: Grid
  cells: Grid
  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, beside: Beside, guide: Array | None,
               seen: Array | None) -> Array:
    """float[B, N, W] -> float[B, C, D]."""
    grid, frames = beside.grid, beside.frames
    keys, values = x if beside.embed is None else beside.embed, x
    width, query = keys.shape[-1], x
    if self.guide != 'direct':
      query = (grids.resample(x, grid, self.cells, 'linear') if frames is None else
               resampled(x, grid, self.cells, frames, self.sides[0]))
    if 'query' in self.adapted:
      query = adapt(self, 'query', query,
                    dense(x.shape[-1], self.dtype, name='query', bias=False))
    if 'key' in self.adapted:
      keys = adapt(self, 'key', keys, Projector(width, 'gelu', self.dtype, name='key'))
    if 'value' in self.adapted:
      values = adapt(self, 'value', values,
                     Projector(x.shape[-1], 'gelu', self.dtype, name='value'))
    if guide is not None:
      query = Injector(self.guide, self.adapted, self.heads, self.dtype, name='injector')(
          query, guide, seen, width if self.guide == 'direct' else x.shape[-1])
    if query.shape[-1] != width:
      raise ValueError(f'HICom with guide={self.guide!r} makes queries of the {query.shape[-1]} '
                       f'features of a patch for embeddings of {width}: give embeddings as wide, '
                       "or none, or set guide='direct'")
    query, keys, values = (part.astype(self.dtype) for part in (query, keys, values))
    query = jnp.broadcast_to(query, (len(x), math.prod(self.cells), width))[:, :, None]
    there = None
    if frames is None:
      keys, values = (grids.balanced_windows(part, grid, self.sides) for part in (keys, values))
    else:
      taken = frames_of_windows(frames, self.sides[0], self.cells[0])
      keys, values = (windows_of(part, grid, self.sides, taken) for part in (keys, values))
      there = taken < frames[:, None, None]
      there = jnp.repeat(there, keys.shape[2] // self.sides[0], axis=2)
      there = jnp.repeat(there, math.prod(self.cells[1:]), axis=1)
    mixed = attend(query, keys, values, there)[:, :, 0]
    return Projector(self.width, 'gelu', self.dtype, name='readout')(mixed)


class Global(nn.Module):
  """Lets learned tokens attend to all patches; attributes as of `HICom`."""

  width: int
  queries: int
  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, grid: Grid, guide: Array | None, frames: Array | None) -> Array:
    """float[B, N, W] -> float[B, M, D]."""
    width, seen = x.shape[-1], None
    if frames is not None:
      seen = jnp.arange(math.prod(grid))[None] < frames[:, None] * math.prod(grid[1:])
    query = self.param('query', nn.initializers.zeros, (self.queries, width))
    query = jnp.broadcast_to(query[None], (len(x), *query.shape))
    if guide is not None:
      query = Injector('coarse', (), self.heads, self.dtype, name='injector')(
          query, guide, None, width)
    # An image is the first frame of a video.
    placed = x + grids.summed_sincos((1,) * (3 - len(grid)) + grid, width)[None]
    query = query + CrossAttention(self.heads, self.dtype, name='attention')(
        query, placed, placed, seen)
    return Projector(self.width, 'gelu', self.dtype, name='readout')(query)
