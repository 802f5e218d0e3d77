"""MCTF on a DeiT-Ti/16 fine-tuned with it, 16 tokens fewer in every layer but the first.

  python -m tools.reproduce --config=configs/reproduce/mctf_deit_ti16_r16.py

Cost: not measured here; 50,000 images.
Published: 72.7 % at 0.71 GMACs. MCTF, README (arXiv:2403.10030).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_ti16', dict(method='mctf', remove=16, layers=tuple(range(1, 12))),
      weights='deit_ti16_mctf_r16.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=72.7, gmacs=0.71, convention='fvcore',
                    source='MCTF, README (arXiv:2403.10030)',
                    mismatch='ours 0.701 GMACs: with the product that matches tokens, N²C / 4 a '
                             'cut, 0.709'))
