"""Learned compressors and training-free methods at 16, 4 and 1 visual tokens of 64, three seeds.

  python -m tools.compressors --config=configs/digit_scenes_compressors_study.py \\
      --workdir=runs/compressors

All take tower and language model from results/digit_scenes. By `recipe`: 'untrained', the reduction
acts on that model as it is; 'joint', both parts stay as they are and what joins them is trained
from nothing; 'all', everything is trained. `counts` are tokens and the settings that leave so many:
of the compressor, of the reduction, or the size of the image. What is nested trains all counts in
one run, one a step, drawn anew; LLaVolta trains in stages, the last of them uncompressed, and is
measured under what it may then be asked for. What is distilled learns from the unreduced model too.
"""

import ml_collections

from configs import digit_scenes_compressors

LEVELS = (0, 1, 2, 3)  # The four layers of the tower.
# Of a cell, in patches.
SIDES = {'16': {'side': 2}, '4': {'side': 4}, '1': {'side': 8}}
GRIDS = {'16': {'side': 4}, '4': {'side': 2}, '1': {'side': 1}}
QUERIES = {tokens: {'count': int(tokens)} for tokens in SIDES}
KEEP = {tokens: {'keep': int(tokens)} for tokens in ('16', '4', '1')}
REDUCTION = {'across': 'image', 'order': 'raster'}


def at_projector(method, recipe, versus=''):
  """Returns the entry of a training-free method behind an MLP."""
  name = f'{method}, {recipe}' if recipe != 'joint' else method
  return {'name': name, 'recipe': recipe, 'versus': versus, 'counts': KEEP,
          'reduce': {'projector': {'method': method, 'args': {}, **REDUCTION}}}


def compressor(name, counts, recipe='joint', *, nested=False, **args):
  """Returns the entry of a learned compressor."""
  shown = name if recipe == 'joint' else f'{name}, {recipe}'
  return {'name': shown, 'recipe': recipe, 'counts': counts, 'nested': nested,
          'versus': 'pool' if recipe == 'joint' else f'pool, {recipe}',
          'compressor': {'name': name, 'args': args}}


def volta(layer, ratio):
  """Returns `config.reduce` with visual tokens pooled before a layer of the language model."""
  return {'language': {'method': 'llavolta', 'token_kinds': 'visual', 'layers': (layer,),
                       'keep_ratio': ratio}}


def llavolta(steps):
  """Returns the entry of LLaVolta's four stages, its layers 2 and 16 of 32 as 1 and 2 of 4."""
  reduces = (volta(1, 1 / 8), volta(1, 1 / 2), volta(2, 1 / 2), {})
  return {'name': 'llavolta, all', 'recipe': 'all', 'versus': 'pool, all', 'nested': True,
          'counts': {tokens: {'keep_ratio': int(tokens) / 64} for tokens in SIDES},
          'reduce': {place: {key: value for key, value in settings.items() if key != 'keep_ratio'}
                     for place, settings in volta(1, 1).items()},
          'stages': tuple({'start_step': number * steps // 4, 'reduce': reduce}
                          for number, reduce in enumerate(reduces))}


def entries(steps):
  """Returns what is compared."""
  yield {'name': 'none', 'recipe': 'untrained', 'counts': {'64': {}}}
  yield {'name': 'low resolution, untrained', 'recipe': 'untrained',
         'counts': {'16': {'image_size': 32}, '4': {'image_size': 16}, '1': {'image_size': 8}}}
  for method in ('pool', 'random', 'divprune', 'fastervlm', 'tome_kth'):
    yield at_projector(method, 'untrained')
  for recipe in ('all', 'joint'):
    yield at_projector('pool', recipe)
    yield at_projector('divprune', recipe, versus='pool' if recipe == 'joint' else 'pool, all')
    yield compressor('tokenpacker', SIDES, recipe, levels=LEVELS, heads=4)
    yield compressor('quecc', SIDES, recipe, levels=LEVELS, heads=4)
    yield compressor('matryoshka', SIDES, recipe, nested=True)
    yield compressor('mqt', QUERIES, recipe, nested=True, queries=64, heads=4)
    yield compressor('tokenflex', GRIDS, recipe, nested=True)
  yield llavolta(steps)
  yield {**compressor('tokenpacker', SIDES, 'all', levels=LEVELS, heads=4),
         'name': 'tokenpacker, distilled', 'versus': 'tokenpacker, all',
         'distill': {'teacher': digit_scenes_compressors.SOURCE, 'logit_weight': 1.0}}


def get_config() -> ml_collections.ConfigDict:
  """A training, what is compared, and on what."""
  training = digit_scenes_compressors.get_config()
  training.update(total_steps=300, eval_steps=300, checkpoint_steps=100)
  training.data.test_split = 'test[:2%]'
  return ml_collections.ConfigDict({
      'title': 'Learned compressors on digits on photographs',
      'source': digit_scenes_compressors.SOURCE, 'training': training, 'seeds': (0, 1, 2),
      'recipes': {'joint': {'frozen': ('tower', 'lm'), 'peak_lr': 2e-3},
                  'all': {'frozen': (), 'peak_lr': 1e-3}},
      'test_split': 'test[:20%]', 'batch': 100, 'out': 'results/compressors.jsonl',
      'entries': tuple(entries(training.total_steps)), 'baselines': ('none',)}, convert_dict=False)
