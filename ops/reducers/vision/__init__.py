"""Reductions inside a vision tower, without parameters."""

from ops.reducers.method import Method
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

VISION: dict[str, type[Method]] = {
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
}
