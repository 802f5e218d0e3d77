"""MCTF-Fast on a DeiT-S/16 fine-tuned with it, 65 % kept in layers 3, 6 and 9.

  python -m tools.reproduce --config=configs/reproduce/mctf_fast_deit_s16_k65.py

Cost: not measured here; 50,000 images.
Published: 80.1 % at 2.76 GMACs. MCTF, README (arXiv:2403.10030).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='mctf', keep_ratio=0.65, layers=(3, 6, 9)),
      weights='deit_s16_mctf_fast.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=80.1, gmacs=2.76, convention='fvcore',
                    source='MCTF, README (arXiv:2403.10030)'))
