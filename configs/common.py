"""Pieces that configs share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

BUDGETS = ('remove', 'keep_ratio', 'keep', 'flops_ratio', 'gmacs')
UNSET = ('args', 'site', 'watch', 'rounding', 'ratio_of', 'mode', *BUDGETS)

# Tensor parallelism of a ViT by its last dimensions; fsdp slices what is left
# (lib/runtime/sharding.py).
VIT_SHARDING = (
    # First: a learned reduction may name its layers as the blocks do.
    (r'(^|/)reducer_\d+/', ()),
    (r'qkv/kernel$', ('tensor', None)),
    (r'qkv/bias$', ('tensor', None)),
    (r'/out/kernel$', ('tensor', None, None)),
    (r'fc1/kernel$', (None, 'tensor')),
    (r'fc1/bias$', ('tensor',)),
    (r'fc2/kernel$', ('tensor', None)),
    (r'(norm\d?|norm|norm_pre)/(scale|bias)$', ()),
    (r'(out|fc2|patch|head|head_dist|projection)/bias$', ()),
    (r'(patch|head|head_dist|projection)/kernel$', ()),
    (r'(^|/)(cls|dist|pos|registers|probe|table|ls1|ls2|logit_scale|logit_bias)$', ()),
)
# Language models: heads and MLP columns over 'tensor', and so the vocabulary.
LM_SHARDING = (
    (r'(^|/)reducer_\d+/', ()),
    (r'/[qkv]/kernel$', ('tensor', None)),
    (r'/[qkv]/bias$', ('tensor', None)),
    (r'/out/kernel$', ('tensor', None, None)),
    (r'/(gate|up)/kernel$', (None, 'tensor')),
    (r'/down/kernel$', ('tensor', None)),
    (r'(^|/)table$', ('tensor', None)),
    (r'(^|/)head/kernel$', (None, 'tensor')),
    (r'(norm\d?|[qk]_norm)/scale$', ()),
)
# Both together, with what joins them. The language model's come first: what is named alike in both,
# head and table, is large there.
VLM_SHARDING = (*LM_SHARDING, *VIT_SHARDING, (r'(^|/)(newline|probe/(kernel|bias))$', ()))
# Where `config.model` may start from (models/build.py, `pretrained`); empty for none.
PRETRAINED = {'weights': '', 'weights_image_size': 0, 'fresh': (), 'unused': ()}


def reduction(method: str = 'none', **given: Any) -> ConfigDict:
  """`config.reduce.<tower>`: every key exists, so that each can be set from the command line."""
  unset = {name: config_dict.placeholder(object) for name in UNSET}
  layers = config_dict.placeholder(object)
  layers.set(given.pop('layers', 'all'))
  config = ConfigDict({'method': method, 'layers': layers, **unset})
  for name, value in given.items():
    config[name] = value
  return config

# How evaluation images are made, of each family's release.
DEIT_PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'test_crop': 0.875}
AUGREG_PIXELS = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'test_crop': 0.9}


def reproduction(variant: str, reduce: Mapping[str, Any] | None = None, *, weights: str,
                 made_by: str, expected: Mapping[str, Any], pixels: Mapping[str, Any] = DEIT_PIXELS,
                 **model: Any) -> ConfigDict:
  """A published row on ImageNet-1k: what to run, what it needs, and what was printed.

  Args:
    variant: of models/backbones/vit.py.
    reduce: keywords of `reduction`; None for the unreduced model.
    weights: name of the safetensors file that it needs, in data/weights.
    made_by: whose weights these are, and how to come by that file.
    expected: what was printed (tools/reproduce.py lists the keys).
    pixels: how evaluation images are made.
    **model: other keys of `config.model`.
  """
  config = ConfigDict()
  config.seed = 0
  config.data = dict(
      name='imagenet2012', data_dir='', image_size=model.get('image_size', 224), channels=3,
      batch_size=64, train_split='train', test_split='validation', filter='bicubic', **pixels)
  config.model = dict(PRETRAINED, variant=variant, dtype='float32',
                      weights=f'data/weights/{weights}', **model)
  config.reduce = dict(vision=reduction(**(reduce or {})))
  config.mesh = dict(data=-1)
  config.sharding = VIT_SHARDING
  config.expected = dict(expected)
  config.needs = dict(weights=weights, made_by=made_by, data='imagenet2012')
  return config
