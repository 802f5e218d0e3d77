"""Budgets in bytes of the cache: solved to a share of tokens, over all plans of a config."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from models.plans.methods import Settings
from ops import values
from ops.budgets import BUDGETS

KEY = 'kv_mb'
T = TypeVar('T')


def refuse(component: str, settings: Settings) -> None:
  """Raises a ValueError where a component that fills no cache has such a budget."""
  if _asking(settings):
    raise ValueError(f'reduce.{component} has {KEY}, which counts what the cache of the language '
                     'model holds: give it to reduce.language or reduce.cache, and this another '
                     'budget')


def resolve(language: Settings, cache: dict[str, Any], make: Callable[[Settings, Any], T],
            kv_bytes: Callable[[T], float] | None) -> T:
  """Returns what `make` makes of reductions, of which one may have a budget in bytes.

  That one keeps the largest share of tokens, in thousandths, with which the cache of a prompt holds
  no more: keys and values of all layers, under all that is reduced. Rows of a batch that are
  shorter than the longest keep the same share.

  Args:
    language, cache: as `models.plans.methods.reduction_settings` returns them.
    make: (language, cache) without such a budget -> a model with its plans.
    kv_bytes: of such a model.

  Raises:
    ValueError: two such budgets, or one beside another or beside no cost model; one that cannot be
      met; or as `make`.
  """
  asking = _asking(language) + _asking(cache)
  if not asking:
    return make(language, cache)
  if len(asking) > 1:
    names = ' and '.join(str(each['method']) for each in asking)
    raise ValueError(f'{names} both have {KEY}, which counts the whole cache: give one of them '
                     'another budget')
  asked, = asking
  values.check(KEY, asked[KEY], values.Positive)
  others = [form for form in BUDGETS if asked.get(form) is not None]
  if others:
    raise ValueError(f'{asked["method"]} needs exactly one budget, got {KEY} and {others[0]}: '
                     'leave one')
  if kv_bytes is None:
    raise ValueError(f'{KEY}={asked[KEY]} needs a cost model to solve for: none was given')

  def of_share(thousandths: int) -> T:
    def settled(settings: Settings) -> Any:
      if isinstance(settings, list):
        return [settled(each) for each in settings]
      if KEY not in settings:
        return settings
      return {**{key: value for key, value in settings.items() if key != KEY},
              'keep_ratio': thousandths / 1000}

    return make(settled(language), settled(cache))

  def can(removed: int) -> bool:
    try:
      of_share(1000 - removed)
    except ValueError:
      return False
    return True

  # What a method cannot leave, it cannot leave less of either.
  most = bisect.bisect_left(range(1, 1001), True, key=lambda removed: not can(removed))
  removed = bisect.bisect_left(range(most + 1), True, key=lambda removed: (
      kv_bytes(of_share(1000 - removed)) <= asked[KEY] * 1e6))
  if removed > most:
    least, whole = (kv_bytes(of_share(share)) / 1e6 for share in (1000 - most, 1000))
    raise ValueError(f'{KEY}={asked[KEY]} cannot be met: with as little as {asked["method"]} can '
                     f'leave here, the cache of this prompt holds {least:.3f} of {whole:.3f} MB; '
                     'raise it, list earlier layers, or shorten the prompt')
  return of_share(1000 - removed)


def _asking(settings: Settings) -> list[Mapping[str, Any]]:
  """Returns the reductions that have a budget in bytes."""
  several: Sequence[Mapping[str, Any]] = settings if isinstance(settings, list) else [settings]
  return [each for each in several if each.get(KEY) is not None]
