"""Methods that act on the cache of keys and values after the prompt: the one dict that names them.

Each is called as `method(tokens, signals, num_slots=M)` in a layer, and answers an
`ops.kv_cache.KVGather`.
"""

from ops.reducers.cache.expected_attention import ExpectedAttention
from ops.reducers.cache.h2o import H2O
from ops.reducers.cache.keydiff import KeyDiff
from ops.reducers.cache.knorm import KNorm
from ops.reducers.cache.observed_attention import ObservedAttention
from ops.reducers.cache.periodic import Periodic
from ops.reducers.cache.rkv import RKV
from ops.reducers.cache.snapkv import SnapKV
from ops.reducers.cache.streaming_llm import StreamingLLM
from ops.reducers.cache.threshold import Threshold
from ops.reducers.cache.tova import TOVA

CACHE_REDUCERS: dict[str, type] = {
    'streaming_llm': StreamingLLM,
    'knorm': KNorm,
    'keydiff': KeyDiff,
    'tova': TOVA,
    'observed_attention': ObservedAttention,
    'h2o': H2O,
    'snapkv': SnapKV,
    'expected_attention': ExpectedAttention,
    'rkv': RKV,
    'periodic': Periodic,
    'threshold': Threshold,
}
