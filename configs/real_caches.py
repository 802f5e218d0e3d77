"""Methods on the cache of a real language model: perplexity behind a prefix, and pass keys.

  python -m lib.tasks.cache_quality --config=configs/real_caches.py \
      --config.weights=SmolLM2-135M-Instruct.Q4_1.gguf --config.text=articles.txt
"""

import ml_collections

SHARES = (0.5, 0.25)
SNAPKV = {'method': 'snapkv', 'args': {'window': 32}}
METHODS = (
    'streaming_llm', 'knorm', 'keydiff', 'lagkv', 'cur', 'tova', 'observed_attention', 'h2o',
    'expected_attention', 'rkv')


def rows(share):
  """A row for each method at one share of the cache."""

  def row(name, ranking='own', **reduce):
    return {'name': name, 'share': share, 'ranking': ranking, 'reduce': reduce}

  def held(name, inner=SNAPKV, **args):
    return row(f'{name}({inner["method"]})', method=name, keep_ratio=share,
               args={'inner': inner, **args})

  expected = {'method': 'expected_attention'}
  yield row('chance', 'chance', method='knorm', keep_ratio=share)
  for name in METHODS:
    args = {'lagkv': {'lag': 64}}.get(name, {})
    yield row(name, method=name, keep_ratio=share, args=args)
  for name in ('snapkv', 'finch'):
    yield row(name, method=name, keep_ratio=share, args={'window': 32})
  yield held('adakv')
  yield held('adakv', expected)
  yield held('criticalkv')
  yield held('criticaladakv')
  yield held('pyramidkv', beta=3)
  yield held('chunkkv')
  yield held('chunk', {'method': 'knorm'}, length=128)
  yield held('chunk', {'method': 'tova'}, length=128)
  yield held('two_stage')
  yield held('two_stage', {'method': 'tova'}, then=expected)
  yield held('cam')
  yield row('streaming_llm, turned', method='streaming_llm', keep_ratio=share, positions='compact')
  yield row('tova, turned', method='tova', keep_ratio=share, positions='compact')
  yield row('think', method='think', args={'prune': 1 - share})
  yield row('simlayerkv', method='simlayerkv', args={'recent': int(1024 * share) - 4})


def get_config() -> ml_collections.ConfigDict:
  """What to measure, and on which files."""
  full = {'name': 'full', 'share': 1.0, 'ranking': 'own', 'reduce': {}}
  return ml_collections.ConfigDict({
      'weights': '', 'text': '', 'out': 'results/real_caches.jsonl', 'seed': 0,
      'prefix': 1024, 'behind': 128, 'texts': 2, 'words': 300, 'pass_keys': 8,
      'rows': (full, *(row for pair in zip(*map(rows, SHARES), strict=True) for row in pair))},
      convert_dict=False)
