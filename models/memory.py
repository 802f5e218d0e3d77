"""What layers of a language model read beside the tokens of its sequence: a memory.

A compressor (models/projectors/) makes crops into tokens, perhaps none, and a `Memory` beside them.
Its `Reader` is a part of the language model (`LM.reader`), acts in some layers, and knows three
sites:
  'before'    what a prompt's tokens read is added to them before the layer runs;
  'between'   what tokens read is added between attention and MLP;
  'products'  the layer's products change by matrices of low rank, which each row has of its own.
A language model given no memory (text alone) is what it is without a reader. A prompt's memory goes
into its cache as far as later tokens read it, projected once.

Axes: B batch, C crops of a row, N slots, D width of the language model, E features in and F out of
a product, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models.plans.events import Plan
from ops.tokens import VISUAL, TokenSet
from ops.values import CountOrZero

Array = jax.Array
# Layers that read, by their numbers, each with what it reads.
States = Mapping[int, 'LayerMemory']
# The collection of variables in which a block finds how its products change.
COLLECTION = 'memory'
# What a product's own change is called there, and that of a whole MLP.
FACTORS, MLP = 'factors', 'mlp'


class Memory(struct.PyTreeNode):
  """Holds what a compressor leaves of crops beside tokens.

  Attributes:
    tokens: of each crop, those that stand in the sequence; None once they stand there.
  """

  tokens: TokenSet | None

  def of_rows(self, there: Array, slots: int) -> Self:
    """Returns what the rows of a batch have of their crops, without tokens.

    Args:
      there: bool[B, C], crops that stand in the row's prompt; nothing may be read of others.
      slots: in every row those that are not for text.

    Raises:
      ValueError: more crops of a row than it can be of.
    """
    raise NotImplementedError


class LayerMemory(struct.PyTreeNode):
  """Holds what one layer reads."""

  def take(self, rows: Array) -> Self:
    """Returns that of rows int[R] of the batch, which may repeat."""
    return jax.tree.map(lambda x: x[rows], self)


class Kept(struct.PyTreeNode):
  """Holds what later tokens read of a prompt's memory, as a cache carries it.

  Attributes:
    layers: by their numbers.
  """

  layers: States

  def take(self, rows: Array) -> Kept:
    """Returns that of rows int[R] of the batch, which may repeat."""
    return Kept({layer: state.take(rows) for layer, state in self.layers.items()})


class Factors(LayerMemory):
  """Holds a change of low rank to a product.

  Attributes:
    a: float[B, E, R], of each row.
    b: float[1, F, R], of all rows.
  """

  a: Array
  b: Array

  def take(self, rows: Array) -> Factors:
    """Returns that of some rows, as `LayerMemory`."""
    return self.replace(a=self.a[rows])


class Changes(LayerMemory):
  """Holds the changes to the products of one layer.

  Attributes:
    products: by their names in the block, and `MLP`.
  """

  products: dict[str, Factors]

  def take(self, rows: Array) -> Changes:
    """Returns those of some rows, as `LayerMemory`."""
    return Changes({name: change.take(rows) for name, change in self.products.items()})


class Sizes(Protocol):
  """Says what a reader may need to know of the language model that it becomes a part of."""

  @property
  def width(self) -> int:
    """Returns D."""
    ...

  @property
  def depth(self) -> int:
    """Returns the number of layers."""
    ...

  @property
  def heads(self) -> int:
    """Returns the heads of queries."""
    ...

  @property
  def kv_heads(self) -> int:
    """Returns the heads of keys and values."""
    ...

  @property
  def head_width(self) -> int:
    """Returns the features of a head."""
    ...


class Reader(nn.Module):
  """Lets some layers of a language model read a memory.

  A subclass names its `site` and makes the states of its layers, at 'products' `Changes`; at the
  others it says what is read.

  Attributes:
    layers: that read, ascending.
    site: as at the head of this file.
  """

  layers: tuple[CountOrZero, ...]
  site: ClassVar[str]

  def __call__(self, memory: Any, tokens: TokenSet) -> tuple[States, States, tuple[Array, ...]]:
    """Returns states, what of them is kept, and what each layer would add to tokens of a prompt.

    It makes the parameters.
    """
    states = self.states(memory)
    changes = () if self.site == 'products' else tuple(
        self.read(layer, tokens, state) for layer, state in states.items())
    return states, self.kept(states), changes

  def states(self, memory: Any) -> States:
    """Returns what each layer reads of a prompt's memory, projected."""
    raise NotImplementedError

  def kept(self, states: States) -> States:
    """Returns what tokens behind the prompt read; nothing unless a subclass says otherwise."""
    del states
    return {}

  def read(self, layer: int, tokens: TokenSet, state: Any) -> Array:
    """Returns what a layer adds to the tokens of a prompt, float[B, N, D]."""
    raise NotImplementedError

  def read_text(self, layer: int, x: Array, state: Any) -> Array:
    """Returns what a layer adds to text behind the prompt, float[B, N, D] of features as those."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Recall:
  """Lets the layers of one call read.

  Attributes:
    reader: bound to its parameters.
    states: what each layer reads.
  """

  reader: Reader
  states: States

  @property
  def kept(self) -> Kept | None:
    """Returns what goes into the cache, None for nothing."""
    states = self.reader.kept(self.states)
    return Kept(states) if states else None

  @property
  def begins(self) -> tuple[int, ...]:
    """Returns the layers that read, and those behind them: each of the former then runs alone."""
    return (*self.states, *(layer + 1 for layer in self.states))

  def at(self, site: str, layer: int, tokens: TokenSet) -> TokenSet:
    """Returns a prompt's tokens after a site of a layer."""
    if layer not in self.states or site != self.reader.site:
      return tokens
    change = self.reader.read(layer, tokens, self.states[layer])
    return tokens.replace(x=tokens.x + change.astype(tokens.x.dtype))

  def between(self, layer: int) -> Callable[[Array], Array] | None:
    """Returns what text behind the prompt, float[B, ..., D], becomes between attention and MLP."""
    if layer not in self.states or self.reader.site != 'between':
      return None
    return functools.partial(self._with_text, layer)

  def variables(self, layer: int) -> dict[str, Any]:
    """Returns the variables of a block beside its parameters."""
    if layer not in self.states or self.reader.site != 'products':
      return {}
    changes = cast(Changes, self.states[layer]).products
    return {COLLECTION: {name: change if name == MLP else {FACTORS: change}
                         for name, change in changes.items()}}

  def _with_text(self, layer: int, x: Array) -> Array:
    rows = x.reshape(len(x), -1, x.shape[-1])
    change = self.reader.read_text(layer, rows, self.states[layer])
    return x + change.reshape(x.shape).astype(x.dtype)


