"""Counts the multiply-accumulates of a traced function; tests check lib/cost/vit.py by them.

XLA's own `cost_analysis` counts the body of a `lax.scan` once, sees nothing inside custom calls and
has given -1 on GPUs. This walks the jaxpr: trip counts multiply, every call is entered, and what
cannot be counted is named rather than left out in silence. Nothing is compiled or run, and
arguments may be `jax.ShapeDtypeStruct`.

Only matrix products and convolutions count. A product whose result nobody uses does not: compilers
drop it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from models.backbones.bert import Bert
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from ops import platforms

# Names given in models/stack.py and ops/signals.py: a method's own work, and score rows for it.
SCOPES = ('reduction', 'signals')
# Work that is neither a product nor made of primitives that are.
OPAQUE = frozenset({
    'pallas_call', 'ffi_call', 'ragged_dot_general', 'custom_linear_solve', 'pure_callback',
    'io_callback', 'cholesky', 'eig', 'eigh', 'lu', 'qr', 'householder_product', 'schur', 'svd',
    'triangular_solve', 'tridiagonal_solve', 'dot_product_attention_fwd',
    'dot_product_attention_bwd', 'dot_product_attention_fp8_fwd', 'dot_product_attention_fp8_bwd',
})


@dataclasses.dataclass(frozen=True)
class Products:
  """Multiply-accumulates of a traced function.

  Attributes:
    macs: {scope: MACs}; '' holds what lies outside all named scopes.
    uncounted: (scope, primitive) of work that is not in `macs`: kernels, factorisations, and loops
      with products whose trip count is not known before they run ('while').
  """

  macs: dict[str, int]
  uncounted: frozenset[tuple[str, str]] = frozenset()

  @property
  def total(self) -> int:
    """MACs inside and outside all scopes."""
    return sum(self.macs.values())


def count(function: Callable[..., Any], *args: Any, scopes: Sequence[str] = SCOPES) -> Products:
  """Counts the products of one call.

  Args:
    function: anything that JAX can trace; functions under jit, grad, remat and shard_map too. Of a
      `lax.cond` the dearest branch counts, of `lax.platform_dependent` that of the platform traced
      for, of a `shard_map` the work of all its devices.
    *args: its arguments, or their shapes and dtypes.
    scopes: names given with `jax.named_scope` to count apart; of nested ones the outermost counts.
  """
  closed = jax.make_jaxpr(function)(*args)
  used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return _walk(used, '', tuple(scopes))


def of_vit(vit: ViT | Text | Bert, *, batch: int = 1) -> Products:
  """The products of a model's forward pass, from its shapes alone, for `batch` images or texts."""
  if isinstance(vit, Text | Bert):
    images = jax.ShapeDtypeStruct((batch, vit.context), jnp.int32)
  else:
    shape = (batch, *vit.input_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
  learned = vit.plan is not None and any(part.learned for part in vit.plan.reductions)
  # Without cuts the layers are one loop, which is traced once.
  bare = vit if learned else vit.clone(plan=None)
  params = jax.eval_shape(bare.init, jax.random.key(0), images)
  return count(lambda params, images: vit.apply(params, images)[0], params, images)


def _walk(jaxpr: Jaxpr, scope: str, scopes: tuple[str, ...]) -> Products:
  macs: collections.Counter[str] = collections.Counter()
  uncounted: set[tuple[str, str]] = set()
  for eqn in jaxpr.eqns:
    # An inner jaxpr's names start afresh, so an outer name holds for all that is inside.
    eqn_scope = scope or _scope(str(eqn.source_info.name_stack), scopes)
    name = eqn.primitive.name
    if name == 'dot_general':
      macs[eqn_scope] += _dot(eqn)
    elif name == 'conv_general_dilated':
      macs[eqn_scope] += _convolution(eqn)
    elif name in OPAQUE:
      uncounted.add((eqn_scope, name))
    else:
      inner = _inner(eqn, eqn_scope, scopes)
      uncounted |= inner.uncounted
      macs.update(inner.macs)
  return Products(dict(macs), frozenset(uncounted))


def _inner(eqn: JaxprEqn, scope: str, scopes: tuple[str, ...]) -> Products:
  """The products of the jaxprs that an equation calls."""
  name = eqn.primitive.name
  parts = [_walk(jaxpr, scope, scopes) for jaxpr in _jaxprs(eqn.params.values())]
  platforms_of = eqn.params.get('branches_platforms')
  if name == 'cond' and platforms_of:
    own = {'gpu': {'cuda', 'rocm'}}.get(platforms.current(), {platforms.current()})
    parts = [next(part for part, names in zip(parts, platforms_of, strict=True)
                  if names is None or own & set(names))]
  elif name == 'cond':
    parts = [max(parts, key=lambda part: part.total)]
  if name == 'while' and any(part.total or part.uncounted for part in parts):
    return Products({}, frozenset({(scope, 'while')}))
  times = eqn.params['length'] if name == 'scan' else _shards(eqn) if name == 'shard_map' else 1
  macs: collections.Counter[str] = collections.Counter()
  for part in parts:
    macs.update({key: times * value for key, value in part.macs.items()})
  return Products(dict(macs), frozenset().union(*(part.uncounted for part in parts)))


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
  for value in values:
    if isinstance(value, ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _jaxprs(value)


def _shards(eqn: JaxprEqn) -> int:
  """Returns the number of devices that run the body of a shard_map."""
  axes = eqn.params.get('newly_manual_axes') or eqn.params['manual_axes']
  return math.prod(eqn.params['mesh'].shape[axis] for axis in axes)


def _scope(stack: str, scopes: tuple[str, ...]) -> str:
  """The first of `scopes` in a name stack such as 'transpose(jvp(layer))/reduction'."""
  for part in stack.split('/'):
    word = part.rsplit('(', 1)[-1].rstrip(')')
    if word in scopes:
      return word
  return ''


def _shape(variable: Any) -> tuple[int, ...]:
  """The shape of a variable of an equation; jax's own types know it of no abstract value."""
  return variable.aval.shape


def _dot(eqn: JaxprEqn) -> int:
  left, right = map(_shape, eqn.invars)
  (contracted, _), (batched, _) = eqn.params['dimension_numbers']
  shared = math.prod(left[axis] for axis in (*contracted, *batched))
  return math.prod(left) * math.prod(right) // shared if shared else 0


def _convolution(eqn: JaxprEqn) -> int:
  """Each output is a sum over the kernel's window and input channels."""
  kernel = _shape(eqn.invars[1])
  outputs = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
  return math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // outputs
