"""Every reduction of a vision tower on real weights: a ViT-S/14, clothes and emoji.

  python -m tools.real.fetch
  python -m tools.real.vit --onnx=real/vit/vit_s_focus.onnx
  python -m tools.real.study --config=configs/real_vision.py
"""

import ml_collections

from models.backbones.vit import ViT
from models.plan import methods

BUDGETS = {'16 a layer': {'layers': 'all', 'remove': 16},
           'half at 3, 6, 9': {'layers': (3, 6, 9), 'keep_ratio': 0.5}}
# What only training makes useful is left out.
HOST = ViT(width=384, depth=12, mlp=1536, heads=6, patch=14, image_size=224, num_classes=0).host
METHODS = {name: {'method': name} for name, made in methods(HOST).items()
           if not hasattr(made, 'init') and name != 'none'}


def rows(budget):
  """A row for each method under one budget."""
  return [{'name': name, 'budget': budget, 'reduce': {**method, **BUDGETS[budget]}}
          for name, method in METHODS.items()]


def get_config() -> ml_collections.ConfigDict:
  """Returns what to measure, and on how many pictures."""
  full = {'name': 'full', 'budget': '', 'reduce': {}}
  return ml_collections.ConfigDict({
      'study': 'vision', 'folder': 'real', 'out': 'results/real_vision.jsonl', 'seed': 0,
      'image_size': 224, 'batch': 16, 'train_images': 400, 'test_images': 300, 'emoji': 160,
      'rows': (full, *(row for budget in BUDGETS for row in rows(budget)))}, convert_dict=False)
