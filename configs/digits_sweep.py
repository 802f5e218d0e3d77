"""A dozen methods at three budgets on the digits model: accuracy, NLL, cost, latency, pictures.

  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits
  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits \\
      --config.sweep.methods='()'                       (all methods, which takes longer)

Budgets are shares of the unreduced model's MACs, so that methods are compared at equal cost. They
are low, and the cuts early: later cuts to half of the cost lose next to nothing. Methods that match
pairs remove at most half in a layer and cannot meet the lowest budget.

An accuracy on 359 test images is known to about 2 %, more than most methods differ by. So each is
compared with `random` by the NLL of the same images. Single draws of `random` differ as much as
methods do: it is the mean of 32, and the intervals count what uncertainty that leaves.

Methods with parameters of their own are run untrained: they are in the table, which says so, and
not in the plots against cost.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """The digits config with a sweep beside it."""
  config = digits.get_config()
  config.data.batch_size = 120
  config.sweep = dict(
      title='Digits, ViT of depth 6: cuts in layers 0 to 3, no training',
      methods=('random', 'stride', 'pool', 'topk', 'evit', 'ats', 'tome', 'pitome', 'mctf', 'atc',
               'dpcknn', 'radial'),
      budget='flops_ratio', budgets=(0.45, 0.3, 0.2), layers=(0, 1, 2, 3), overrides=dict(),
      baseline='random', baseline_draws=32,
      rounds=10, baselines=('random', 'stride', 'pool'),
      pictured=('topk', 'evit', 'tome', 'pitome', 'ats'), pictured_images=4,
  )
  return config
