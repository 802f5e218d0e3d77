"""Checks of values against the types that their keys are declared with."""

import dataclasses
import fractions
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import flax.linen as nn
import numpy as np
import pytest
from helpers.errors import said

from ops import values
from ops.values import Keys, Like, NotEmpty, OneOf, Pattern, Range, check

NAN, INFINITY = float('nan'), float('inf')
PAIR = tuple[values.Positive, values.Positive]
VERSION = Annotated[str, Like('[a-z]+[0-9]', 'b2')]


class Inner(TypedDict):
  rate: values.Rate
  note: NotRequired[str]


@dataclasses.dataclass
class Outer:
  width: values.Width
  inner: Any = None


class Module(nn.Module):
  width: values.Width
  name_of: str = ''


def function(image, *, shift: values.Share = 0.0, times: int = 1):
  """Has keywords alone as keys."""


@pytest.mark.parametrize(('value', 'kind'), [
    (1, int), (np.int32(1), int), (1, float), (0.5, float), (np.float32(0.5), float),
    (fractions.Fraction(1, 2), float), (True, bool), (np.True_, bool), ('', str), (None, None),
    ((1, 2), tuple[int, ...]), ([1, 2], tuple[int, int]), ((), tuple[int, ...]),
    (('a', (1, 2)), tuple[str, tuple[int, ...]]), (None, int | None), ((1, 2), int | PAIR),
    ({'a': 1}, Mapping[str, int]), ({'rate': 0.5}, Inner), ({'rate': 0.5, 'note': None}, Inner),
    (0, values.Rate), (1, values.Share), (2 ** 32 - 1, values.Seed), (..., Any),
    ('b', Annotated[str, OneOf('ab')]), ('(a|b)$', Annotated[str, Pattern()]),
    ('ab3', VERSION)], ids=str)
def test_what_passes(value, kind):
  check('key', value, kind)


@pytest.mark.parametrize(('value', 'kind', 'message'), [
    (True, int, 'key=True must be a whole number'), (1.0, int, 'key=1.0 must be a whole number'),
    ('1', int, "key='1' must be a whole number"), (True, float, 'key=True must be a number'),
    (NAN, float, 'key=nan must be finite'), (-INFINITY, float, 'key=-inf must be finite'),
    (10 ** 400, float, 'must be finite'), (NAN, values.Rate, 'key=nan must be finite'),
    (1, bool, 'key=1 must be True or False'), (1, str, 'key=1 must be text'),
    ('ab', tuple[str, ...], "key='ab' must be a tuple, each text"),
    ({}, int, 'key={} must be a whole number'), ('tome', Mapping[str, Any], 'a dict of keys'),
    ((1, 'a'), tuple[int, ...], "key[1]='a' must be a whole number"),
    ((1, 2, 3), tuple[int, int], 'must be a tuple of 2, each a whole number'),
    (('a', 1), tuple[int, str], "key[0]='a' must be a whole number"),
    ('x', int | tuple[int, int], "key='x' must be a whole number or a tuple of 2, each a whole"),
    (0, values.Count | None, 'key=0 must be from 1 to 2147483647'),
    (-1, values.Seed, 'key=-1 must be from 0 to 4294967295'),
    (2 ** 70, values.Seed, 'must be from 0 to 4294967295'),
    (0, values.Positive, 'key=0 must be above 0'), (1, values.Rate, 'at least 0 and below 1'),
    (2, Annotated[float, Range(high=1, unit='pixels')], 'key=2 must be at most 1 pixels'),
    ('c', Annotated[str, OneOf('ab')], "key='c' is unknown: choose one of a, b"),
    ('(', Annotated[str, Pattern()], "key='(' is no regular expression: missing )"),
    ('3', VERSION, "key='3' must be text as 'b2'"), ('b2\n', VERSION, "key='b2\\n' must be text"),
    (3, VERSION | tuple[int, ...], "key=3 must be text as 'b2' or a tuple, each a whole number"),
    (1, str | Mapping[str, values.Share], 'text or a dict of keys, each a number from 0 to 1'),
    (1, str | Mapping[str, Any], 'key=1 must be text or a dict of keys'),
    ('x' * 999, Annotated[str, OneOf('ab')], "xxx...xxx"),
    ((), Annotated[tuple[int, ...], NotEmpty()], 'key=() is empty: give at least one'),
    ({'rat': 0.5}, Inner, "key has no key 'rat' (did you mean 'rate'?): choose from rate, note"),
    ({'note': 'a'}, Inner, 'key lacks rate: set them'),
    ({'rate': None}, Inner, 'key lacks rate: set them'),
    ({'rate': 2}, Inner, 'key.rate=2 must be at least 0 and below 1'),
    (({'rate': 2},), tuple[Inner, ...], 'key[0].rate=2 must be'),
    ({'a': 'b'}, Mapping[str, int], "key.a='b' must be a whole number"),
    ({'c': 1}, Mapping[Annotated[str, OneOf('ab')], int], "a key of key='c' is unknown"),
    ('x' * 999, int, "xxx...xxx")], ids=str)
def test_what_is_refused(value, kind, message):
  text = said(check, 'key', value, kind)
  assert message in text
  assert len(text) < 200


@pytest.mark.parametrize(('table', 'keys', 'needed'), [
    (Inner, {'rate', 'note'}, {'rate'}), (Outer, {'width', 'inner'}, {'width'}),
    (Module, {'width', 'name_of'}, {'width'}), (function, {'shift', 'times'}, set()),
    (Keys({'a': int, 'b': int}, frozenset('a')).without('b') | Keys({'c': int}), {'a', 'c'}, {'a'}),
    (Keys({'a': int, 'b': int}, frozenset('ab')).without('b'), {'a'}, {'a'})])
def test_tables_of_all_forms(table, keys, needed):
  found = values.keys_of(table)
  assert found.kinds.keys() == keys
  assert found.needed == needed


def test_fields_of_a_record_that_was_made():
  values.check_fields(Outer(3))
  assert said(values.check_fields, Outer(0)) == 'width=0 must be from 1 to 131072'
  assert said(values.check_keys, '', {'wide': 1}, Outer, unknown='a box has no side ') == (
      "a box has no side 'wide' (did you mean 'width'?): choose from width, inner")
