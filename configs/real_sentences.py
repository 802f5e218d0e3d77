"""Every reduction of an encoder of texts on real weights: MiniLM, docstrings and news.

  python -m tools.real.fetch --only=minilm,articles
  python -m tools.real.study --config=configs/real_sentences.py
  python -m tools.real.study --config=configs/real_sentences.py:quick
"""

import ml_collections

from models.backbones.bert import Bert
from models.plan import make_plan, methods
from ops import choices

TOKENS = 96
HOST = Bert(width=384, depth=6, mlp=1536, heads=12, vocabulary=30522, context=512).host(TOKENS)
# What is left behind the last layer, and how it is reached.
BUDGETS = {'half, in two cuts': {'layers': (2, 4), 'keep_ratio': 0.707},
           'a quarter, in two cuts': {'layers': (2, 4), 'keep_ratio': 0.5},
           'three quarters, in two cuts': {'layers': (2, 4), 'keep_ratio': 0.866},
           'half, in every layer': {'layers': 'all', 'keep_ratio': 0.891}}
# Six cuts take long to compile: of the methods some that are meant for so many.
EVERYWHERE = ('random', 'tome', 'pitome', 'atc', 'vid_tldr', 'topk')
# What only training makes useful is left out, and what is for images or videos beside a text, or
# reads stats that texts do not have. Random choice is measured first.
LEFT_OUT = ('none', 'random', 'ppe', 'catp_images', 'lvlm_csp', 'framefusion_merge',
            'framefusion_prune', 'relevance_rank', 'subtoken_merge')
METHODS = ('random', *(name for name, made in methods(HOST).items()
                       if not hasattr(made, 'init') and name not in LEFT_OUT))
# Those that can do with the final vectors alone, and reach every budget in one cut.
POOLS = {'random': {}, 'stride': {}, 'pool': {}, 'atc': {}, 'tome_kth': {}, 'dpcknn': {},
         'kmedoids': {'weights': 'equal'}, 'divprune': {}}
FACTORS = (2, 4, 8)
SIZES = ('full', 'quick')
QUICK = ('full', 'random', 'stride', 'pool', 'tome', 'atc', 'topk')


def row(name, budget, reduce=(), pool=()):
  """One row; its first keys name it."""
  return {'name': name, 'budget': budget, 'reduce': dict(reduce), 'pool': dict(pool)}


def inside(budget):
  """A row for each method that reaches a budget inside the encoder."""
  for name in EVERYWHERE if BUDGETS[budget]['layers'] == 'all' else METHODS:
    reduce = {'method': name, **BUDGETS[budget]}
    try:
      make_plan(reduce, HOST)
    except ValueError:  # It leaves half of the tokens at least, or as many as it likes.
      continue
    yield row(name, budget, reduce)


def behind(factor):
  """A row for each way of pooling the final vectors."""
  for name, args in POOLS.items():
    yield row(name, f'pooled by {factor}',
              pool={'method': name, 'keep_ratio': 1 / factor, 'args': args})


def get_config(size: str = 'full') -> ml_collections.ConfigDict:
  """Returns what to measure, and on how many texts: 'full', or 'quick' for a first look."""
  choices.check('size ', size, SIZES)
  small = size == 'quick'
  rows = (row('full', ''), *(each for factor in FACTORS for each in behind(factor)),
          *(each for budget in BUDGETS for each in inside(budget)))
  if small:
    rows = tuple(each for each in rows if each['name'] in QUICK
                 and each['budget'] in ('', 'pooled by 4', 'half, in two cuts'))
  return ml_collections.ConfigDict({
      'study': 'sentences', 'folder': 'real', 'seed': 0, 'out': f'runs/real/{size}/sentences.jsonl',
      'tokens': TOKENS, 'query_tokens': 24, 'batch': 32, 'pairs': 120 if small else 480,
      'candidates': 100 if small else 400, 'pools': 5, 'seeds': 3, 'chance': {'method': 'random'},
      'rows': rows}, convert_dict=False)
