"""A language model of ours that does what tools/peers/theirs/kvpress_lm.py does of theirs.

Axes: B batch, K kv heads, N tokens of a prompt.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import checkpoints
from models.backbones.lm import LM
from models.decoding.kvzip import KVzip
from models.plan import make_cache_plan
from models.storage import to_storage
from ops.kv_cache import Cache, LayerCache
from tools.peers.theirs.serving import peak_megabytes

Array = jax.Array
Reduce = Mapping[str, Any]


class Reader:
  """Holds a model, and the cache of the prompt that it read last.

  Attributes:
    lm: without reductions.
    room: the most tokens that are read or picked behind a prompt.
    requests: ids that KVzip asks with, by the names of its fields.
  """

  def __init__(self, lm: LM, params: Any, *, room: int,
               requests: Mapping[str, Sequence[int]] | None = None) -> None:
    """Takes a model and its parameters, blocks stacked."""
    self.lm, self.room, self._stacked = lm, room, params
    self.requests = {name: tuple(ids) for name, ids in (requests or {}).items()}
    self._params = {'params': jax.device_put(to_storage(params, 'unstacked'))}
    self._extend = jax.jit(functools.partial(lm.apply, logits='all', method='extend'))
    self._programs = functools.cache(self._program)
    self._step = jax.jit(self._next, donate_argnums=2)

  def save(self, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes the weights in the layout of the transformers library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    checkpoints.save(self.lm, self._stacked, folder / 'model.safetensors',
                     layout='transformers/lm')

  def read(self, reduce: Reduce, ids: Sequence[int]) -> list[list[list[int]]]:
    """Reads a prompt, and returns the entries that each head of each layer keeps."""
    _, self._logits, self._cache = self._read(reduce, ids)
    return [held(layer, self.lm.kv_heads) for layer in self._cache.layers]

  def follow(self, given: Sequence[int], count: int) -> tuple[list[float], list[int]]:
    """Reads given tokens behind the prompt, then picks the likeliest ones.

    Returns:
      Logarithms of the given tokens' likelihoods, and the tokens picked.
    """
    after, cache = self._extend(self._params, jnp.asarray([given], jnp.int32), self._cache)
    before = jax.nn.log_softmax(jnp.concatenate([self._logits[:, None], after[:, :-1]], axis=1))
    picked, token = [], jnp.argmax(after[:, -1], axis=1).astype(jnp.int32)
    for _ in range(count):
      picked.append(int(token[0]))
      token, cache = self._step(self._params, token, cache)
    return np.asarray(before)[0, np.arange(len(given)), list(given)].tolist(), picked

  def time(self, reduce: Reduce, ids: Sequence[int], count: int) -> tuple[float, float]:
    """Returns seconds to the first token, and seconds a token for those after it."""
    start = time.perf_counter()
    token, _, cache = self._read(reduce, ids)
    np.asarray(token)
    first = time.perf_counter()
    for _ in range(count):
      following, cache = self._step(self._params, token, cache)
      # The next one is under way while this one is read, as models/decoding/generator.py has it.
      np.asarray(token)
      token = following
    np.asarray(token)
    return first - start, (time.perf_counter() - first) / count

  def memory(self, reduce: Reduce, ids: Sequence[int], count: int) -> dict[str, float]:
    """Returns megabytes: resident before, the peak meanwhile, and those of the cache read last."""
    before, peak = peak_megabytes(lambda: self.time(reduce, ids, count))
    return {'before': before, 'peak': peak,
            'cache': sum(x.nbytes for x in jax.tree.leaves(self._cache.layers)) / 2 ** 20}

  def _read(self, reduce: Reduce, ids: Sequence[int]) -> tuple[Array, Array, Cache]:
    run = self._programs(json.dumps(reduce, sort_keys=True), len(ids))
    found: tuple[Array, Array, Cache] = run(self._params, jnp.asarray([ids], jnp.int32))
    return found

  def _program(self, reduce: str, slots: int) -> Callable[..., Any]:
    config = json.loads(reduce)
    if config.get('method') == 'kvzip':
      kvzip = KVzip(config['keep_ratio'], **self.requests, **config.get('args', {}))

      def zipped(params: Any, ids: Array) -> tuple[Array, Array, Any]:
        logits, cache = kvzip(self.lm, params, np.asarray(ids), room=self.room)
        return jnp.argmax(logits, axis=1).astype(jnp.int32), logits, cache

      return zipped
    lm = self.lm.clone(cache_plan=make_cache_plan(config, self.lm.host(slots)) if config else None)

    def run(params: Any, ids: Array) -> tuple[Array, Array, Any]:
      logits, cache = lm.apply(params, ids, room=self.room, method='prefill')
      return jnp.argmax(logits, axis=1).astype(jnp.int32), logits, cache

    return jax.jit(run)

  def _next(self, params: Any, token: Array, cache: Cache) -> tuple[Array, Any]:
    logits, cache = self.lm.apply(params, token, cache, method='decode')
    return jnp.argmax(logits, axis=1).astype(jnp.int32), cache


def held(kv: LayerCache, heads: int) -> list[list[int]]:
  """Returns the positions of a layer's cache that each head holds, of the first row."""
  if hasattr(kv, 'prompt'):  # In pages, each of one head.
    of, pos, valid = (np.asarray(x[0]) for x in (kv.prompt.head, kv.prompt.pos, kv.prompt.valid))
    return [sorted(pos[of == head][valid[of == head]].tolist()) for head in range(heads)]
  pos, valid = (np.broadcast_to(np.asarray(x[0])[..., :kv.filled], (heads, kv.filled))
                for x in (kv.pos, kv.valid))
  return [sorted(p[v].tolist()) for p, v in zip(pos, valid, strict=True)]
