"""Turns budgets into counts: a ratio or a FLOPs target becomes static integers here alone.

A budget counts the tokens that a reduction may touch. Protected tokens ([CLS] and its like) and the
slots that a method adds (EViT's fused token) come on top. The forms:

  remove=13                 so many fewer in every listed layer, clamped where a method cannot
  remove=(13, -1.0)         the same number in all, falling (negative) or rising over the layers:
                            layer i removes int(lo + (hi - lo) i / (L - 1)), lo = int(r (1 - c)),
                            hi = 2 r - lo (ToMe, arXiv:2210.09461, released code)
  keep_ratio=0.7            in every listed layer, of its tokens (ratio_of='current') or
                            0.7, 0.49, … of what the model started with (ratio_of='start')
  keep_ratio=(0.7, 0.5)     one a listed layer, of either
  keep=(48, 32, 16)         counts, one for all or one a listed layer
  flops_ratio=0.6           of the unreduced model's MACs, solved to counts: at most this, as close
  gmacs=2.9                 as integers come

Rounding is done once, on exact fractions: 0.7 means 7/10. `rounding` is 'ceil' (EViT, PiToMe, MCTF:
removing floor(n (1 - ratio))), 'floor' (DynamicViT and the Haurum benchmark: int(n ratio)) or
'round' (half to even).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import numpy as np

from ops import choices

BUDGETS = ('remove', 'keep_ratio', 'keep', 'flops_ratio', 'gmacs')
RATIO_OF = ('current', 'start')
# What becomes of a host that is shorter than a budget: an error, or nothing goes (prompts).
SHORT = ('refuse', 'keep')
# Longer than any prompt.
LONG = 2 ** 24
T = TypeVar('T')
# A count, or int64[...], counts of many rows.
Counts = TypeVar('Counts', int, np.ndarray)


def _ceil(top: Counts, bottom: int) -> Counts:
  return -(-top // bottom)


def _floor(top: Counts, bottom: int) -> Counts:
  return top // bottom


def _half_to_even(top: Counts, bottom: int) -> Counts:
  down, rest = top // bottom, 2 * (top % bottom)
  return down + ((rest > bottom) | ((rest == bottom) & (down % 2 == 1)))


# Of exact fractions: dividend and divisor.
ROUNDING: dict[str, Callable[[Any, int], Any]] = {
    'ceil': _ceil, 'floor': _floor, 'round': _half_to_even}


# Rules compare by what they say, since programs are told apart by their plans.


@dataclasses.dataclass(frozen=True)
class Without:
  """Leaves all tokens but `count`."""

  count: int

  def __call__(self, now: Counts, start: Counts) -> Counts:
    """Returns how many stay."""
    del start
    return now - self.count


@dataclasses.dataclass(frozen=True)
class Share:
  """Leaves the part `ratio` of the tokens: of those there are, or were at the start."""

  rounding: str
  ratio: Fraction
  of: str = 'current'

  def __call__(self, now: Counts, start: Counts) -> Counts:
    """Returns how many stay."""
    whole = start if self.of == 'start' else now
    return ROUNDING[self.rounding](self.ratio.numerator * whole, self.ratio.denominator)


@dataclasses.dataclass(frozen=True)
class Exactly:
  """Leaves `count` tokens."""

  count: int

  def __call__(self, now: Counts, start: Counts) -> Counts:
    """Returns how many stay."""
    del start
    return self.count + 0 * now


@dataclasses.dataclass(frozen=True)
class Step:
  """Says what a budget asks of one layer.

  Attributes:
    layer: which.
    keep: (tokens that may be touched now, and at the start) -> how many of them stay: counts, or
      int64[...] of many rows.
    said: the budget as a config writes it, for errors; '' where it gives way to what is possible.
    of: which of the two decides, 'current' or 'start'; '' for neither (a count).
    extra: slots that the method adds to those it keeps.
  """

  layer: int
  keep: Callable[[Any, Any], Any]
  said: str = ''
  of: str = 'current'
  extra: int = 0

  def kept(self, count: Any, now: Any, least: Any) -> Any:
    """Returns how many free tokens stay, as far as a method can: counts, or arrays of them.

    Args:
      count: that `keep` returned.
      now: free tokens.
      least: the fewest that the method can leave.
    """
    extra = self.extra if self.said else 0
    below = (count < now) & (count + extra < now)
    lower = count + extra
    lower = lower + (least - lower) * (least > lower)
    lower = lower + (now - lower) * (now < lower)
    return lower * below + now * (1 - below)


@dataclasses.dataclass(frozen=True)
class Cut:
  """Holds one reduction: in `layer`, from `slots_in` to `slots_out` slots with protected ones.

  Attributes:
    layer, slots_in, slots_out: these.
    step: what was asked, by which shorter rows find their own counts.
  """

  layer: int
  slots_in: int
  slots_out: int
  step: Step | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Holds the limits that a host and a method set.

  Attributes:
    depth: number of layers.
    slots: tokens at the start, protected ones included.
    protected: tokens that are never touched.
    extra: slots that the method adds to those it keeps.
    min_slots: slots -> the fewest that the method can leave of them, protected ones included.
    short: one of `SHORT`.
  """

  depth: int
  slots: int
  protected: int = 0
  extra: int = 0
  min_slots: Callable[[int], int] = lambda slots: 1
  short: str = 'refuse'


