"""Methods where hosts call them, on random tokens and signals of the shapes of real models.

Axes: B batch, N slots, D features, C features of a vision tower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.vit import make_vit
from models.compressors import COMPRESSORS
from models.plan import methods
from ops import tokens as tk
from ops.reducers.language import LANGUAGE
from ops.reducers.method import Method
from ops.reducers.projector import PROJECTOR
from ops.rope import Rope
from ops.signals import AXES, STATIC, Signals
from ops.tokens import SPECIAL, TEXT, VISUAL

Array = jax.Array
CROP = (24, 24)  # Patches of a crop: those of CLIP-L/14 at 336 pixels.
SIDES = {196: (14, 14), 576: CROP, 2880: (48, 60)}


@dataclasses.dataclass(frozen=True)
class Site:
  """Describes a place where methods act.

  Attributes:
    methods: those that are made for it, by name.
    before, after: slots around the visual tokens, none of which may be touched, by kind.
    sizes: of the axes of signals (ops/signals.py), and of features: D.
    depth: number of layers.
  """

  methods: Mapping[str, type[Method]]
  before: tuple[int, ...]
  after: tuple[int, ...]
  sizes: Mapping[str, int]
  depth: int

  def slots(self, visual: int) -> int:
    """N, with so many visual tokens."""
    return len(self.before) + visual + len(self.after)

  def work(self, name: str, *, batch: int, visual: int, keep: int,
           dtype: Any) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    """Returns a function that decides and reduces, and its arguments.

    Args:
      name: of the method.
      batch: B.
      visual: visual tokens of each row.
      keep: those that stay; more where the method cannot leave so few.
      dtype: of features.
    """
    method = self.methods[name]()
    tokens, signals = self.inputs(method, batch=batch, visual=visual, dtype=dtype)
    num_slots = max(tokens.protected + keep, method.min_slots(tokens.slots, tokens.protected))
    if name not in COMPRESSORS:
      return (lambda t, s: tk.reduce(t, method(t, s, num_slots=num_slots)).x), (tokens, signals)
    params = method.init(jax.random.key(0), tokens, signals, num_slots=num_slots)
    return (lambda p, t, s: tk.reduce(t, method.apply(p, t, s, num_slots=num_slots)).x,
            (params, tokens, signals))

  def inputs(self, method: Method, *, batch: int, visual: int,
             dtype: Any) -> tuple[tk.TokenSet, Signals]:
    """Returns tokens, and the signals that a method reads."""
    random = np.random.default_rng(0)
    kinds = np.array([*self.before, *[VISUAL] * visual, *self.after], np.int8)
    sizes = {**self.sizes, 'B': batch, 'N': len(kinds), '2': 2}
    first = len(self.before) if SPECIAL in self.before else 0
    tokens = tk.TokenSet.create(
        _normal(random, (batch, len(kinds), sizes['D']), dtype),
        kind=_rows(kinds, batch), pos=_rows(np.arange(len(kinds), dtype=np.int32) - first, batch),
        protected=len(kinds) - visual,
        stats={name: _stat(random, name, (batch, len(kinds))) for name in sorted(method.reads)})
    measured = {name: _signal(random, name, tuple(sizes[axis] for axis in AXES[name]), dtype)
                for name in sorted(method.needs - STATIC)}
    static = {'grid': SIDES[visual], 'crop_grid': CROP, 'layer': self.depth // 2,
              'num_crops': -(-visual // math.prod(CROP)), 'depth': self.depth, 'slots': len(kinds),
              'rope': Rope(sizes['d'])}
    if 'project' in method.needs:
      kernels = (_normal(random, (sizes[axis], sizes['D']), dtype) / 64 for axis in 'CD')
      static['project'] = jax.tree_util.Partial(_project, *kernels)
    return tokens, Signals(**measured, **static)


def _signal(random: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
  """Returns a signal that is measured: attention adds up to 1, and places are those of crops."""
  if name in ('crop', 'patch'):
    slot, patches = np.arange(-1, shape[1] - 1, dtype=np.int32), math.prod(CROP)
    return _rows(slot // patches if name == 'crop' else slot % patches, shape[0])
  if name == 'tiling':
    return jnp.full(shape, 2, jnp.int32)
  if name == 'text_valid':
    return jnp.ones(shape, bool)
  value = _normal(random, shape, dtype)
  return jax.nn.softmax(value.astype(jnp.float32)) if name.endswith('attention') else value


def _stat(random: np.random.Generator, name: str, shape: tuple[int, int]) -> Array:
  """Returns a stat of a prompt's tokens: relevance, or numbers of words of two, and of frames."""
  if name == 'relevance':
    return _normal(random, shape, jnp.float32)
  each = {'unit': 2, 'frame': math.prod(CROP)}[name]
  return _rows(np.arange(shape[1], dtype=np.int32) // each, shape[0])


def _normal(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
  return jnp.asarray(random.standard_normal(shape, np.float32), dtype)


def _rows(values: np.ndarray, batch: int) -> Array:
  return jnp.asarray(np.tile(values, (batch, 1)))


def _project(first: Array, second: Array, x: Array) -> Array:
  return jax.nn.gelu(x.astype(jnp.float32) @ first) @ second


SITES = {
    'vit': Site(methods(make_vit('S/16').host), (SPECIAL,), (),
                {'D': 384, 'H': 6, 'd': 64}, 12),
    'projector': Site(PROJECTOR, (SPECIAL,), (),
                      {'D': 4096, 'C': 1024, 'T': 32, 'H': 16, 'd': 64}, 24),
    'language': Site(LANGUAGE, (TEXT,) * 32, (TEXT,) * 32,
                     {'D': 4096, 'F': 11008, 'H': 32, 'd': 128}, 32)}
