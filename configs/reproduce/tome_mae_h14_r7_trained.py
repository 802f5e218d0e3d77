"""ToMe on an MAE ViT-H/14 fine-tuned with it, 7 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_mae_h14_r7_trained.py

Cost: not measured here; 50,000 images.
Published: 86.46 % of 86.88 %, 35 to 63 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'mae_h14_tuned', dict(method='tome', remove=7), weights='mae_h14_tome_r7.safetensors',
      made_by='MAE (arXiv:2111.06377) fine-tuned with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=86.46, unreduced_top1=86.88, images_per_second=(35, 63),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
