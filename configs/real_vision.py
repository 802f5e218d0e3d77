"""Every reduction of a vision tower on real weights: a ViT-S/14, clothes, emoji and photographs.

  python -m tools.real.fetch
  python -m tools.real.vit --onnx=real/vit/vit_s_focus.onnx
  python -m tools.real.study --config=configs/real_vision.py
  python -m tools.real.study --config=configs/real_vision.py:quick
"""

import ml_collections

from models.backbones.vit import ViT
from models.plan import methods
from ops import choices
from ops.reducers.language import LANGUAGE

HOST = ViT(width=384, depth=12, mlp=1536, heads=6, patch=14, image_size=224, num_classes=0).host
# What only training makes useful is left out, and what is for language models alone.
METHODS = ['random', *(name for name, made in methods(HOST).items()
           if not hasattr(made, 'init') and name not in ('none', 'random', 'ppe', *LANGUAGE))]
A_LAYER, CUTS, LATE = '16 a layer', 'half at 3, 6, 9', 'a quarter at 8'
BUDGETS = {A_LAYER: {'layers': 'all', 'remove': 16},
           CUTS: {'layers': (3, 6, 9), 'keep_ratio': 0.5},
           LATE: {'layers': 8, 'keep_ratio': 0.25}}
# Cosines at which 48 pictures of all three kinds lose 16 tokens a layer on average
# (`tools.fit.fits.merge_thresholds` finds such); four of them go in any case.
THRESHOLDS = (0.999, 0.9961, 0.9788, 0.9964, 0.9367, 0.9398, 0.9579, 0.9385, 0.9443, 0.9574,
              0.9387, 0.9837)
OWN = {
    ('dymu', A_LAYER): {'layers': 'all', 'remove': 4, 'args': {'threshold': THRESHOLDS}},
    # It reads the layer before.
    ('kmedoids', A_LAYER): {'layers': tuple(range(1, 12)), 'remove': 17},
    # Clusters once, and all tokens are back before the last layer.
    ('expedit', A_LAYER): {'layers': 4, 'keep': 64, 'expand': 11},
    ('expedit', CUTS): {'layers': 3, 'keep': 64, 'expand': 11},
    ('expedit', LATE): {'layers': 8, 'keep_ratio': 0.25, 'expand': 11}}
SIZES = ('full', 'quick')
DRAWS = {'full': 3, 'quick': 1}  # Of chance.
# What ranks by the attention of [CLS], is measured late in the tower too, beside some others.
BY_CLS = ('topk', 'evit', 'ats', 'ats_spatial', 'fastervlm', 'token_transforming', 'radial')
OTHERS = ('random', 'tome', 'atc', 'divprune', 'stride', 'pool', 'expedit')
QUICK = ('random', 'tome', 'topk')


def rows(budget, names, draws):
  """A row for each method under one budget; several for chance."""
  for name in names:
    for draw in range(draws if name == 'random' else 1):
      reduce = {'method': name, **OWN.get((name, budget), BUDGETS[budget])}
      if name == 'random':
        reduce['args'] = {'seed': draw}
      yield {'name': name, 'budget': budget, 'draw': draw, 'reduce': reduce}


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """Returns what to measure, and on how many pictures: 'full', or 'quick' for a first look."""
  full = {'name': 'full', 'budget': '', 'draw': 0, 'reduce': {}}
  choices.check('size ', size, SIZES)
  small = size == 'quick'
  chosen = {A_LAYER: QUICK} if small else {
      A_LAYER: METHODS, CUTS: METHODS,
      LATE: [name for name in METHODS if name in BY_CLS or name in OTHERS]}
  return ml_collections.ConfigDict({
      'study': 'vision', 'folder': 'real', 'seed': 0, 'image_size': 224,
      'rounds': 1 if small else 3, 'out': f'runs/real/{size}/vision.jsonl',
      'train_images': 32 if small else 208, 'test_images': 32 if small else 304,
      'emoji': 24 if small else 120,
      'rows': (full, *(row for budget, names in chosen.items()
                       for row in rows(budget, names, DRAWS[size])))}, convert_dict=False)
