"""Pieces that configs share."""

from typing import Any

from ml_collections import ConfigDict, config_dict

BUDGETS = ('remove', 'keep_ratio', 'keep', 'flops_ratio', 'gmacs')
UNSET = ('args', 'site', 'rounding', 'ratio_of', 'mode', *BUDGETS)

# Tensor parallelism of a ViT by its last dimensions; fsdp slices what is left (lib/sharding.py).
VIT_SHARDING = (
    # First: a learned reduction may name its layers as the blocks do.
    (r'(^|/)reducer_\d+/', ()),
    (r'qkv/kernel$', ('tensor', None)),
    (r'qkv/bias$', ('tensor', None)),
    (r'/out/kernel$', ('tensor', None, None)),
    (r'fc1/kernel$', (None, 'tensor')),
    (r'fc1/bias$', ('tensor',)),
    (r'fc2/kernel$', ('tensor', None)),
    (r'(norm\d?|norm)/(scale|bias)$', ()),
    (r'(out|fc2|patch|head|head_dist)/bias$', ()),
    (r'(patch|head|head_dist)/kernel$', ()),
    (r'(^|/)(cls|dist|pos|registers)$', ()),
)


def reduction(method: str = 'none', **given: Any) -> ConfigDict:
  """`config.reduce.<tower>`: every key exists, so that each can be set from the command line."""
  unset = {name: config_dict.placeholder(object) for name in UNSET}
  layers = config_dict.placeholder(object)
  layers.set(given.pop('layers', 'all'))
  config = ConfigDict({'method': method, 'layers': layers, **unset})
  for name, value in given.items():
    config[name] = value
  return config
