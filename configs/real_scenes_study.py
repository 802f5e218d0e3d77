"""How often the model of two pretrained parts answers right, and what answers without it would.

  python -m tools.real.study --config=configs/real_scenes_study.py

On pictures of a vendor that training did not see: 44 of each kind (lib/studies/scenes.py), and 121
for the tower's neighbours.
"""

import ml_collections

from ops import choices

PICTURES = {'model': 44, 'other picture': 44, 'neighbours': 121, 'cls': 121}
# Each with the ids of its longest question and answer.
SETS = {'emoji_scenes/one': 22, 'emoji_scenes/grid': 25}


SIZES = ('full',)


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """A row a set and reader."""
  choices.check('size ', size, SIZES)
  rows = tuple({'set': name, 'context': context, 'reader': reader, 'split': f'test[:{count}]',
                'reduce': {}}
               for name, context in SETS.items() for reader, count in PICTURES.items()
               if (name, reader) != ('emoji_scenes/grid', 'cls'))
  return ml_collections.ConfigDict({
      'study': 'scenes', 'run': 'results/real_scenes', 'folder': 'real', 'batch': 22,
      'out': 'results/real_scenes/answers.jsonl', 'rows': rows}, convert_dict=False)
