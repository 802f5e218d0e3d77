"""The contract over the forms of methods that an argument turns on, which no name stands for."""

import dataclasses
import functools

import pytest
from helpers import invariants
from helpers.contract import SETTINGS

from ops.reducers import REDUCERS

# Forms by the method's name: arguments, with those of the contract's own settings.
FORMS = {
    'hiprune': [{'variant': 'release', 'patches': 1, 'alpha': 1.0}],
    'fopru': [{'strategy': 'row'}],
    'holov': [{'variant': 'paper'}, {'chunks': None}],
    'prumerge': [{'keeps': 'outliers', 'neighbours': 4}, {'keeps': 'spaced', 'neighbours': 4}],
    'todre': [{'selection': 'k_center'}],
    'visionzip': [{'share': 0.3, 'variant': 'paper'}],
}
# What rows owe each other, and what a form may leave.
INVARIANTS = ('padding', 'budgets', 'filled')
CASES = [(name, args) for name, forms in FORMS.items() for args in forms]


@pytest.mark.long
@pytest.mark.parametrize('invariant', INVARIANTS)
@pytest.mark.parametrize(('name', 'args'), CASES, ids=str)
def test_forms_keep_the_contract(name, args, invariant, monkeypatch):
  form = f'{name}_{"_".join(map(str, args.values()))}'
  monkeypatch.setitem(REDUCERS, form, formed(name, tuple((SETTINGS.get(name, {}) | args).items())))
  invariants.INVARIANTS[invariant](form)


@functools.cache
def formed(name, args):
  """The class of a method with other defaults."""
  fields = [(key, object, dataclasses.field(default=value)) for key, value in args]
  return dataclasses.make_dataclass(f'{name}_form', fields, bases=(REDUCERS[name],), frozen=True)
