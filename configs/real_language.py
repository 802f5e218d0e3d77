"""Methods on the cache of a real language model: perplexity behind a prefix, and pass keys.

  python -m tools.real.study --config=configs/real_language.py \
      --config.weights=SmolLM2-135M-Instruct.Q4_1.gguf --config.text=articles.txt
"""

import ml_collections

SHARES = (0.5, 0.25)
SNAPKV = {'method': 'snapkv', 'args': {'window': 32}}
METHODS = (
    'knorm', 'tova', 'snapkv', 'expected_attention', 'streaming_llm', 'h2o', 'keydiff', 'lagkv',
    'cur', 'observed_attention', 'finch', 'rkv')
ARGS = {'lagkv': {'lag': 64}, 'snapkv': {'window': 32}, 'finch': {'window': 32}}


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
    yield row(name, method=name, keep_ratio=share, args=ARGS.get(name, {}))
  yield held('adakv')
  yield held('criticalkv')
  yield held('criticaladakv')
  yield held('pyramidkv', beta=3)
  yield held('chunkkv')
  yield held('chunk', {'method': 'knorm'}, length=128)
  yield held('two_stage')
  yield held('cam')
  yield row('think', method='think', args={'prune': 1 - share})
  yield row('simlayerkv', method='simlayerkv', args={'recent': int(1024 * share) - 4})
  yield row('streaming_llm, turned', method='streaming_llm', keep_ratio=share, positions='compact')
  yield row('tova, turned', method='tova', keep_ratio=share, positions='compact')
  yield held('adakv', expected)
  yield held('chunk', {'method': 'tova'}, length=128)
  yield held('two_stage', {'method': 'tova'}, then=expected)


def get_config() -> ml_collections.ConfigDict:
  """Returns what to measure, and on which files."""
  full = {'name': 'full', 'share': 1.0, 'ranking': 'own', 'reduce': {}}
  return ml_collections.ConfigDict({
      'study': 'language', 'weights': '', 'text': '', 'out': 'results/real_language.jsonl',
      'seed': 0, 'prefix': 1024, 'behind': 128, 'texts': 2, 'words': 300, 'pass_keys': 8,
      'rows': (full, *(row for pair in zip(*map(rows, SHARES), strict=True) for row in pair))},
      convert_dict=False)
