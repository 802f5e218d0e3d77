"""Reductions of the cache and of the prompt of the model that finds phrases in source code.

  python -m eval --config=configs/stdlib_needle_sweep.py --workdir=runs/needle
"""

import ml_collections

from configs import stdlib_needle

CANDIDATES = (
    *({'name': name, 'place': 'cache', 'method': name} for name in (
        'streaming_llm', 'knorm', 'tova', 'observed_attention', 'h2o', 'expected_attention')),
    {'name': 'snapkv', 'place': 'cache', 'method': 'snapkv', 'args': {'window': 6}},
    {'name': 'gemfilter', 'place': 'language', 'method': 'gemfilter', 'layers': (1,)},
    {'name': 'random', 'place': 'language', 'method': 'random', 'site': 'before', 'layers': (2,)},
)


def get_config() -> ml_collections.ConfigDict:
  """The config of training with a sweep beside it."""
  config = stdlib_needle.get_config()
  config.data.update(batch_size=320, test_split='test[:25%]')
  config.sweep = dict(
      title='Phrases in source code: share found, no training',
      sets=(('stdlib_needle/256', 258), ('stdlib_needle/1k', 1026)),
      candidates=CANDIDATES, budgets=(0.5, 0.25, 0.125), rounds=4, baselines=('random',))
  return config
