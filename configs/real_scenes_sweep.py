"""Reductions of the visual tokens of the model of two pretrained parts.

  python -m eval --config=configs/real_scenes_sweep.py --workdir=results/real_scenes

On 44 pictures, as configs/real_scenes_study.py, and without latencies, which would take most of the
time. The tower restores the grid of patches behind its own reductions, so they save nothing in the
language model.
"""

import ml_collections

from configs import real_scenes

CHANCE = ('random', 'stride', 'pool')
CANDIDATES = (
    *({'name': f'{name} at the projector', 'place': 'projector', 'method': name}
      for name in ('random', 'stride', 'pool')),
    {'name': 'divprune', 'place': 'projector', 'method': 'divprune'},
    *({'name': f'{name} in layer 3', 'place': 'language', 'method': name, 'token_kinds': 'visual',
       'site': 'before', 'layers': (3,)} for name in ('random', 'stride')),
    {'name': 'fastv', 'place': 'language', 'method': 'fastv', 'token_kinds': 'visual',
     'layers': (2,)},
    {'name': 'tome in the tower', 'place': 'vision', 'method': 'tome', 'layers': (3, 6, 9)},
    {'name': 'random in the tower', 'place': 'vision', 'method': 'random', 'layers': (3, 6, 9)},
    {'name': 'snapkv', 'place': 'cache', 'method': 'snapkv', 'args': {'window': 8}},
    {'name': 'streaming_llm', 'place': 'cache', 'method': 'streaming_llm'},
)


def get_config() -> ml_collections.ConfigDict:
  """The config of training with a sweep beside it."""
  config = real_scenes.get_config()
  config.model.dtype = 'float32'
  config.data.update(batch_size=11, turns=1, test_split='test[:44]')
  config.sweep = dict(
      title='Emoji of a vendor that was not trained on, 64 visual tokens',
      sets=(('emoji_scenes/one', 22), ('emoji_scenes/grid', 25)),
      candidates=CANDIDATES, budgets=(0.25,), rounds=0,
      pictured=('divprune', 'fastv', 'random in layer 3'),
      baselines=tuple(each['name'] for each in CANDIDATES
                      if each['method'] in CHANCE))
  return config
