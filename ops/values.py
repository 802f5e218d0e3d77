"""Checks values that users set against the types that their keys are declared with.

A type is an annotation; marks in an `Annotated` narrow it. So a field's type, its range and its
docstring stand together, wherever it is read from:

  dropout: Rate = 0.0                            # Annotated[float, Range(0, below=1)]
  filter: Annotated[str, OneOf(FILTERS)] = 'bilinear'

A table of keys is a dataclass, a Flax module, a TypedDict, a function (its keywords), or `Keys`.
Types that no file and no flag can give, as `Mesh`, are not checked.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import reprlib
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin

import jax
import numpy as np

from ops import choices

INT32_MAX = 2 ** 31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
  """Holds the type of every key that a dict may have, and the keys that it must have.

  Attributes:
    kinds: type by key.
    needed: keys that must be there.
    several: whether a list of such dicts will do as well.
    by_path: whether the path of a file that says it all will do as well.
  """

  kinds: Mapping[str, Any]
  needed: frozenset[str] = frozenset()
  several: bool = False
  by_path: bool = False

  def without(self, *keys: str) -> Keys:
    """Returns the table without some of its keys."""
    kinds = {key: kind for key, kind in self.kinds.items() if key not in keys}
    return Keys(kinds, self.needed - set(keys))

  def __or__(self, other: Keys) -> Keys:
    return Keys({**self.kinds, **other.kinds}, self.needed | other.needed)


Table = type | Callable[..., Any] | Keys


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds a number.

  Attributes:
    low, high: bounds that may be reached, None for none.
    above, below: bounds that may not.
    unit: of the number, as 'pixels'; '' for none.
  """

  low: float | None = None
  high: float | None = None
  above: float | None = None
  below: float | None = None
  unit: str = ''

  def check(self, name: str, value: float) -> None:
    """Raises a ValueError for a number outside, with its name."""
    inside = ((self.low is None or value >= self.low) and (self.high is None or value <= self.high)
              and (self.above is None or value > self.above)
              and (self.below is None or value < self.below))
    if not inside:
      raise ValueError(f'{name}={reprlib.repr(value)} must be {self}')

  def __str__(self) -> str:
    bounds = (('at least', self.low), ('above', self.above), ('at most', self.high),
              ('below', self.below))
    words = ' and '.join(f'{word} {bound}' for word, bound in bounds if bound is not None)
    if self.low is not None and self.high is not None:
      words = f'from {self.low} to {self.high}'
    return f'{words} {self.unit}'.rstrip()


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
  """Lists the values that there are."""

  options: Iterable[Any]

  def check(self, name: str, value: Any) -> None:
    """Raises a ValueError, which lists the choices, for another value."""
    choices.check(f'{name}=', value, self.options)

  def __str__(self) -> str:
    return f'one of {", ".join(map(str, self.options))}'


