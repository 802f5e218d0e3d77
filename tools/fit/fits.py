"""What is fitted to samples: DyMU's thresholds, FitPrune's counts, and the layer of VTW.

Axes: B batch, N slots, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lib.cost import lm as lm_cost
from lib.search.schedules import Counts, fit_within
from models.backbones.lm import LM, last_real
from models.backbones.vit import ViT
from models.backbones.vlm import depth_of
from models.blocks import add
from models.plan import make_plan
from models.plans.events import Plan
from models.storage import layer_of
from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.match import find_threshold
from ops.primitives.queries import sums_of_image_and_text, text_after_images
from ops.reducers.vision import VISION
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet

Array = jax.Array
DyMU: Any = VISION['dymu']


@dataclasses.dataclass(frozen=True)
class _OfBatch(DyMU):
  """DyMU by the threshold at which the batch at hand loses so many tokens, which it takes down.

  Attributes:
    merge: tokens of an image in a layer, on average.
  """

  merge: int = 1
  watch_needs = frozenset({'keys'})

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """Returns the threshold, for every token the same."""
    found = find_threshold(tokens, signals.keys, remove=self.merge)
    return {_threshold(signals.layer): jnp.broadcast_to(found, tokens.kind.shape)}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    found = tokens.stats[_threshold(signals.layer)][:, :1]
    return DyMU(threshold=found)(tokens, signals, num_slots=num_slots)


def _threshold(layer: int) -> str:
  return f'threshold_{layer}'


def merge_thresholds(tower: ViT, params: Any, batches: Iterable[Any], *,
                     merge: int) -> tuple[float, ...]:
  """Finds the cosines above which a tower's tokens merge, so that as many go in each layer.

  In every batch each layer merges by the threshold of that batch, and the next one sees what is
  left, as DyMU's release does (arXiv:2504.17040); the means over batches are returned.

  Args:
    tower: without a plan.
    params: of the tower.
    batches: the tower's input, in batches of one shape.
    merge: tokens that an image loses in each layer, on average over a batch; one at least does.

  Returns:
    float[L], for `DyMU.threshold`; 1 for layers that do not run.

  Raises:
    ValueError: no batch; another tower or one with a plan; too few tokens for so many layers.
  """
  if not isinstance(tower, ViT) or tower.plan is not None:
    raise ValueError('thresholds are found in a ViT without reductions: leave its plan out, or '
                     'give a model with another tower')
  layers = range(depth_of(tower))
  made = make_plan({'method': 'dymu', 'layers': tuple(layers), 'remove': 1}, tower.host)
  chosen = dataclasses.replace(made.only, method=_OfBatch(merge=merge), watch=tuple(layers))
  events = tuple(dataclasses.replace(event, reduction=chosen) for event in made.events)
  planned = tower.clone(plan=Plan(events, (chosen,)))

  @jax.jit
  def run(params: Any, batch: Any) -> Array:
    made, out = planned.apply({'params': params}, batch)
    stats = (made if isinstance(made, TokenSet) else out['tokens']).stats
    return jnp.stack([stats[_threshold(layer)][0, 0] for layer in layers])

  found = [np.asarray(run(params, batch), np.float64) for batch in batches]
  if not found:
    raise ValueError('there is no batch to find thresholds on: give one image at least')
  return (*np.mean(found, axis=0).tolist(), *[1.0] * (tower.depth - len(layers)))


class LayerByLayer:
  """Runs a language model over prompts layer by layer, so that tokens may leave in any of them.

  Args:
    lm: without plans.
    params: of the model.

  Raises:
    ValueError: a model with plans, or where a token sees more than those before it.
  """

  def __init__(self, lm: LM, params: Any):
    if lm.plan or lm.cache_plan or not lm.is_causal or lm.unmerging != 'none' or lm.visual_stride:
      raise ValueError('fits to a language model are for one without reductions, with causal '
                       'attention and one position a token: leave plans, mask, full_layers, '
                       'unmerging and visual_stride out')
    self.lm, self._params = lm, params
    self._block = lm.bind({'params': params}).stack.block
    self._plain = jax.jit(self._run_plain)
    self._prune = jax.jit(self._run_pruned)
    self._read = jax.jit(self._run_head)

  def enter(self, tokens: TokenSet) -> TokenSet:
    """Returns the tokens of prompts as the first layer takes them."""
    if tokens.added:
      raise ValueError("a tower's features that are added in later layers are not known here: "
                       'fit to a model without deepstack')
    return tokens.replace(x=tokens.x.astype(self.lm.dtype), valid=tokens.real, padding='anywhere',
                          stats={})

  def prune(self, tokens: TokenSet, whole: Array | None,
            share: float) -> tuple[np.ndarray, np.ndarray]:
    """Lets visual tokens leave as long as layers lose no more than a share of attention.

    Args:
      tokens: of B prompts.
      whole: float32[L, B, 2], the attention of images and of text that visual tokens get in each
        layer when all are there; None lets none leave.
      share: of these.

    Returns:
      float32[L, B, 2], the attention that they get; int32[L, B], how many leave in each layer.
    """
    tokens, found = self.enter(tokens), []
    for layer in range(self.lm.depth):
      most = jnp.full((len(tokens.x), 2), jnp.inf) if whole is None else whole[layer]
      tokens, *told = self._prune(self._weights(layer), tokens, most, share)
      found.append(told)
    sums, gone = zip(*found, strict=True)
    return np.stack(sums), np.stack(gone)

  def withdraw(self, tokens: TokenSet) -> np.ndarray:
    """Measures what comes of no visual token being left from a layer on: float[L, B].

    It is the divergence of the next token's distribution without them from that with them, as
    VTW's release has it.
    """
    tokens = self.enter(tokens)
    inputs = []
    for layer in range(self.lm.depth):
      inputs.append(tokens)
      tokens = self._plain(self._weights(layer), tokens)
    whole, found = self._read(self._params, tokens), []
    for first, left in enumerate(inputs):
      left = left.replace(valid=left.real & (left.kind != VISUAL))
      for layer in range(first, self.lm.depth):
        left = self._plain(self._weights(layer), left)
      own = self._read(self._params, left)
      found.append(np.asarray(jnp.sum(jnp.exp(own) * (own - whole), axis=1)))
    return np.stack(found)

  def _weights(self, layer: int) -> Any:
    return layer_of(self._params['stack']['blocks'], layer)

  def _attend(self, weights: Any, tokens: TokenSet,
              needs: frozenset[str]) -> tuple[TokenSet, Signals]:
    change, signals = self._block.apply({'params': weights}, tokens, needs=needs,
                                        proportional=False, method='attend')
    return add(tokens, cast(Array, change)), cast(Signals, signals)

  def _feed(self, weights: Any, tokens: TokenSet) -> TokenSet:
    change, _ = self._block.apply({'params': weights}, tokens, method='feed_forward')
    return add(tokens, cast(Array, change))

  def _run_plain(self, weights: Any, tokens: TokenSet) -> TokenSet:
    return self._feed(weights, self._attend(weights, tokens, frozenset())[0])

  def _run_pruned(self, weights: Any, tokens: TokenSet, whole: Array,
                  share: Array) -> tuple[TokenSet, Array, Array]:
    """As FitPrune: tokens leave behind attention, which still reads them."""
    visual = tokens.real & (tokens.kind == VISUAL)
    tokens, signals = self._attend(weights, tokens, frozenset({'queries', 'keys'}))
    after = text_after_images(tokens)
    # Means over the queries, of which there are fewer images from layer to layer.
    image, text = (
        jnp.where(visual, each, 0.0) / jnp.maximum(jnp.sum(of, axis=1, keepdims=True), 1)
        for each, of in zip(sums_of_image_and_text(tokens, signals, after), (visual, after),
                            strict=True))
    sums = jnp.stack([jnp.sum(image, axis=1), jnp.sum(text, axis=1)], axis=1)
    least = whole * (1 - share)
    gone = _lowest(image, visual, least[:, :1]) & _lowest(text, visual, least[:, 1:])
    left = tokens.replace(valid=tokens.real & ~gone)
    return self._feed(weights, left), sums, jnp.sum(gone, axis=1, dtype=jnp.int32)

  def _run_head(self, params: Any, tokens: TokenSet) -> Array:
    """Logarithms of the likelihoods of the next token, float32[B, V]."""
    last = jnp.argmax(last_real(tokens), axis=1)[:, None]
    logits = self.lm.apply({'params': params}, take(tokens.x, last)[:, 0],
                           method=lambda lm, x: lm.logits(lm.norm(x)))
    return jax.nn.log_softmax(cast(Array, logits), axis=1)


def _lowest(values: Array, among: Array, least: Array) -> Array:
  """Names the lowest values without which those of a row still add up to so much: bool[B, N]."""
  order = jnp.argsort(jnp.where(among, values, jnp.inf), axis=1, stable=True)
  ordered = take(values, order)
  left = jnp.sum(values, axis=1, keepdims=True) - jnp.cumsum(ordered, axis=1)
  number = jnp.sum((left >= least) & take(among, order), axis=1, keepdims=True)
  return among & (jnp.argsort(order, axis=1) < number)


def prune_schedule(model: LayerByLayer, samples: Sequence[TokenSet], *,
                   flops_ratio: float) -> dict[str, tuple[int, ...]]:
  """Fits how many visual tokens FitPrune leaves in which layer.

  FitPrune (Ye et al., 2024), arXiv:2409.10197, as released: the least share is searched for of the
  attention that a layer may lose, of images and of text each, with which a budget is met; a layer
  lets those tokens go that are among the lowest in both, and the mean over samples is rounded down.
  The release asks each time what each sample costs, and prints the last share tried; here it is
  what the means cost, with the largest image, and the last share that met the budget.

  Args:
    model: to be fitted to.
    samples: prompts with images, each of B rows.
    flops_ratio: the language model's cost with that schedule, over that without it.

  Returns:
    'layers' and 'keep', as a config has them.

  Raises:
    ValueError: no samples, or no images in them; a budget that no share meets.
  """
  visual = [np.asarray(jnp.sum(each.real & (each.kind == VISUAL), axis=1)) for each in samples]
  if not visual or not np.concatenate(visual).all():
    raise ValueError('the fit is to what images lose: give prompts, and an image in each')
  most, slots = int(np.concatenate(visual).max()), samples[0].slots
  host = model.lm.host(slots, visual=most)
  whole = [jnp.asarray(model.prune(each, None, 0.0)[0]) for each in samples]

  @functools.cache
  def cost(removed: Counts) -> float:
    schedule = _schedule(removed, most)
    reduce = {'method': 'fitprune', 'token_kinds': 'visual', **schedule}
    plan = make_plan(reduce, host) if schedule['layers'] else None
    return lm_cost.of(model.lm.clone(plan=plan), slots).macs

  def removed(share: float) -> Counts:
    gone = [model.prune(each, own, share)[1] for each, own in zip(samples, whole, strict=True)]
    return tuple(np.concatenate(gone, axis=1).mean(axis=1).astype(int).tolist())

  least = flops_ratio * cost((0,) * model.lm.depth)
  return _schedule(fit_within(removed, cost, most=least), most)


def _schedule(removed: Counts, tokens: int) -> dict[str, tuple[int, ...]]:
  """The layers that let tokens leave, and how many are left of so many."""
  layers = tuple(layer for layer, count in enumerate(removed) if count)
  return {'layers': layers, 'keep': tuple(tokens - sum(removed[:layer + 1]) for layer in layers)}


def withdrawal_layer(model: LayerByLayer, samples: Sequence[TokenSet], *, divergence: float,
                     first: int = 1) -> tuple[int, np.ndarray]:
  """Finds the first layer before which all visual tokens may leave, as VTW does.

  Visual Tokens Withdrawal (Lin et al., 2024), arXiv:2405.05803, as released.

  Args:
    model: to be asked.
    samples: prompts with images, each of B rows.
    divergence: the most that the next token's distribution may differ by, on average.
    first: the first layer that is tried, 5 in the release.

  Returns:
    The layer, and what each of the L layers gives, float[L].

  Raises:
    ValueError: no samples, or no such layer.
  """
  if not samples:
    raise ValueError('there is no sample to measure on: give one prompt with an image at least')
  mean = np.concatenate([model.withdraw(each) for each in samples], axis=1).mean(axis=1)
  good = [layer for layer in range(first, len(mean)) if mean[layer] <= divergence]
  if not good:
    raise ValueError(f'no layer from {first} on keeps the divergence within {divergence}: the '
                     f'least is {mean[first:].min():.3g}, so allow more')
  return good[0], mean
