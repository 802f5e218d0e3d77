"""Every method at three budgets on the digits model: accuracy, tokens, cost, latency, pictures.

  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits

Budgets are shares of the unreduced model's MACs, so that methods are compared at equal cost.
Methods with parameters of their own are run untrained, and say so.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """The digits config with a sweep beside it."""
  config = digits.get_config()
  config.data.batch_size = 120
  config.sweep = dict(
      title='Digits, ViT of depth 6: cuts in layers 1 and 3, no training',
      methods=(),  # All there are.
      form='flops_ratio', budgets=(0.85, 0.7, 0.55), layers=(1, 3), overrides=dict(),
      rounds=10, baselines=('random', 'stride', 'pool'),
      pictured=('topk', 'evit', 'tome', 'pitome', 'ats'), pictured_images=4,
  )
  return config
