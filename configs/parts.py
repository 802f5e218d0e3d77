"""Pieces that configs share. Each declares every key that its reader knows, so that each can be set
from the command line; None where nothing is set."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict, config_dict

from models import renames
from models.build import IMAGE_MODEL, PRETRAINED
from models.plan import KEYS

# Tensor parallelism of a ViT by its last dimensions; fsdp slices what is left
# (lib/runtime/sharding.py).
VIT_SHARDING = (
    # First: a learned reduction may name its layers as the blocks do.
    (r'(^|/)reducer_\w+/', ()),
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
    (r'(^|/)reducer_\w+/', ()),
    (r'/[qkv]/kernel$', ('tensor', None)),
    (r'/[qkv]/bias$', ('tensor', None)),
    (r'/out/kernel$', ('tensor', None, None)),
    (r'/(gate|up)/kernel$', (None, 'tensor')),
    (r'/down/kernel$', ('tensor', None)),
    (r'(^|/)table$', ('tensor', None)),
    (r'(^|/)head/kernel$', (None, 'tensor')),
    (r'(norm\d?|[qk]_norm)/scale$', ()),
)
# Both together, with what joins them. A compressor is small, and whole on each device of 'tensor';
# then the language model's come first: what is named alike in both, head and table, is large there.
VLM_SHARDING = ((r'(^|/)compressor/', ()), *LM_SHARDING, *VIT_SHARDING,
                (r'(^|/)(newline|probe/(kernel|bias))$', ()), (r'(^|/)reader/', ()))
# What may be said of how any set is read, of images or of questions and answers.
READING = {'threads': 2, 'prefetch_batches': 4}
IMAGES = {'augment': {}, 'data_dir': '', 'test_crop': 1.0, 'filter': 'bilinear',
          'on_corrupt': 'raise', **READING}
QUESTIONS = {'pad_side': 'right', 'turns': 1, 'kinds': (), 'data_dir': '', **READING}
# Keys whose values differ in type: a number or a pair, a name or a tuple.
LOOSE = ('image_size', 'weights_image_size', 'layers', 'token_kinds')


def reduction(method: str = 'none', **settings: Any) -> ConfigDict:
  """`config.reduce.<place>`: a method, its budget, and keys of models/plans/."""
  settings = renames.current('reduce', {'layers': 'all', **settings})
  return _declared(KEYS.kinds, {'method': method, **settings})


def reductions() -> ConfigDict:
  """`config.reduce` of a command; a method '' leaves a place to the config or the run."""
  unset = config_dict.placeholder
  return ConfigDict({
      'vision': reduction(''),
      'projector': reduction('', across=unset(str), order=unset(str)),
      'language': reduction(''),
      'cache': reduction('')})


def image_model(variant: str, **settings: Any) -> ConfigDict:
  """`config.model` of a vision transformer: fields of ViT, and where parameters come from."""
  return _declared(IMAGE_MODEL.kinds, {**PRETRAINED, 'variant': variant, **settings})


def data(**settings: Any) -> ConfigDict:
  """`config.data` of images (lib/data/images.py)."""
  return _declared((), {**IMAGES, **settings})


def compressor(name: str = 'none', **args: Any) -> ConfigDict:
  """`config.model.compressor`: what projects visual tokens and leaves fewer, and its fields.

  One whose parameters serve several counts of tokens trains under each of `turns`, fields that
  differ: one a step, drawn anew, or with train='all' every one in every step.
  """
  return ConfigDict({'name': name, 'args': args, 'turns': (), 'train': 'draw'})


def questions(**settings: Any) -> ConfigDict:
  """`config.data` of questions and answers (lib/data/qa.py)."""
  return _declared((), {**QUESTIONS, **settings})


def mesh(**sizes: int) -> dict[str, int]:
  """`config.mesh`: all devices along 'data', unless sizes say otherwise."""
  return {'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | sizes


def _declared(names: Iterable[str], settings: dict[str, Any]) -> ConfigDict:
  """A config with these settings, and None for the other names."""
  config = ConfigDict({name: config_dict.placeholder(object) for name in names
                       if name not in settings})
  for name, value in settings.items():
    if name in LOOSE:
      config[name] = config_dict.placeholder(object)
    config[name] = value
  return config