def resolve(budget: Mapping[str, Any], limits: Limits, *,
            macs: Callable[[tuple[Cut, ...]], float] | None = None) -> tuple[Cut, ...]:
  """Turns a budget into cuts.

  Args:
    budget: one of the forms above under its name, beside `layers` ('all', an int or ints), and
      optionally `rounding` and `ratio_of`. None stands for the default of each.
    limits: what the host and the method allow.
    macs: the model's MACs under given cuts; needed by flops_ratio and gmacs.

  Returns:
    One Cut for each listed layer that loses tokens, in layer order.

  Raises:
    ValueError: naming the value, what is possible, and what to change.
  """
  return solve(budget, limits.depth, limits.slots - limits.protected,
               lambda steps: walk(steps, limits), macs)


def solve(budget: Mapping[str, Any], depth: int, free: int, make: Callable[[Sequence[Step]], T],
          macs: Callable[[T], float] | None = None, unreduced: T | None = None) -> T:
  """Turns a budget into steps, and those into whatever `make` makes of them.

  Args:
    budget: as in `resolve`.
    depth: number of layers.
    free: tokens at the start that may be touched.
    make: what steps become: cuts, or the events of a plan that has others too.
    macs: the model's MACs under what `make` returns; needed by flops_ratio and gmacs.
    unreduced: what stands for the unreduced model; None for what `make` makes of no steps.

  Raises:
    ValueError: as `resolve`.
  """
  layers = parse_layers(budget.get('layers'), depth)
  named = [name for name in BUDGETS if budget.get(name) is not None]
  if len(named) != 1:
    raise ValueError(f'a reduction needs exactly one budget, got {named or "none"}: '
                     f'choose one of {", ".join(BUDGETS)}')
  form, value = named[0], budget[named[0]]
  rounding, base = budget.get('rounding') or 'ceil', budget.get('ratio_of') or 'current'
  choices.check('rounding=', rounding, ROUNDING)
  choices.check('ratio_of=', base, RATIO_OF)
  if form == 'remove':
    return make(_remove(constant_or_inflected(value, len(layers)), layers))
  if form == 'keep_ratio':
    return make(_keep_ratio(value, layers, rounding, base))
  if form == 'keep':
    return make(_keep(value, layers))
  if not _is_number(value) or value <= 0:
    raise ValueError(f'{form}={value!r} must be a positive number')
  if macs is None:
    raise ValueError(f'{form}={value} needs a cost model to solve for: none was given')
  whole = macs(make(()) if unreduced is None else unreduced)
  target = value * whole if form == 'flops_ratio' else value * 1e9
  return _solve(target, f'{form}={value}', whole, layers, free, len(layers) == depth, rounding,
                make, macs)


def walk(steps: Sequence[Step], limits: Limits) -> tuple[Cut, ...]:
  """Returns the cuts of one method's steps, each from where the one before it left.

  Raises:
    ValueError: a step that asks for what the method or the host cannot do.
  """
  cuts, slots = [], limits.slots
  for step in steps:
    cut = take(step, slots, limits.slots - limits.protected, limits)
    if cut is not None:
      cuts.append(cut)
      slots = cut.slots_out
  return tuple(cuts)


def take(step: Step, slots: int, start: int, limits: Limits) -> Cut | None:
  """Returns the cut of a step, None where nothing goes.

  Args:
    step: what a budget asks.
    slots: there now, protected ones included.
    start: tokens at the start that the reduction may touch.
    limits: what host and method allow.

  Raises:
    ValueError: as `walk`.
  """
  free = slots - limits.protected
  count = step.keep(free, start)
  if step.of == '' and (count < 1 or (count > free and limits.short == 'refuse')):
    raise ValueError(f'{step.said} in layer {step.layer} is impossible: {free} tokens are there to '
                     f'keep, so give 1 to {free}')
  step = dataclasses.replace(step, extra=limits.extra)
  kept = step.kept(count, free, limits.min_slots(slots) - limits.protected)
  if kept >= free:
    asked = count + step.extra if step.said else free
    if asked < free:
      _check(step, asked, slots, limits)
    return None
  if step.said:
    _check(step, count + step.extra, slots, limits)
  return Cut(step.layer, slots, limits.protected + kept, step)


