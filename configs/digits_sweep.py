"""A dozen methods at three budgets on the digits model: accuracy, tokens, cost, latency, pictures.

  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits
  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits \\
      --config.sweep.methods='()'                       (all methods, which takes longer)

Budgets are shares of the unreduced model's MACs, so that methods are compared at equal cost.
Methods with parameters of their own are run untrained: they are in the table, which says so, and
not in the plots.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """The digits config with a sweep beside it."""
  config = digits.get_config()
  config.data.batch_size = 120
  config.sweep = dict(
      title='Digits, ViT of depth 6: cuts in layers 1 to 3, no training',
      methods=('random', 'stride', 'pool', 'topk', 'evit', 'ats', 'tome', 'pitome', 'mctf', 'atc',
               'dpcknn', 'kmedoids'),
      budget='flops_ratio', budgets=(0.75, 0.6, 0.45), layers=(1, 2, 3), overrides=dict(),
      rounds=10, baselines=('random', 'stride', 'pool'),
      pictured=('topk', 'evit', 'tome', 'pitome', 'ats'), pictured_images=4,
  )
  return config
