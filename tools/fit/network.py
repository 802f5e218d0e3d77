"""Trains the small network of `explained` to foresee what a whole pass finds relevant.

Axes: B batch, N slots.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lib.report.relevance import relevance
from models.backbones.lm import LM
from models.plan import make_plan
from ops.tokens import VISUAL, TokenSet

Array = jax.Array
Params = Mapping[str, Any]
REDUCER = 'reducer_00'


def foresee(lm: LM, params: Params, prompts: Sequence[TokenSet], *, reduce: Mapping[str, Any],
            steps: int, rate: float, seed: int = 0) -> tuple[Params, np.ndarray]:
  """Trains what chooses tokens in front of a language model, and nothing else of it.

  What is relevant to the likeliest next token is found by one pass through the whole model and
  back for each prompt, the first time that its batch comes; a step reads the first layer's
  attention alone. After the abstract of Lei et al. (2025), arXiv:2506.01097.

  Args:
    lm: without plans.
    params: of the model.
    prompts: in batches of one shape [B, N], each with images.
    reduce: as `config.reduce.language`: `explained` in layer 0.
    steps: of Adam, a batch each, in turns.
    rate: of learning.
    seed: of the network's first parameters.

  Returns:
    The network's parameters, and float[steps], the divergence from the relevance before each step.

  Raises:
    ValueError: no prompts, or none with an image; or as `make_plan`.
  """
  visual = [int(jnp.sum(each.real & (each.kind == VISUAL), axis=1).max()) for each in prompts]
  if not visual or not max(visual):
    raise ValueError('there is nothing to learn from: give prompts with images')
  host = lm.host(prompts[0].slots, visual=max(visual))
  planned = lm.clone(plan=make_plan(reduce, host))

  def joined(network: Params) -> dict[str, Any]:
    return {**params, 'stack': {**params['stack'], REDUCER: network}}

  def missed(network: Params, tokens: TokenSet, key: Array) -> Array:
    _, out = planned.apply({'params': joined(network)}, tokens, rngs={'dropout': key})
    return jnp.mean(out['losses']['relevance_00'])

  @jax.jit
  def first(key: Array, tokens: TokenSet) -> Params:
    # Of the whole model's only these are asked for, and no other comes into being.
    made: Params = planned.init(key, tokens)['params']['stack'][REDUCER]
    return made

  rule = optax.adam(rate)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: Any, tokens: TokenSet, key: Array) -> tuple[Any, Array]:
    network, slow = state
    value, gradient = jax.value_and_grad(missed)(network, tokens, key)
    updates, slow = rule.update(gradient, slow)
    return (optax.apply_updates(network, updates), slow), value

  key = jax.random.key(seed)
  network = first(key, prompts[0])
  state, found, told = (network, rule.init(network)), [], {}
  with tqdm(range(steps), disable=not sys.stderr.isatty(), unit='step') as bar:
    for number in bar:
      turn = number % len(prompts)
      if turn not in told:
        scores = relevance(lm, {'params': params}, prompts[turn])
        told[turn] = prompts[turn].replace(stats={'relevance': scores})
      state, value = step(state, told[turn], jax.random.fold_in(key, number))
      found.append(value)
  return state[0], np.asarray(jax.device_get(found))
