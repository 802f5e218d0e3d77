"""MCTF on a DeiT-S/16 fine-tuned with it, 16 tokens fewer in every layer but the first.

  python -m tools.reproduce --config=configs/reproduce/mctf_deit_s16_r16.py

Cost: not measured here; 50,000 images.
Published: 80.1 % at 2.6 GMACs. MCTF, README (arXiv:2403.10030).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='mctf', remove=16, layers=tuple(range(1, 12))),
      weights='deit_s16_mctf_r16.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=80.1, gmacs=2.6, convention='fvcore',
                    source='MCTF, README (arXiv:2403.10030)'))
