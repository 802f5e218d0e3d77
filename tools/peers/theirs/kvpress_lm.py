"""kvpress on a language model of the transformers library, asked by tools/peers/kvpress.py.

Axes: L layers, K kv heads, N tokens of a prompt, M entries left, d features a head.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses import kvzip_press
from serving import peak_megabytes, serve


def snapkv(ratio: float, window: int = 32) -> kvpress.ScorerPress:
  """Makes the press that others hold."""
  return kvpress.SnapKVPress(ratio, window_size=window, kernel_size=5)


# By the share that goes.
PRESSES = {
    'full': lambda ratio: None,
    'knorm': kvpress.KnormPress,
    'streaming_llm': kvpress.StreamingLLMPress,
    'snapkv': snapkv,
    'tova': kvpress.TOVAPress,
    'expected_attention': kvpress.ExpectedAttentionPress,
    'observed_attention': kvpress.ObservedAttentionPress,
    'keydiff': kvpress.KeyDiffPress,
    'lagkv': lambda ratio: kvpress.LagKVPress(ratio, lag_size=32),
    'cur': kvpress.CURPress,
    'pyramidkv': lambda ratio: kvpress.PyramidKVPress(
        ratio, window_size=16, kernel_size=5, beta=3),
    'chunkkv_snapkv': lambda ratio: kvpress.ChunkKVPress(snapkv(ratio)),
    'criticalkv_snapkv': lambda ratio: kvpress.CriticalKVPress(snapkv(ratio)),
    'simlayerkv': lambda ratio: kvpress.SimLayerKVPress(lazy_threshold=0.9, n_recent=64),
    'chunk_knorm': lambda ratio: kvpress.ChunkPress(kvpress.KnormPress(ratio), chunk_length=64),
    'adakv_snapkv': lambda ratio: kvpress.AdaKVPress(snapkv(ratio)),
    'criticaladakv_snapkv': lambda ratio: kvpress.CriticalAdaKVPress(snapkv(ratio)),
    'adakv_expected_attention': lambda ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(ratio)),
    'compactor': kvpress.CompactorPress,
    'leverage': kvpress.LeverageScorePress,
    'non_causal_attention': kvpress.NonCausalAttnPress,
    'kvzip': kvpress.KVzipPress,
    'kvzip_plus': lambda ratio: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
}


class Texts:
  """Stands for a tokenizer without a template, of the few texts that KVzip asks with."""

  chat_template = None

  def __init__(self, texts: dict[str, list[int]]) -> None:
    self.texts = texts

  def from_pretrained(self, folder: str) -> Texts:
    """Returns itself."""
    del folder
    return self

  def encode(self, text: str, **settings: Any) -> torch.Tensor:
    """Returns the ids of a text, int64[1, n]."""
    del settings
    return torch.tensor([self.texts[text]], dtype=torch.int64)


class Model:
  """Holds a model, and the cache of the prompt that it read last."""

  def __init__(self) -> None:
    self.lm: Any = None
    self.kv: list[tuple[torch.Tensor, torch.Tensor]] = []
    self.whole_of: list[int] = []

  def load(self, folder: str, threads: int, texts: dict[str, list[int]]) -> None:
    """Loads weights in float32; texts have ids."""
    torch.set_num_threads(threads)
    kvzip_press.AutoTokenizer = Texts(texts)
    self.lm = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='sdpa').eval()

  def read(self, press: str, share: float, ids: list[int]) -> list[list[list[int]]]:
    """Reads a prompt, and returns the entries that each head of each layer keeps."""
    if self.whole_of != ids:
      self.whole, self.whole_of = self._cache(self._read('full', 1.0, ids)), ids
    self.kv = self._cache(self._read(press, share, ids))
    self.logits, self.length = self.last, len(ids)
    kept = []
    for all_of_it, part, gone in zip(self.whole, self.kv, self._gone(), strict=True):
      masked = [set(gone[2][gone[1] == head].tolist()) if gone else set()
                for head in range(part[0].shape[1])]
      # The same numbers as in the whole cache, so that the nearest is at no distance.
      found = torch.cdist(part[0][0], all_of_it[0][0]).argmin(dim=2).tolist()
      kept.append([sorted(set(head) - out) for head, out in zip(found, masked, strict=True)])
    return kept

  def follow(self, given: list[int], count: int) -> tuple[list[float], list[int]]:
    """Reads given tokens behind the prompt, then picks the likeliest ones.

    Returns:
      Logarithms of the given tokens' likelihoods, and the tokens picked.
    """
    cache = transformers.DynamicCache()
    for number, (keys, values) in enumerate(self.kv):
      cache.update(keys, values, number)
    # A chunk's mask is made for layers that hold equal numbers, and of whole heads.
    alike = len({keys.shape[2] for keys, _ in self.kv}) == 1 and not any(self._gone())
    size = len(given) if alike else 1
    after = torch.cat([self._step(given[at:at + size], self.length + at, cache)
                       for at in range(0, len(given), size)])
    before = torch.log_softmax(torch.cat([self.logits[None], after[:-1]]), dim=1)
    picked, logits = [], after[-1]
    for number in range(len(given), len(given) + count):
      picked.append(int(logits.argmax()))
      logits = self._step(picked[-1:], self.length + number, cache)[-1]
    return before[range(len(given)), given].tolist(), picked

  def time(self, press: str, share: float, ids: list[int], count: int) -> tuple[float, float]:
    """Returns seconds to the first token, and seconds a token for those after it."""
    start = time.perf_counter()
    cache = self._read(press, share, ids)
    token = int(self.last.argmax())
    first = time.perf_counter()
    for number in range(count):
      token = int(self._step([token], len(ids) + number, cache).argmax())
    return first - start, (time.perf_counter() - first) / count

  def memory(self, press: str, share: float, ids: list[int], count: int) -> dict[str, float]:
    """Returns megabytes: resident before, the peak meanwhile, and those of the cache read last."""
    before, peak = peak_megabytes(lambda: self.time(press, share, ids, count))
    return {'before': before, 'peak': peak,
            'cache': sum(x.nbytes for layer in self.kv for x in layer) / 2 ** 20}

  @torch.no_grad()
  def _read(self, name: str, share: float, ids: list[int]) -> transformers.DynamicCache:
    press, cache = PRESSES[name](1 - share), transformers.DynamicCache()
    # Only this one looks at whole maps of attention.
    self.lm.set_attn_implementation('eager' if name == 'observed_attention' else 'sdpa')
    for layer in self.lm.model.layers:
      layer.self_attn.masked_key_indices = None
    with press(self.lm) if press else contextlib.nullcontext():
      out = self.lm(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    self.last = out.logits[0, -1]
    return cache

  @torch.no_grad()
  def _step(self, tokens: list[int], position: int,
            cache: transformers.DynamicCache) -> torch.Tensor:
    """Logits float[n, V] after each of n tokens."""
    positions = torch.arange(position, position + len(tokens))
    return self.lm(torch.tensor([tokens]), past_key_values=cache,
                   position_ids=positions[None]).logits[0]

  def _gone(self) -> list[Any]:
    """Returns what a press hides in each layer: indices of rows, heads and entries, or None."""
    return [getattr(layer.self_attn, 'masked_key_indices', None) for layer in self.lm.model.layers]

  def _cache(self, cache: transformers.DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


if __name__ == '__main__':
  model = Model()
  serve({'kvpress': importlib.metadata.version('kvpress'),
         'transformers': transformers.__version__, 'torch': torch.__version__},
        {name: getattr(model, name) for name in ('load', 'read', 'follow', 'time', 'memory')})
