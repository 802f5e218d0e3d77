"""Every reduction of a language model on real weights: perplexity, keys in a haystack, latency.

  python -m tools.real.fetch
  python -m tools.real.study --config=configs/real_language.py
  python -m tools.real.study --config=configs/real_language.py:quick
"""

import ml_collections

from models.backbones.lm import LM
from models.plan import methods
from ops import choices
from ops.reducers.baselines import BASELINES
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.language import LANGUAGE
from ops.rope import Rope

DRAWS = 3
SHARES = (0.75, 0.5, 0.25, 0.12)
MIDDLE, ENDS = (0.5, 0.25), (0.12, 0.75)
SNAPKV = {'method': 'snapkv', 'args': {'window': 32}}
EXPECTED = {'method': 'expected_attention'}
# What the methods on the cache are given; those that are not here get nothing.
ARGS = {
    'snapkv': SNAPKV['args'], 'finch': {'window': 32}, 'lagkv': {'lag': 64},
    **{name: {'inner': SNAPKV} for name in ('adakv', 'criticalkv', 'criticaladakv', 'chunkkv',
                                            'two_stage', 'cam')},
    'pyramidkv': {'inner': SNAPKV, 'beta': 3},
    'chunk': {'inner': {'method': 'tova'}, 'length': 128},
    'threshold': {'inner': SNAPKV, 'threshold': 1e-4, 'window': 32},
    'periodic': {'inner': {'method': 'tova'}}}
# What evicts nothing; what looks at images, or at words about them; and what reads stats of tokens
# that texts do not have.
LEFT_OUT = ('quest', 'corematching_cache', 'sparsevlm', 'visiondrop', 'vtw', 'catp', 'catp_images',
            'todre_exit', 'lvlm_csp', 'adatoken_3d', 'mustdrop', 'fopru', 'ppe', 'relevance_rank',
            'subtoken_merge', 'framefusion_merge', 'framefusion_prune', 'llavolta', 'voco')
# What a row is compared with, beside chance; those that hold another method, with that.
VERSUS = {
    'streaming_llm': 'streaming_llm, no sinks', 'streaming_llm, turned': 'streaming_llm',
    'tova': 'h2o', 'tova, turned': 'tova', 'snapkv': 'h2o', 'observed_attention': 'h2o',
    'expected_attention': 'snapkv', 'finch': 'snapkv', 'rkv': 'snapkv', 'keydiff': 'knorm',
    'h2o': 'streaming_llm', 'criticaladakv(snapkv)': 'adakv(snapkv)',
    'chance within ends': 'chance'}
# What is measured on prompts of 2,048 and 4,096 tokens too, a quarter kept.
AT_LENGTH = ('full', 'chance within ends', 'streaming_llm', 'h2o', 'observed_attention', 'snapkv',
             'tova', 'expected_attention', 'keydiff', 'lagkv', 'cur', 'finch', 'adakv(snapkv)',
             'chunkkv(snapkv)', 'pyramidkv(snapkv)')
# In the model, tokens leave once, in front of this layer of 30.
LAYER = 10


def row(name, share, where, ranking='own', versus='', **reduce):
  """Returns what a row is told by, but for where it is measured.

  Args:
    name, share: as shown.
    where: 'cache', 'model' for tokens that leave between layers, 'tokens' for a cache that is kept
      at a capacity, or '' for the unreduced model.
    ranking: 'own', or one of `RANKINGS` (lib/studies/cut_caches.py) in place of the method's.
    versus: the name of a row to compare with, at the same share.
    **reduce: the reduction.
  """
  return {'name': name, 'share': share, 'where': where, 'ranking': ranking,
          'versus': versus or VERSUS.get(name, ''), 'reduce': reduce}


FULL = row('full', 1.0, '')


def cache_rows(share):
  """A row for each method on the cache at one share, and for what they are compared with."""

  def held(name, **args):
    inner = args['inner']['method']
    name, method = f'{name}({inner})', name
    return row(name, share, 'cache', versus=VERSUS.get(name, inner), method=method,
               keep_ratio=share, args=args)

  def ranked(ranking):
    return row(ranking, share, 'cache', ranking, method='knorm', keep_ratio=share)

  yield ranked('chance')
  yield ranked('chance within ends')
  yield ranked('even')
  for name in CACHE_REDUCERS:
    args = ARGS.get(name, {})
    if name == 'think':
      yield row(name, share, 'cache', method=name, args={'prune': 1 - share})
    elif name not in ('simlayerkv', *LEFT_OUT):  # The first one's budget is a number of entries.
      yield (held(name, **args) if 'inner' in args else
             row(name, share, 'cache', method=name, keep_ratio=share, args=args))
  yield row('streaming_llm, no sinks', share, 'cache', method='streaming_llm', keep_ratio=share,
            args={'sinks': 0})
  for name in ('streaming_llm', 'tova'):
    yield row(f'{name}, turned', share, 'cache', method=name, keep_ratio=share, positions='compact')
  yield held('adakv', inner=EXPECTED)
  yield held('cam', inner={'method': 'streaming_llm'})
  yield held('two_stage', inner={'method': 'tova'}, then=EXPECTED)


