"""Every training-free reduction of the model that answers questions about digits on photographs.

  python -m eval --config=configs/digit_scenes_sweep.py --workdir=results/digit_scenes

At four budgets and at equal MACs, in the tower, behind it, in the language model and on its cache.
Rows are measured once, so that a sweep that was ended goes on. The model was trained once: random
choice has three draws, all intervals are over batches of questions, 16 or 17 images each.
"""

import ml_collections

from configs import digit_scenes
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.plan import branch_methods, methods
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.language import LANGUAGE
from ops.reducers.projector import PROJECTOR
from ops.reducers.vision import VISION
from ops.rope import Rope

DRAWS = 3
# First words of the names of what sees no content.
BLIND = ('random', 'stride', 'pool', 'low')
SNAPKV = {'method': 'snapkv', 'args': {'window': 4}}
# In the language model all act between layers 1 and 2 of 0 to 3, on what layer 1 has measured.
BEFORE, BEHIND, IN_TOWER = (2,), (1,), (0, 1, 2)
# What is never a row of its own, by place, and why.
LEFT_OUT = {
    'vision': {
        'expedit': 'brings its tokens back',
        'dymu': 'has thresholds that are found on many images'},
    'projector': {
        **dict.fromkeys(('evs', 'vidcom2', 'dycoke', 'fastvid', 'holitom', 'prunevid',
                         'framefusion'), 'reduces the frames of a video'),
        'globalcom2': 'divides a budget among crops, and there is one'},
    'language': {
        **dict.fromkeys(('catp', 'catp_images'), 'reduces the images of examples'),
        'relevance_rank': 'reads a stat that nobody gives',
        'subtoken_merge': 'reads the words of a text in several tokens, and there are none',
        'framefusion_merge': 'reduces the frames of a video',
        'lvlm_csp': 'brings its tokens back'},
    'cache': {'periodic': 'evicts while an answer of many tokens is decoded',
              'voco': 'goes by tokens that this model never learned'},
    'branch': {'skip_decode': 'lets decoded tokens skip layers',
               'lemo': 'saves memory in training'}}
# Beyond these, a method gets what its own defaults are.
OWN = {
    ('vision', 'kmedoids'): {'layers': (1, 2)},
    ('projector', 'visionzip'): {'args': {'contextual': 2}},
    ('projector', 'duet_zip'): {'args': {'contextual': 2, 'width': 2}},
    ('projector', 'holov'): {'args': {'chunks': 4}},
    # Its words' layers; and where nothing has left before.
    ('language', 'vtw'): {'keep': 0, 'budgets': ()},
    ('language', 'todre_exit'): {'budgets': ()},
    ('language', 'gemfilter'): {'args': {'kernel': 1}},
    **{('cache', name): {'args': args} for name, args in {
        'snapkv': SNAPKV['args'], 'finch': {'window': 4}, 'lagkv': {'lag': 16},
        'duo_attention': {'sinks': 4, 'recent': 8}, 'still': {'window': 16},
        **{name: {'inner': SNAPKV} for name in ('adakv', 'criticalkv', 'criticaladakv', 'two_stage',
                                                'cam')},
        'chunkkv': {'inner': SNAPKV, 'length': 4},
        'pyramidkv': {'inner': SNAPKV, 'beta': 3},
        'chunk': {'inner': {'method': 'tova'}, 'length': 32},
        'threshold': {'inner': SNAPKV, 'threshold': 1e-3, 'window': 8}}.items()},
    ('cache', 'simlayerkv'): {'args': {'recent': 12}, 'budgets': ()},
    ('cache', 'think'): {'args': {'prune': 0.5}, 'budgets': ()},
    ('cache', 'quest'): {'args': {'page': 4, 'budget': 16}, 'budgets': ()},
    ('cache', 'corematching_cache'): {'budgets': ()}}
# Programs with cuts in a tower take longest to compile, and are not what this sweep is for.
BUDGETS, FEW = (1 / 2, 1 / 4, 1 / 8, 1 / 16), (1 / 4,)
# What has means beside the tokens that it keeps cannot leave fewer.
LEAST = {('projector', 'visionzip'): 1 / 8, ('projector', 'duet_zip'): 1 / 8}


