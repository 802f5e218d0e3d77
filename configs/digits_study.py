"""Every method on the digits, as it is and after a short training, over three seeds.

  python -m tools.study --config=configs/digits_study.py --workdir=runs/study

Cost: see `results/digits_study.md`, which says how long it took; a killed run goes on where it was.
Expected: the unreduced model near 98 %, and most methods near it; the cross-entropy tells them
apart where accuracy does not.

Budgets are counts of patches left of 64. They are cut in layers 1 and 2, because methods that match
pairs remove at most half at once; harder settings are layer 1 alone, and three cuts.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """The digits config with a study beside it."""
  config = digits.get_config()
  config.data.batch_size = 64
  config.study = dict(
      title='Digits, ViT of depth 6, 64 patches',
      results='results/digits_study',
      seeds=(0, 1, 2),
      eval_batch_size=120,
      methods=(),  # All there are.
      baselines=('none', 'random', 'stride', 'pool', 'resolution', 'patch_dropout'),
      overrides=dict(),  # Arguments of a method by its name.
      # All methods are evaluated under each of these, without training.
      budgets=(
          dict(budget='75 %', layers=(1, 2), keep=(55, 48)),
          dict(budget='50 %', layers=(1, 2), keep=(45, 32)),
          dict(budget='25 %', layers=(1, 2), keep=(32, 16)),
          dict(budget='25 % at once', layers=(1,), keep=(16,)),
          dict(budget='12 % in three', layers=(1, 2, 3), keep=(32, 16, 8)),
      ),
      # These make the curve of the method `reference` longer: what costs less than its own lowest
      # budget above is compared too.
      reference='random',
      lower=(
          dict(budget='12 %', layers=(1, 2), keep=(23, 8)),
          dict(budget='12 % at once', layers=(1,), keep=(8,)),
          dict(budget='3 % in three', layers=(1, 2, 3), keep=(8, 4, 2)),
      ),
      # The same ViT on smaller images: side in pixels by budget.
      resolutions=(('75 %', 28), ('50 %', 24), ('25 %', 16)),
      # All methods are trained a little from the unreduced model under this budget.
      tuned='50 %',
      tune=dict(total_steps=60, batch_size=32, peak_lr=5e-4, warmup_steps=6, ema_decay=0.9),
      # And these, in other ways. `method` and `budget` are what is evaluated; `model`, `optimizer`
      # and `anneal` override the config's in training; `train_method` is reduced by in training
      # where that differs; `teacher` holds it to the unreduced model.
      recipes=(
          dict(name='random', method='random', budget='25 %'),
          dict(name='random', method='random', budget='3 % in three'),
          *(dict(name=name, method=name, budget='12 % in three')
            for name in ('random', 'pool', 'topk', 'tome', 'atc', 'dynamicvit')),
          dict(name='patch_dropout', method='none', budget='100 %', train_method='none',
               model=dict(training_patches=32)),
          dict(name='patch_dropout, then random', method='random', budget='50 %',
               train_method='none', model=dict(training_patches=32)),
          dict(name='evit, annealed', method='evit', budget='50 %',
               anneal=dict(start_step=6, stop_step=42, phases=2)),
          dict(name='mctf, consistent', method='mctf', budget='50 %',
               optimizer=dict(consistency=dict(levels=2, weight=3.0))),
          dict(name='dynamicvit, distilled', method='dynamicvit', budget='50 %', teacher=True),
          dict(name='tome, distilled', method='tome', budget='50 %', teacher=True),
      ),
  )
  return config