def lazy(share, length):
  """The row of the method that keeps a number of entries in lazy layers."""
  return row('simlayerkv', share, 'cache', method='simlayerkv',
             args={'recent': int(length * share) - 4})


def model_rows(share, names):
  """A row for each method in the model, as many tokens leaving as the share says."""
  for name in names:
    yield row(f'{name}, layer {LAYER}', share, 'model', versus=f'random, layer {LAYER}',
              method=name, layers=(LAYER,), keep_ratio=share)


def in_model():
  """Names of the methods that need no training and act on text: made for language, and others."""
  lm = LM(vocabulary=8, width=64, depth=30, mlp=8, heads=1, kv_heads=1, head_width=64,
          context=8192, rope=Rope(64, 1e5))
  able = [name for name, made in methods(lm.host(512)).items()
          if not hasattr(made, 'init') and name not in ('none', *LEFT_OUT)]
  made_for = [name for name in able if name in LANGUAGE or name in BASELINES]
  return made_for, [name for name in able if name not in made_for]


def cell(measure, length, draw, shares, more=()):
  """Rows that share prompts: the unreduced model, what acts on the cache, and others."""
  own = [FULL, *(each for share in shares
                 for each in (*cache_rows(share), lazy(share, length))), *more]
  return [{'measure': measure, 'length': length, 'draw': draw, **each} for each in own]


def quick():
  """One draw, short prompts, a quarter kept; hidden keys with some methods alone."""
  return [*cell('perplexity', 512, 0, (0.25,)),
          *(each for each in cell('recall', 512, 0, (0.25,)) if each['name'] in AT_LENGTH)]


def complete():
  """All draws of what says most, then of the rest, then what is measured once."""
  made_for, others = in_model()
  # Several of the others pair tokens, and so keep more than half.
  inside = [*(each for share in MIDDLE for each in model_rows(share, made_for)),
            *model_rows(0.75, others)]
  rows = []
  for draw in range(DRAWS):
    rows += cell('perplexity', 1024, draw, MIDDLE)
    rows += cell('recall', 1024, draw, MIDDLE)
  for draw in range(DRAWS):
    rows += cell('perplexity', 512, draw, MIDDLE, inside)
    rows += cell('perplexity', 1024, draw, ENDS)[1:]
    rows += cell('recall', 512, draw, MIDDLE)
  for draw in range(DRAWS):
    for length in (2048, 4096):
      rows += [each for each in cell('recall', length, draw, (0.25,)) if each['name'] in AT_LENGTH]
  sinks = [row(f'{sinks} sinks, {capacity} in all', 0.0, 'tokens', method='streaming_llm',
               capacity=capacity, args={'sinks': sinks})
           for capacity in (128, 64) for sinks in (0, 4)]
  timed = [each for share in MIDDLE for each in cache_rows(share)
           if each['name'] in ('streaming_llm', 'snapkv', 'h2o', 'adakv(snapkv)')]
  for measure, length, own in (('windows', 512, sinks), ('latency', 4096, timed)):
    rows += cell(measure, length, 0, ())
    rows += [{**rows[-1], **each} for each in own]
  for draw in range(DRAWS):
    rows += cell('recall', 1024, draw, ENDS)[1:]
  return rows


SIZES = {'full': complete, 'quick': quick}


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """Returns what to measure: 'full', or 'quick' for a first look."""
  choices.check('size ', size, SIZES)
  return ml_collections.ConfigDict({
      'study': 'language', 'folder': 'real', 'out': f'runs/real/{size}/language.jsonl', 'seed': 0,
      'draws': DRAWS, 'texts': 1, 'shares': SHARES, 'behind': 256, 'greedy': 32,
      'depths': (0.1, 0.5, 0.9), 'longest_pass_key': 2048, 'rounds': 2,
      'rows': tuple(SIZES[size]())}, convert_dict=False)
