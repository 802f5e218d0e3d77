"""Reductions of the visual tokens of the model that answers questions about digits on photographs.

  python -m eval --config=configs/digit_scenes_sweep.py --workdir=runs/scenes
"""

import ml_collections

from configs import digit_scenes

# Methods that see the question act in the language model, from its second layer on.
CANDIDATES = (
    *({'name': name, 'place': 'projector', 'method': name}
      for name in ('random', 'stride', 'pool', 'divprune', 'fastervlm')),
    {'name': 'tome in the tower', 'place': 'vision', 'method': 'tome', 'layers': (0, 1, 2)},
    {'name': 'visionzip', 'place': 'projector', 'method': 'visionzip', 'args': {'contextual': 2}},
    {'name': 'random in layer 1', 'place': 'language', 'method': 'random', 'token_kinds': 'visual',
     'site': 'before', 'layers': (1,)},
    {'name': 'random in layer 2', 'place': 'language', 'method': 'random', 'token_kinds': 'visual',
     'site': 'before', 'layers': (2,)},
    {'name': 'fastv', 'place': 'language', 'method': 'fastv', 'token_kinds': 'visual',
     'layers': (1,)},
    {'name': 'fastv, layer 2', 'place': 'language', 'method': 'fastv', 'token_kinds': 'visual',
     'layers': (2,)},
    {'name': 'pyramiddrop', 'place': 'language', 'method': 'pyramiddrop', 'token_kinds': 'visual',
     'layers': (1, 2, 3)},
    {'name': 'snapkv', 'place': 'cache', 'method': 'snapkv', 'args': {'window': 2}},
    {'name': 'streaming_llm', 'place': 'cache', 'method': 'streaming_llm'},
)


def get_config() -> ml_collections.ConfigDict:
  """The config of training with a sweep beside it."""
  config = digit_scenes.get_config()
  config.data.batch_size = 250
  config.sweep = dict(
      title='Digits on photographs, 64 visual tokens and 12 of text, no training',
      sets=(('digit_scenes/64', 12),),
      candidates=CANDIDATES, budgets=(0.5, 0.25, 0.125), rounds=6,
      baselines=('random', 'stride', 'pool', 'random in layer 1', 'random in layer 2'))
  return config
