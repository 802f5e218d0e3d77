"""Methods that act on the cache of keys and values after the prompt: the one dict that names them.

Each is called as `method(tokens, signals, num_slots=M)` in a layer, and answers an
`ops.kv_cache.KVAnswer`. Those that rank entries (ops/reducers/scoring.py) can be held by those that
hold one. What the kvpress library wraps as KeyRerotation is positions='compact' in a config, of any
method here.
"""

from ops.reducers.cache.adakv import AdaKV
from ops.reducers.cache.cam import CaM
from ops.reducers.cache.chunk import Chunk
from ops.reducers.cache.chunkkv import ChunkKV
from ops.reducers.cache.compactor import Compactor
from ops.reducers.cache.corematching_cache import CoreMatchingCache
from ops.reducers.cache.criticaladakv import CriticalAdaKV
from ops.reducers.cache.criticalkv import CriticalKV
from ops.reducers.cache.cur import CUR
from ops.reducers.cache.duo_attention import DuoAttention
from ops.reducers.cache.expected_attention import ExpectedAttention
from ops.reducers.cache.finch import Finch
from ops.reducers.cache.h2o import H2O
from ops.reducers.cache.keydiff import KeyDiff
from ops.reducers.cache.knorm import KNorm
from ops.reducers.cache.lagkv import LagKV
from ops.reducers.cache.observed_attention import ObservedAttention
from ops.reducers.cache.periodic import Periodic
from ops.reducers.cache.pyramidkv import PyramidKV
from ops.reducers.cache.quest import Quest
from ops.reducers.cache.rkv import RKV
from ops.reducers.cache.simlayerkv import SimLayerKV
from ops.reducers.cache.snapkv import SnapKV
from ops.reducers.cache.still import STILL
from ops.reducers.cache.streaming_llm import StreamingLLM
from ops.reducers.cache.think import ThinK
from ops.reducers.cache.threshold import Threshold
from ops.reducers.cache.tova import TOVA
from ops.reducers.cache.two_stage import TwoStage
from ops.reducers.cache.voco import VoCo

CACHE_REDUCERS: dict[str, type] = {
    'streaming_llm': StreamingLLM,
    'knorm': KNorm,
    'keydiff': KeyDiff,
    'lagkv': LagKV,
    'cur': CUR,
    'compactor': Compactor,
    'tova': TOVA,
    'observed_attention': ObservedAttention,
    'h2o': H2O,
    'snapkv': SnapKV,
    'finch': Finch,
    'expected_attention': ExpectedAttention,
    'simlayerkv': SimLayerKV,
    'duo_attention': DuoAttention,
    'adakv': AdaKV,
    'criticalkv': CriticalKV,
    'criticaladakv': CriticalAdaKV,
    'pyramidkv': PyramidKV,
    'chunkkv': ChunkKV,
    'chunk': Chunk,
    'two_stage': TwoStage,
    'think': ThinK,
    'cam': CaM,
    'quest': Quest,
    'rkv': RKV,
    'periodic': Periodic,
    'threshold': Threshold,
    'corematching_cache': CoreMatchingCache,
    'still': STILL,
    'voco': VoCo,
}
