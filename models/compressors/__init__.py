"""Methods with parameters, same protocol as ops/reducers: the dicts that name them."""

from models.compressors.ctm import CTM
from models.compressors.dtem import DTEM
from models.compressors.dtop import DToP
from models.compressors.dynamicvit import DynamicViT
from models.compressors.dyvte import DyVTE
from models.compressors.explained import Explained
from models.compressors.gamma_mod import GammaMoD
from models.compressors.patchmerger import PatchMerger
from models.compressors.pmod import PMoD
from models.compressors.sinkhorn import Sinkhorn
from models.compressors.sit import SiT
from models.compressors.textmonkey_resampler import TextMonkeyResampler
from ops.reducers.method import Method

COMPRESSORS: dict[str, type[Method]] = {
    'dynamicvit': DynamicViT,
    'patchmerger': PatchMerger,
    'sinkhorn': Sinkhorn,
    'ctm': CTM,
    'sit': SiT,
    'dtem': DTEM,
    'dtop': DToP,
    'dyvte': DyVTE,
    'explained': Explained,
    'textmonkey_resampler': TextMonkeyResampler,
}
# Routers, which say what runs a branch.
ROUTERS: dict[str, type[Method]] = {
    'pmod': PMoD,
    'gamma_mod': GammaMoD,
}