@dataclasses.dataclass(frozen=True)
class NotEmpty:
  """Refuses a tuple or a text without anything in it."""

  def check(self, name: str, value: Any) -> None:
    """Raises a ValueError, with its name, where there is nothing."""
    if not value:
      raise ValueError(f'{name}={value!r} is empty: give at least one')

  def __str__(self) -> str:
    return 'that is not empty'


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Says that a text is a regular expression."""

  def check(self, name: str, value: str) -> None:
    """Raises a ValueError, with its name, for a text that is none."""
    try:
      re.compile(value)
    except re.error as error:
      raise ValueError(f'{name}={value!r} is no regular expression: {error}') from error

  def __str__(self) -> str:
    return 'that is a regular expression'


@dataclasses.dataclass(frozen=True)
class Like:
  """Says that a regular expression matches a whole text, as it does the example."""

  pattern: str
  example: str

  def check(self, name: str, value: str) -> None:
    """Raises a ValueError, with its name, for a text that it does not match."""
    if not re.fullmatch(self.pattern, value):
      raise ValueError(f'{name}={reprlib.repr(value)} must be text {self}')

  def __str__(self) -> str:
    return f'as {self.example!r}'


# Counts end up in arrays of int32.
Count = Annotated[int, Range(1, INT32_MAX)]
CountOrZero = Annotated[int, Range(0, INT32_MAX)]
# Sizes of a model: what no memory could hold fails in words, not by being allocated.
Width = Annotated[int, Range(1, 2 ** 17)]
WidthOrZero = Annotated[int, Range(0, 2 ** 17)]
Depth = Annotated[int, Range(1, 1000, unit='layers')]
Pixels = Annotated[int, Range(1, 2 ** 14, unit='pixels')]
# Of a loop inside a method, which an endless one would never leave.
Iterations = Annotated[int, Range(0, 1000)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
# A probability of dropping, or a decay: at 1 nothing would be left, or learned.
Rate = Annotated[float, Range(0, below=1)]
Ratio = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1)]
# A key of jax.random wraps around at 2^32; the shuffles of the data take no negative seed.
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]

_WORDS: dict[Any, str] = {int: 'a whole number', float: 'a number', bool: 'True or False',
                          str: 'text', type(None): 'None'}
_LEAVES: dict[Any, Any] = {
    int: (Integral,), float: (Real,), bool: (bool, np.bool_), str: (str,), jax.Array: (jax.Array,),
    type(None): (type(None),)}


def check(name: str, value: Any, kind: Any) -> None:
  """Checks one value.

  Args:
    name: of its key, as 'config.optimizer.peak_lr', for the message.
    value: as a config, a flag or JSON gives it; a list serves as a tuple.
    kind: its type: a leaf, a tuple, a Mapping, a union, an `Annotated` of one, or a table.

  Raises:
    ValueError: another type, NaN or infinity, or a value outside its range; one line.
  """
  origin, args = get_origin(kind), get_args(kind)
  if origin is Annotated:
    check(name, value, args[0])
    for mark in args[1:]:
      mark.check(name, value)
  elif origin in (Union, types.UnionType):
    _check_union(name, value, kind)
  elif kind is tuple or origin is tuple:
    _check_tuple(name, value, kind)
  elif kind in _LEAVES:
    if not isinstance(value, _LEAVES[kind]) or (kind in (int, float) and isinstance(value, bool)):
      raise ValueError(f'{name}={reprlib.repr(value)} must be {describe(kind)}')
    if kind is str:
      _check_text(name, value)
    if kind is float and not _is_finite(value):
      raise ValueError(f'{name}={reprlib.repr(value)} must be finite')
  elif origin in (dict, abc.Mapping):
    _check_mapping(name, value)
    for key, each in value.items():
      check(f'a key of {name}', key, args[0])
      check(f'{name}.{key}', each, args[1])
  elif isinstance(kind, Keys) or typing.is_typeddict(kind):
    if keys_of(kind).by_path and isinstance(value, str):
      return _check_text(name, value)
    many = keys_of(kind).several and isinstance(value, list | tuple)
    for each in value if many else (value,):
      _check_mapping(name, each)
      check_keys(name, each, kind)


def check_keys(name: str, values: Mapping[str, Any], table: Table, *, unknown: str = '') -> None:
  """Checks the values of a table's keys; those that are None are unset.

  Args:
    name: of the whole, as 'config.optimizer', in front of a key's; '' for none.
    values: by key.
    table: see the head of this file.
    unknown: words in front of a key that there is not, as 'a ViT has no setting '.

  Raises:
    ValueError: a key that the table does not have, one that it needs and that is unset, or as
      `check`.
  """
  keys = keys_of(table)
  for key, value in values.items():
    choices.check_key(unknown or f'{name} has no key ', key, keys.kinds)
    if value is not None:
      check(f'{name}.{key}' if name else key, value, keys.kinds[key])
  missing = [key for key in keys.kinds if key in keys.needed and values.get(key) is None]
  if missing:
    raise ValueError(f'{name} lacks {", ".join(missing)}: set them')


def check_fields(record: Any) -> None:
  """Checks the fields of a dataclass or a Flax module that has just been made.

  Raises:
    ValueError: as `check`.
  """
  for key, kind in keys_of(type(record)).kinds.items():
    value = getattr(record, key)
    if value is not None:
      check(key, value, kind)


def keys_of(table: Table) -> Keys:
  """Returns the keys of a table."""
  return table if isinstance(table, Keys) else _keys_of(table)


@functools.cache
def _keys_of(table: Any) -> Keys:
  hints = typing.get_type_hints(table, include_extras=True)
  if typing.is_typeddict(table):
    kinds = {key: get_args(kind)[0] if get_origin(kind) is NotRequired else kind
             for key, kind in hints.items()}
    return Keys(kinds, table.__required_keys__)
  if dataclasses.is_dataclass(table):
    fields = {field.name: field for field in dataclasses.fields(table)}
    # Flax adds these to every module.
    added = ('parent', 'name') if 'parent' in fields else ()
    fields = {key: field for key, field in fields.items() if key not in added}
    needed = {key for key, field in fields.items()
              if field.default is field.default_factory is dataclasses.MISSING}
    return Keys({key: hints.get(key, Any) for key in fields}, frozenset(needed))
  parameters = inspect.signature(table).parameters.values()
  return Keys({each.name: hints[each.name] for each in parameters
               if each.kind is each.KEYWORD_ONLY})


def describe(kind: Any) -> str:
  """Returns a type in words, as 'a whole number at least 1'."""
  origin, args = get_origin(kind), get_args(kind)
  if origin is Annotated:
    return ' '.join([describe(args[0]), *map(str, args[1:])])
  if origin in (Union, types.UnionType):
    return ' or '.join(describe(each) for each in args if each not in (type(None), jax.Array))
  if origin in (dict, abc.Mapping):
    return 'a dict of keys' + (f', each {describe(args[1])}' if args[1] is not Any else '')
  if origin is tuple:
    if args[-1] is Ellipsis:
      return f'a tuple, each {describe(args[0])}'
    same = len(set(map(describe, args))) == 1
    return (f'a tuple of {len(args)}, each {describe(args[0])}' if same else
            f'({", ".join(map(describe, args))})')
  if isinstance(kind, Keys) or typing.is_typeddict(kind):
    return 'a dict of keys'
  return _WORDS.get(kind, getattr(kind, '__name__', str(kind)))


def _is_finite(value: Any) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:  # A whole number that no float can hold.
    return False


def _check_text(name: str, value: str) -> None:
  try:
    # Bytes of a file's name that are no UTF-8 pass: the command line gives them so.
    os.fsencode(value)
  except UnicodeEncodeError as error:
    raise ValueError(f'{name}={value!a} has half a character, which no file and no name can '
                     'have') from error


def _check_union(name: str, value: Any, kind: Any) -> None:
  faults = []
  for each in get_args(kind):
    try:
      return check(name, value, each)
    except ValueError as fault:
      faults += [fault] if each is not type(None) else []
  if len(faults) == 1:
    raise faults[0]
  raise ValueError(f'{name}={reprlib.repr(value)} must be {describe(kind)}')


def _check_tuple(name: str, value: Any, kind: Any) -> None:
  args = get_args(kind) or (Any, ...)
  if not isinstance(value, tuple | list):
    raise ValueError(f'{name}={reprlib.repr(value)} must be {describe(kind)}')
  if args[-1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ValueError(f'{name}={reprlib.repr(value)} must be {describe(kind)}')
  for index, (each, wanted) in enumerate(zip(value, args, strict=True)):
    check(f'{name}[{index}]', each, wanted)


def _check_mapping(name: str, value: Any) -> None:
  if not hasattr(value, 'keys'):
    raise ValueError(f'{name}={reprlib.repr(value)} must be a dict of keys')
