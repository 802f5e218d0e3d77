"""ToMe on ViT-B/16 (AugReg) as it is, 13 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_vit_b16_r13.py

Cost: not measured here; 50,000 images.
Published: 82.6 % of 84.57 %, 309 to 511 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import AUGREG_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'B/16', dict(method='tome', remove=13), weights='vit_b16_augreg_224.safetensors',
      pixels=AUGREG_PIXELS,
      made_by='timm/vit_base_patch16_224.augreg_in21k_ft_in1k on the hub: its model.safetensors',
      expected=dict(top1=82.6, unreduced_top1=84.57, images_per_second=(309, 511),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