def candidate(place, name, *, shown='', versus='', **settings):
  """Returns a candidate of one method, with what `OWN` and `LEAST` say of it."""
  settings = {'method': name, **settings, **OWN.get((place, name), {})}
  if (place, name) in LEAST:
    settings['budgets'] = tuple(each for each in BUDGETS if each >= LEAST[place, name])
  return {'name': shown or name, 'place': place, **({'versus': versus} if versus else {}),
          **settings}


def chance(place, where, **settings):
  """Yields the draws of random choice at a place, and what else chooses blindly there."""
  for seed in range(DRAWS):
    yield candidate(place, 'random', shown=f'random {where}', args={'seed': seed}, **settings)
  yield candidate(place, 'stride', shown=f'stride {where}', versus=f'random {where}', **settings)


def in_tower(host):
  """Yields what acts in the tower, made for vision transformers."""
  where = 'in the tower'
  yield from chance('vision', where, layers=IN_TOWER, budgets=FEW)
  for name in VISION:
    if name in methods(host) and name not in LEFT_OUT['vision']:
      yield candidate('vision', name, versus=f'random {where}', layers=IN_TOWER, budgets=FEW)


def at_projector(host):
  """Yields what acts behind the tower."""
  where = 'at the projector'
  yield from chance('projector', where)
  for name in ('pool', *PROJECTOR):
    if name in methods(host) and name not in LEFT_OUT['projector']:
      yield candidate('projector', name, versus=f'random {where}')


def in_language(host, before=BEFORE, behind=BEHIND):
  """Yields what acts in the language model: made for it, on visual tokens alone."""
  where, visual = f'in layer {before[0]}', {'token_kinds': 'visual'}
  yield from chance('language', where, site='before', layers=before, **visual)
  for name in LANGUAGE:
    if name in methods(host) and name not in LEFT_OUT['language']:
      layers = before if methods(host)[name].site == 'before' else behind
      yield candidate('language', name, versus=f'random {where}', layers=layers, **visual)


def in_layers():
  """Yields what acts in other layers, as its paper has it."""
  visual = {'token_kinds': 'visual'}
  for name, layers in (('fastv', (1,)), ('pyramiddrop', (1, 2, 3))):
    shown = f'{name}, layer{"s" * (len(layers) > 1)} {", ".join(map(str, layers))}'
    yield candidate('language', name, shown=shown, layers=layers, **visual)


def on_cache():
  """Yields what acts on the cache."""
  for name in CACHE_REDUCERS:
    if name not in LEFT_OUT['cache']:
      yield candidate('cache', name, versus='' if name == 'streaming_llm' else 'streaming_llm')


def in_branches():
  """Yields what lets fewer tokens run a part of a layer."""
  for name, made in branch_methods().items():
    if not hasattr(made, 'init') and name not in LEFT_OUT['branch']:
      yield candidate('language', name, layers=(2, 3), budgets=())


def candidates(config):
  """Returns every candidate, those of one place together."""
  parts, vocabulary = config.model, 8
  tower = ViT(**parts.tower, num_classes=0, image_size=64, pool='mean', last_norm='pooled')
  lm = LM(**parts.lm, vocabulary=vocabulary, rope=Rope(parts.lm.head_width))
  vlm = VLM(tower, lm, 2, parts.projection)
  visual = tower.grid[0] * tower.grid[1]
  return ({'name': 'low resolution', 'place': 'image', 'budgets': (1 / 2, 1 / 4, 1 / 16)},
          *in_tower(tower.host), *at_projector(vlm.projector_host(visual)),
          *in_language(lm.host(visual + 12, visual=visual)), *in_layers(), *in_branches(),
          *on_cache())


def get_config() -> ml_collections.ConfigDict:
  """The config of training with a sweep beside it."""
  config = digit_scenes.get_config()
  config.data.update(batch_size=100, test_split='test[:20%]')
  chosen = candidates(config)
  config.sweep = dict(
      title='Digits on photographs, 64 visual tokens and 12 of text, no training',
      sets=(('digit_scenes/64', 12),), candidates=chosen, budgets=BUDGETS, macs=(0.8,), behind=1,
      rounds=0,  # Latencies of so small a model say little: results/speed_cpu.md has some that do.
      baselines=tuple(dict.fromkeys(each['name'] for each in chosen
                                    if each['name'].split()[0] in BLIND)),
      pictured=('divprune', 'fastervlm', 'visionzip', 'cdpruner', 'fastv', 'sparsevlm',
                'pyramiddrop'))
  return config
