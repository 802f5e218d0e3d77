"""Reductions of the visual tokens of the model of two pretrained parts, a quarter of them left.

  python -m eval --config=configs/real_scenes_sweep.py --workdir=results/real_scenes

Everything that acts behind the tower, or inside the language model behind its third layer, on 44
pictures, as configs/real_scenes_study.py, and without latencies, which would take most of the time.
The tower restores the grid of patches behind its own reductions, so they save nothing in the
language model.
"""

import ml_collections

from configs import real_scenes
from configs.digit_scenes_sweep import BLIND, at_projector, in_language
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from ops.rope import Rope

BEFORE, BEHIND = (3,), (2,)
CONTEXT, VISUAL = 22, 64
BUDGETS = (0.25,)
IN_TOWER = tuple(
    {'name': f'{name} in the tower', 'place': 'vision', 'method': name, 'layers': (3, 6, 9)}
    for name in ('tome', 'random'))
ON_CACHE = ({'name': 'snapkv', 'place': 'cache', 'method': 'snapkv', 'args': {'window': 8}},
            {'name': 'streaming_llm', 'place': 'cache', 'method': 'streaming_llm'})


def candidates():
  """Returns every candidate, those of one place together."""
  # The pretrained parts in small: what they offer to methods.
  tower = ViT(width=16, depth=12, mlp=16, heads=1, patch=14, image_size=224, num_classes=0)
  lm = LM(width=16, depth=30, mlp=16, heads=2, kv_heads=1, head_width=8, vocabulary=8, context=128,
          rope=Rope(8))
  vlm = VLM(tower, lm, 2, 'gelu', side=2)
  every = (*at_projector(vlm.projector_host(VISUAL)),
           *in_language(lm.host(CONTEXT + VISUAL, visual=VISUAL), BEFORE, BEHIND),
           *IN_TOWER, *ON_CACHE)
  return tuple(each if each.get('budgets') == () else {**each, 'budgets': BUDGETS}
               for each in every)


def get_config() -> ml_collections.ConfigDict:
  """The config of training with a sweep beside it."""
  config = real_scenes.get_config()
  config.model.dtype = 'float32'
  # Of 88 ids, the context of training; of the sets' shorter ones a batch has 44 and 38 questions.
  config.data.update(batch_size=11, turns=1, test_split='test[:44]')
  chosen = candidates()
  config.sweep = dict(
      title='Emoji of a vendor that was not trained on, 64 visual tokens',
      sets=(('emoji_scenes/one', CONTEXT), ('emoji_scenes/grid', 25)),
      candidates=chosen, budgets=BUDGETS, rounds=0,
      pictured=('divprune', 'fastv', 'stride in layer 3'),
      baselines=tuple(dict.fromkeys(each['name'] for each in chosen
                                    if each['name'].split()[0] in BLIND)))
  return config
