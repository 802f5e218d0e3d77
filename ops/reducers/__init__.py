"""Methods without parameters: the one dict that names them; of caches, ops/reducers/cache.

Tests, the README's table, the command line and the explain tool all read it.
"""

from ops.reducers.baselines.none import Nothing
from ops.reducers.baselines.pool import Pool
from ops.reducers.baselines.radial import Radial
from ops.reducers.baselines.random import Random
from ops.reducers.baselines.stride import Stride
from ops.reducers.language.duet_vlm import DUETVLM
from ops.reducers.language.fastv import FastV
from ops.reducers.language.gemfilter import GemFilter
from ops.reducers.language.pyramiddrop import PyramidDrop
from ops.reducers.language.transprune import TransPrune
from ops.reducers.projector.divprune import DivPrune
from ops.reducers.projector.fastervlm import FasterVLM
from ops.reducers.projector.flowcut import FlowCut
from ops.reducers.projector.hiprune import HiPrune
from ops.reducers.projector.prumerge import PruMerge
from ops.reducers.projector.textmonkey import TextMonkey
from ops.reducers.projector.visionzip import VisionZip
from ops.reducers.projector.vtc_cls import VTCCLS
from ops.reducers.vision.atc import ATC
from ops.reducers.vision.ats import ATS
from ops.reducers.vision.ats_spatial import ATSSpatial
from ops.reducers.vision.centerclip import CenterCLIP
from ops.reducers.vision.crossget import CrossGET
from ops.reducers.vision.dpcknn import DPCKNN
from ops.reducers.vision.dymu import DyMU
from ops.reducers.vision.evit import EViT
from ops.reducers.vision.expedit import Expedit
from ops.reducers.vision.kmedoids import KMedoids
from ops.reducers.vision.mctf import MCTF
from ops.reducers.vision.pitome import PiToMe
from ops.reducers.vision.token_transforming import TokenTransforming
from ops.reducers.vision.tome import ToMe
from ops.reducers.vision.tome_kth import ToMeKth
from ops.reducers.vision.topk import TopK
from ops.reducers.vision.vid_tldr import VidTLDR

REDUCERS: dict[str, type] = {
    # Vision; and at the door of a language model.
    'none': Nothing,
    'random': Random,
    'stride': Stride,
    'pool': Pool,
    'radial': Radial,
    'topk': TopK,
    'evit': EViT,
    'tome': ToMe,
    'tome_kth': ToMeKth,
    'pitome': PiToMe,
    'mctf': MCTF,
    'crossget': CrossGET,
    'vid_tldr': VidTLDR,
    'atc': ATC,
    'ats': ATS,
    'ats_spatial': ATSSpatial,
    'dpcknn': DPCKNN,
    'kmedoids': KMedoids,
    'centerclip': CenterCLIP,
    'expedit': Expedit,
    'dymu': DyMU,
    'token_transforming': TokenTransforming,
    'flowcut': FlowCut,
    'textmonkey': TextMonkey,
    'divprune': DivPrune,
    'fastervlm': FasterVLM,
    'visionzip': VisionZip,
    'prumerge': PruMerge,
    'vtc_cls': VTCCLS,
    'hiprune': HiPrune,
    # Language.
    'fastv': FastV,
    'pyramiddrop': PyramidDrop,
    'duet_vlm': DUETVLM,
    'transprune': TransPrune,
    'gemfilter': GemFilter,
}
