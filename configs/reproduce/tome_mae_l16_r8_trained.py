"""ToMe on an MAE ViT-L/16 fine-tuned with it, 8 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_mae_l16_r8_trained.py

Cost: not measured here; 50,000 images.
Published: 85.09 % of 85.66 %, 93 to 183 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'mae_l16_tuned', dict(method='tome', remove=8), weights='mae_l16_tome_r8.safetensors',
      made_by='MAE (arXiv:2111.06377) fine-tuned with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=85.09, unreduced_top1=85.66, images_per_second=(93, 183),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
