"""ToMe on an MAE ViT-B/16 fine-tuned with it, 16 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_mae_b16_r16_trained.py

Cost: not measured here; 50,000 images.
Published: 81.91 % of 83.62 %, 309 to 603 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'mae_b16_tuned', dict(method='tome', remove=16), weights='mae_b16_tome_r16.safetensors',
      made_by='MAE (arXiv:2111.06377) fine-tuned with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=81.91, unreduced_top1=83.62, images_per_second=(309, 603),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
