"""ToMe on a fine-tuned MAE ViT-L/16 as it is, 8 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_mae_l16_r8.py

Cost: not measured here; 50,000 images.
Published: 84.22 % of 85.96 %, 93 to 183 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'mae_l16_tuned', dict(method='tome', remove=8, args=dict(proportional=False)),
      weights='mae_l16_tuned.safetensors',
      made_by='MAE (arXiv:2111.06377), ViT-L fine-tuned, is released as a pickle: convert it to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=84.22, unreduced_top1=85.96, images_per_second=(93, 183),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