def parse_layers(layers: object, depth: int) -> tuple[int, ...]:
  """Returns layer indices, sorted, from 'all' (or None), one index or several.

  Raises:
    ValueError: an index that the depth does not have, or one that is named twice.
  """
  if layers is None or layers == 'all':
    return tuple(range(depth))
  if isinstance(layers, str):
    raise ValueError(f"layers={layers!r} is unknown: give 'all', a layer index or several")
  chosen = tuple(layers) if isinstance(layers, Iterable) else (layers,)
  for layer in chosen:
    if not _is_count(layer) or not 0 <= layer < depth:
      raise ValueError(f'layer {layer!r} is out of range: the model has layers 0 to {depth - 1}')
  if len(set(chosen)) != len(chosen) or not chosen:
    raise ValueError(f'layers={chosen} must name at least one layer, each once')
  return tuple(sorted(chosen))


def constant_or_inflected(remove: int | Sequence[float], count: int) -> tuple[int, ...]:
  """Returns the tokens to remove in each layer; (r, inflection) as ToMe's released parse_r.

  Fractions are exact. The release's floats may fall one short: its int(10 (1 - 0.9)) is 0.

  Raises:
    ValueError: a value that is neither a count nor such a pair.
  """
  if _is_count(remove) and remove >= 0:
    return (int(remove),) * count
  pair = tuple(remove) if isinstance(remove, Sequence) else ()
  if len(pair) != 2 or not all(map(_is_number, pair)) or pair[0] < 0 or not -1 <= pair[1] <= 1:
    raise ValueError(f'remove={remove!r} must be a count from 0 or (count, inflection in [-1, 1])')
  rate, inflection = (Fraction(str(number)) for number in pair)
  low = int(rate * (1 - inflection))
  high = 2 * rate - low
  step = (high - low) / (count - 1) if count > 1 else Fraction(0)
  return tuple(int(low + step * i) for i in range(count))


def _is_count(value: object) -> TypeGuard[int]:
  return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
  return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def per_layer(value: T | Sequence[T], layers: Sequence[int], name: str) -> tuple[T, ...]:
  """Returns one value for each layer, from one for all or one each.

  Raises:
    ValueError: another number of values than layers.
  """
  if not isinstance(value, Sequence) or isinstance(value, str):
    return (value,) * len(layers)
  if len(value) != len(layers):
    raise ValueError(f'{name}={tuple(value)} has {len(value)} values for {len(layers)} layers '
                     f'{tuple(layers)}: give one, or one a layer')
  return tuple(value)


def _remove(counts: Sequence[int], layers: Sequence[int]) -> tuple[Step, ...]:
  return tuple(Step(layer, Without(count))
               for layer, count in zip(layers, counts, strict=True))


def _keep_ratio(value: float | Sequence[float], layers: Sequence[int], rounding: str,
                base: str) -> tuple[Step, ...]:
  ratio_by_layer = per_layer(value, layers, 'keep_ratio')
  for share in ratio_by_layer:
    if not _is_number(share) or not 0 < share <= 1:
      raise ValueError(f'keep_ratio={share!r} is outside (0, 1]: it is the share of tokens that '
                       'stays')
  steps = []
  for i, (layer, share) in enumerate(zip(layers, ratio_by_layer, strict=True)):
    ratio = Fraction(str(share))
    if base == 'start' and not isinstance(value, Sequence):
      ratio = ratio ** (i + 1)
    keep = Share(rounding, ratio, base)
    steps.append(Step(layer, keep, f'keep_ratio={float(share)}', base))
  return tuple(steps)


def share_step(layer: int, share: Fraction) -> Step:
  """Returns a step that keeps a share of the tokens, rounded up, where that is possible."""
  return Step(layer, Share('ceil', share))


def _keep(value: int | Sequence[int], layers: Sequence[int]) -> tuple[Step, ...]:
  steps = []
  for layer, count in zip(layers, per_layer(value, layers, 'keep'), strict=True):
    if not _is_count(count):
      raise ValueError(f'keep={count!r} in layer {layer} is impossible: it is how many tokens '
                       'stay, so give 1 or more')
    steps.append(Step(layer, Exactly(int(count)), f'keep={count}', ''))
  return tuple(steps)


