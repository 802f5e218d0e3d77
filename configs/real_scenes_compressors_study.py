"""The four learned compressors that cost least, between a pretrained tower and language model.

  python -m tools.compressors --config=configs/real_scenes_compressors_study.py \\
      --workdir=runs/real_compressors

What `make real` fetches must be there. Of configs/real_scenes.py's two trainings it is the first,
which draws visual tokens to the words of what they show: no layer of the language model runs in it.
A picture of 112 pixels has 64 patches. Entries are as in configs/digit_scenes_compressors_study.py.
"""

import ml_collections

from configs import digit_scenes_compressors_study as digits
from configs import real_scenes
from configs.parts import compressor

LEVELS = (2, 5, 8, 11)  # Of the tower's twelve layers.


def get_config() -> ml_collections.ConfigDict:
  """A training, what is compared, and on what."""
  training = real_scenes.get_config()
  training.update(total_steps=200, log_steps=50, eval_steps=200, checkpoint_steps=100)
  training.task.name = 'align'
  training.data.update(name='emoji_scenes/small', turns=1, context=21, batch_size=16,
                       test_split='test')
  with training.unlocked():
    training.model = {**training.model.to_dict(), 'side': 1, 'dtype': 'float32',
                      'compressor': compressor()}
  return ml_collections.ConfigDict({
      'title': 'Learned compressors between pretrained parts', 'source': '', 'training': training,
      'seeds': (0,), 'recipes': {'joint': {'frozen': ('tower', 'lm'), 'peak_lr': 2e-3}},
      'test_split': 'test', 'batch': 11, 'out': 'results/real_compressors.jsonl',
      'entries': tuple(entries()), 'baselines': ('none',)}, convert_dict=False)


def entries():
  """Returns what is compared."""
  yield {'name': 'none', 'recipe': 'joint', 'counts': {'64': {}}}
  yield digits.at_projector('pool', 'joint')
  yield digits.compressor('tokenpacker', digits.SIDES, levels=LEVELS, heads=6)
  yield digits.compressor('matryoshka', digits.SIDES, nested=True)
  yield digits.compressor('mqt', digits.QUERIES, nested=True, queries=64, heads=6)
  yield digits.compressor('tokenflex', digits.GRIDS, nested=True)
