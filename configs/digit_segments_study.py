"""Methods on the digit segmentation task, as they are and after a short training, three seeds.

  python -m tools.study --config=configs/digit_segments_study.py --workdir=runs/segments_study

Cost: see `results/digit_segments_study.md`, which says how long it took; a killed run goes on where
it was. Expected: near 70 % mIoU unreduced. Every pixel counts: only methods that merge patches by
how alike they are, pair by pair, keep that at half the patches.
"""

import ml_collections

from configs import digit_segments


def get_config() -> ml_collections.ConfigDict:
  """The segmentation config with a study beside it."""
  config = digit_segments.get_config()
  config.study = dict(
      title='Digits on a canvas, ViT of depth 5, 100 patches, a class a pixel',
      results='results/digit_segments_study',
      seeds=(0, 1, 2),
      eval_batch_size=50,
      methods=('random', 'stride', 'pool', 'topk', 'evit', 'tome', 'pitome', 'dpcknn'),
      baselines=('none', 'random', 'stride', 'pool'),
      overrides=dict(),
      budgets=(
          dict(budget='75 %', layers=(1, 2), keep=(87, 75)),
          dict(budget='50 %', layers=(1, 2), keep=(71, 50)),
          dict(budget='25 %', layers=(1, 2), keep=(50, 25)),
      ),
      reference='random',
      lower=(dict(budget='12 %', layers=(1, 2), keep=(35, 12)),),
      resolutions=(),
      tuned='50 %',
      tune=dict(total_steps=60, batch_size=32, peak_lr=1e-3, warmup_steps=6, ema_decay=0.9),
      recipes=(dict(name='random', method='random', budget='25 %'),),
  )
  return config