def _check(step: Step, kept: int, slots: int, limits: Limits) -> None:
  """Raises where a method cannot leave as few as asked, unless it is the host that is short."""
  least = max(limits.min_slots(slots), limits.protected + 1)
  if limits.protected + kept >= least:
    return
  # A prompt goes as far towards a count as it can. A share that a method cannot leave is missed by
  # every prompt where the least grows with it (pairs that merge), by short ones alone where it does
  # not (a window).
  if limits.short == 'keep' and (step.of == '' or limits.min_slots(LONG) < LONG // 8):
    return
  raise ValueError(f'{step.said} leaves {limits.protected + kept} of {slots} slots in layer '
                   f'{step.layer}, but this method can leave no fewer than {least} '
                   f'({limits.protected} protected): raise the budget or cut in more layers')


def _solve(target: float, budget: str, whole: float, layers: Sequence[int], free: int,
           everywhere: bool, rounding: str, make: Callable[[Sequence[Step]], T],
           macs: Callable[[T], float]) -> T:
  """Finds the schedule closest under the target: even removal over all layers, else one ratio."""

  def spread(total: int) -> T:
    ends = [total * (i + 1) // len(layers) for i in range(len(layers))]
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return make(_remove(counts, layers))

  def ratio(removed: int) -> T:
    return make(_keep_ratio((1000 - removed) / 1000, layers, rounding, 'current'))

  scheduled: Callable[[int], T]
  low = 0
  if everywhere:
    # More in all than there is: the first layers give what they can, as ToMe with a large r.
    scheduled = spread
    # Another reduction may need what this one would take: the more it takes, the likelier.
    high = bisect.bisect_left(range(1, free * len(layers) + 1), True,
                              key=lambda total: not _possible(spread, total))
  else:
    scheduled = ratio
    high = max(step for step in range(1000) if _possible(ratio, step))
  if macs(scheduled(high)) > target:
    raise ValueError(f'{budget} cannot be met: cutting all that this method can cut leaves '
                     f'{macs(scheduled(high)) / 1e9:.3f} of {whole / 1e9:.3f} GMACs; '
                     'raise the target or list earlier layers')
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if macs(scheduled(middle)) <= target else (middle + 1, high)
  return scheduled(low)


def _possible(make: Callable[[int], object], step: int) -> bool:
  try:
    make(step)
  except ValueError:
    return False
  return True


def part_of(cuts: Sequence[Cut], fraction: float, limits: Limits) -> tuple[Cut, ...]:
  """Returns cuts in the same layers that remove only a fraction of the tokens.

  Where a cut keeps the part p of the free slots, the new one keeps 1 - fraction (1 - p) of the
  slots at that point, rounded up: EViT's way to a keep ratio (`annealed_keep_ratio`), for any
  budget. At fraction 1 the cuts are equal.

  Raises:
    ValueError: a fraction outside [0, 1].
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'fraction={fraction!r} is outside [0, 1]: it is the part of the removal to '
                     'do')
  weaker, slots = [], limits.slots
  for cut in cuts:
    ratio = Fraction(cut.slots_out - limits.protected, cut.slots_in - limits.protected)
    weaker_ratio = 1 - Fraction(str(fraction)) * (1 - ratio)
    weaker_cut = take(share_step(cut.layer, weaker_ratio), slots,
                      limits.slots - limits.protected, limits)
    if weaker_cut is not None:
      weaker.append(weaker_cut)
      slots = weaker_cut.slots_out
  return tuple(weaker)


def phases(start_step: int, stop_step: int, count: int) -> tuple[tuple[int, float], ...]:
  """Divides training into phases, each (first step, fraction of the removal).

  Nothing is removed up to `start_step`, everything from `stop_step` on. Between them lie `count`
  phases of equal length, to a step, each with the cosine's fraction at its middle.

  Raises:
    ValueError: steps that are not in order, or not enough of them for so many phases.
  """
  if not _is_count(count) or not 1 <= count <= stop_step - start_step:
    raise ValueError(f'phases={count!r} must be 1 to the {stop_step - start_step} steps between '
                     f'start_step={start_step} and stop_step={stop_step}')
  edges = [start_step + (stop_step - start_step) * i // count for i in range(count + 1)]
  schedule = [(0, 0.0)] if start_step > 0 else []
  for first, end in itertools.pairwise(edges):
    # The fraction of all tokens that goes at this step, when in the end all of them go.
    ratio = annealed_keep_ratio(0.0, step=(first + end) / 2, start_step=start_step,
                                stop_step=stop_step)
    schedule.append((first, 1 - ratio))
  return (*schedule, (stop_step, 1.0))


def annealed_keep_ratio(keep_ratio: float, *, step: float, start_step: int,
                        stop_step: int) -> float:
  """Returns the keep ratio at a training step: it falls from 1 along a cosine.

  EViT (arXiv:2202.07800, released code): 1 up to `start_step`, `keep_ratio` from `stop_step` on.
  Every new count compiles anew, so `phases` changes it only once in many steps.

  Raises:
    ValueError: if the steps are not in order.
  """
  if not 0 <= start_step < stop_step:
    raise ValueError(f'start_step={start_step} and stop_step={stop_step} must be in order, and not '
                     'negative')
  progress = min(max((step - start_step) / (stop_step - start_step), 0.0), 1.0)
  return keep_ratio + (1 - keep_ratio) * (1 + math.cos(math.pi * progress)) / 2