class Product(nn.DenseGeneral):
  """Multiplies as its base does, and adds what a memory changes."""

  def __call__(self, inputs: Array) -> Array:
    """Returns the product of float[B, ...]."""
    made = super().__call__(inputs)
    return changed(self, FACTORS, made, inputs)


def changed(module: nn.Module, name: str, made: Array, x: Array) -> Array:
  """Adds what a memory changes to what a product, or an MLP, makes.

  Args:
    module: in whose variables the change is looked for.
    name: of it there.
    made: float[B, ...].
    x: float[B, ...], that it was made of.
  """
  factors: Factors | None = module.get_variable(COLLECTION, name)
  if factors is None:
    return made
  width, out = factors.a.shape[1], factors.b.shape[1]
  rows = x.astype(made.dtype).reshape(len(x), -1, width)
  wide = made.reshape(len(x), -1, out)
  return add_low_rank(wide, rows, (factors.a, factors.b)).reshape(made.shape)


def add_low_rank(made: Array, x: Array, factors: tuple[Array, Array] | None) -> Array:
  """Adds what a change of low rank makes of a product's input to what the product makes.

  Args:
    made: float[B, N, F], of the product.
    x: float[B, N, E], that it was made of.
    factors: float[B, E, R] and [1, F, R]; None for no change.

  Returns:
    float[B, N, F], made + (x A) B^T.
  """
  if factors is None:
    return made
  a, b = (factor.astype(x.dtype) for factor in factors)
  b = jnp.broadcast_to(b, (len(a), *b.shape[1:]))
  return made + jnp.einsum('bnr,bfr->bnf', jnp.einsum('bne,ber->bnr', x, a), b).astype(made.dtype)


def visual_first(tokens: TokenSet) -> tuple[Array, Array]:
  """Orders slots: visual tokens, padding that is counted with them, and what is not visual.

  Returns:
    int32[B, N], the slot in each place, and the place of each slot.
  """
  other = tokens.kind != VISUAL
  order = jnp.argsort(jnp.where(other, 2, ~tokens.real), axis=1, stable=True)
  return order, jnp.argsort(order, axis=1)


def check_reader(reader: Reader, plan: Plan | None, *, depth: int) -> None:
  """Raises unless a language model can have a reader.

  Args:
    reader: for it.
    plan: of what it reduces between its layers.
    depth: of its layers.

  Raises:
    ValueError: layers that it does not have, or none; or tokens that are reduced.
  """
  name = type(reader).__name__
  if not reader.layers or max(reader.layers) >= depth:
    raise ValueError(f'{name} reads in the layers {reader.layers}, and the language model has '
                     f'layers 0 to {depth - 1}: set compressor.args.every')
  if plan and (plan.events or plan.positions == 'restart'):
    raise ValueError(f'{name} goes by the slots that a prompt begins with, of which {plan.name} '
                     'leaves fewer between layers: leave reduce.language out, or the compressor')
