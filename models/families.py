"""Published architectures as data: the settings of each family, and no code.

A name in `NAMED` is a variant of models/backbones/vit.py, one in `PAIRS` of
models/backbones/clip.py, one in `LMS` of models/backbones/lm.py. Sources: ViT
(arXiv:2010.11929, Table 1), DeiT (arXiv:2012.12877), MAE (arXiv:2111.06377), DINOv2
(arXiv:2304.07193) and its registers (arXiv:2309.16588), CLIP (arXiv:2103.00020), SigLIP
(arXiv:2303.15343), SoViT (arXiv:2305.13035), SigLIP 2 (arXiv:2502.14786) and its released configs.
"""

from typing import Any

Settings = dict[str, Any]

# name: (width, depth, MLP width, heads).
SIZES = {
    'Ti': (192, 12, 768, 3),
    'S': (384, 12, 1536, 6),
    'B': (768, 12, 3072, 12),
    'L': (1024, 24, 4096, 16),
    'H': (1280, 32, 5120, 16),
    'So400m': (1152, 27, 4304, 16),
    'g': (1536, 40, 4096, 24),
    'gopt': (1536, 40, 6144, 16),
}

# Torch's, as the releases and the transformers library resample positions; timm's differs.
_BICUBIC = {'position_resampling': 'bicubic'}
DEIT = {'patch': 16, **_BICUBIC}
MAE = {'num_classes': 0, **_BICUBIC}
# Fine-tuned as released: the mean of the patches, then the norm.
MAE_TUNED = {'pool': 'mean', 'last_norm': 'pooled', **_BICUBIC}
DINOV2 = {'patch': 14, 'image_size': 518, 'num_classes': 0, 'layer_scale': 1e-5}
# name's ending: without and with registers, whose release resamples positions in another way.
_DINOV2: dict[str, Settings] = {'': _BICUBIC, '_reg4': {'registers': 4}}
CLIP = {'num_classes': 0, 'norm_eps': 1e-5, 'activation': 'quick_gelu', 'pre_norm': True,
        'patch_bias': False, **_BICUBIC}
SIGLIP = {'num_classes': 0, 'activation': 'gelu_tanh', 'class_token': False, 'pool': 'map',
          **_BICUBIC}
CLIP_TEXT = {'depth': 12, 'context': 77, 'vocabulary': 49408, 'causal': True, 'pool': 'eot',
             'norm_eps': 1e-5, 'activation': 'quick_gelu'}
SIGLIP_TEXT = {'context': 64, 'vocabulary': 32000, 'causal': False, 'pool': 'last',
               'projection_bias': True, 'activation': 'gelu_tanh'}


def _text(size: str, **settings: Any) -> Settings:
  """SigLIP's text tower of a size."""
  names = ('width', 'depth', 'mlp', 'heads')
  sizes = dict(zip(names, SIZES[size], strict=True))
  return SIGLIP_TEXT | sizes | {'projection': sizes['width']} | settings


# name: (size, patch side, image side, features that both towers end with, width of the text tower).
_CLIPS = {
    'clip_b32': ('B', 32, 224, 512, 512),
    'clip_b16': ('B', 16, 224, 512, 512),
    'clip_l14': ('L', 14, 224, 768, 768),
    'clip_l14_336': ('L', 14, 336, 768, 768),
}
# name: (size, patch side, image side). The reference resizes to 384 where 14 does not divide, and
# its patch embedding ignores the last 6 pixels; here that image is 378 pixels wide.
_SIGLIPS = {
    'siglip_b16_224': ('B', 16, 224),
    'siglip_b16_256': ('B', 16, 256),
    'siglip_b16_384': ('B', 16, 384),
    'siglip_b16_512': ('B', 16, 512),
    'siglip_l16_256': ('L', 16, 256),
    'siglip_l16_384': ('L', 16, 384),
    'siglip_so400m14_224': ('So400m', 14, 224),
    'siglip_so400m14_378': ('So400m', 14, 378),
}
_SIGLIPS2 = {
    'siglip2_b32_256': ('B', 32, 256),
    'siglip2_b16_224': ('B', 16, 224),
    'siglip2_b16_256': ('B', 16, 256),
    'siglip2_b16_384': ('B', 16, 384),
    'siglip2_b16_512': ('B', 16, 512),
    'siglip2_l16_256': ('L', 16, 256),
    'siglip2_l16_384': ('L', 16, 384),
    'siglip2_l16_512': ('L', 16, 512),
    'siglip2_so400m14_224': ('So400m', 14, 224),
    'siglip2_so400m14_378': ('So400m', 14, 378),
    'siglip2_so400m16_256': ('So400m', 16, 256),
    'siglip2_so400m16_384': ('So400m', 16, 384),
    'siglip2_so400m16_512': ('So400m', 16, 512),
    'siglip2_gopt16_256': ('gopt', 16, 256),
    'siglip2_gopt16_384': ('gopt', 16, 384),
}

# Fields of ViT; 'size' is a name in SIZES.
NAMED: dict[str, Settings] = {
    **{f'deit_{size.lower()}16': {'size': size, **DEIT} for size in ('Ti', 'S', 'B')},
    **{f'deit_{size.lower()}16_distilled': {'size': size, **DEIT, 'distilled': True}
       for size in ('Ti', 'S', 'B')},
    **{f'mae_{size.lower()}{patch}{ending}': {'size': size, 'patch': patch, **family}
       for size, patch in (('B', 16), ('L', 16), ('H', 14))
       for ending, family in (('', MAE), ('_tuned', MAE_TUNED))},
    **{f'dinov2_{size.lower()}14{ending}': {'size': size, **DINOV2, **own}
       for size in ('S', 'B', 'L') for ending, own in _DINOV2.items()},
    **{f'dinov2_g14{ending}': {'size': 'g', **DINOV2, 'activation': 'swiglu', **own}
       for ending, own in _DINOV2.items()},
    **{name: {'size': size, 'patch': patch, **CLIP, 'image_size': side, 'projection': projection}
       for name, (size, patch, side, projection, _) in _CLIPS.items()},
    **{name: {'size': size, 'patch': patch, **SIGLIP, 'image_size': side}
       for name, (size, patch, side) in (_SIGLIPS | _SIGLIPS2).items()},
}

# name: fields of Text and of Clip, {'text': ..., 'bias': ...}; the image tower has the same name.
PAIRS: dict[str, Settings] = {
    **{name: {'text': CLIP_TEXT | {'width': width, 'mlp': 4 * width, 'heads': width // 64,
                                   'projection': projection}, 'bias': False}
       for name, (_, _, _, projection, width) in _CLIPS.items()},
    **{name: {'text': _text(size), 'bias': True} for name, (size, _, _) in _SIGLIPS.items()},
    # The largest pairs its image tower with the text tower of the second largest.
    **{name: {'text': _text('So400m', projection=1536, vocabulary=256000) if size == 'gopt'
              else _text(size, vocabulary=256000), 'bias': True}
       for name, (size, _, _) in _SIGLIPS2.items()},
}

# What a language model's config.json may leave out, by its model_type, and what that then means:
# the defaults of the transformers library's config classes, which its files are written against.
# 'qkv_bias' and 'qk_norm' are ours: no config says them.
_DECODER = {'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008,
            'num_hidden_layers': 32, 'num_attention_heads': 32, 'rms_norm_eps': 1e-6,
            'rope_theta': 10000.0}
_QWEN = _DECODER | {'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32,
                    'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28,
                    'max_position_embeddings': 32768}
LM_FAMILIES: dict[str, Settings] = {
    'llama': _DECODER | {'max_position_embeddings': 2048},
    'mistral': _DECODER | {'intermediate_size': 14336, 'num_key_value_heads': 8,
                           'sliding_window': 4096, 'max_position_embeddings': 4096 * 32},
    'qwen2': _QWEN | {'qkv_bias': True},
    'qwen3': _QWEN | {'qk_norm': True, 'head_dim': 128},
}
# The same of the qwen2 in Qwen2-VL and Qwen2.5-VL, which has defaults of its own.
QWEN_VL_TEXT = _QWEN | {
    'vocab_size': 152064, 'hidden_size': 8192, 'intermediate_size': 29568, 'num_hidden_layers': 80,
    'num_attention_heads': 64, 'num_key_value_heads': 8, 'max_window_layers': 80,
    'rms_norm_eps': 1e-5, 'rope_theta': 1e6}
# Frequencies that turn with frames, rows and columns.
MROPE = (16, 24, 24)
# The same of a tower's config, by itself or inside that of a pair or a vision-language model.
_IMAGE_TOWER = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
                'num_attention_heads': 12, 'image_size': 224, 'patch_size': 16, 'num_channels': 3}
_VIT = _IMAGE_TOWER | {'hidden_act': 'gelu', 'layer_norm_eps': 1e-12}
_DINOV2_CONFIG = {key: value for key, value in _VIT.items() if key != 'intermediate_size'} | {
    'mlp_ratio': 4, 'layer_norm_eps': 1e-6, 'use_swiglu_ffn': False, 'patch_size': 14}
_SIGLIP_ACT = {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6}
TOWER_FAMILIES: dict[str, Settings] = {
    'vit': _VIT, 'deit': _VIT, 'vit_mae': _VIT,
    'dinov2': _DINOV2_CONFIG,
    'dinov2_with_registers': _DINOV2_CONFIG | {'patch_size': 16, 'num_register_tokens': 4},
    'clip_vision_model': _IMAGE_TOWER | {'patch_size': 32, 'hidden_act': 'quick_gelu',
                                         'layer_norm_eps': 1e-5, 'projection_dim': 512},
    'siglip_vision_model': _IMAGE_TOWER | _SIGLIP_ACT | {'vision_use_head': True},
    'siglip2_vision_model': _IMAGE_TOWER | _SIGLIP_ACT | {'vision_use_head': True,
                                                          'num_patches': 256},
}
_TEXT_TOWER = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
               'num_attention_heads': 12, 'vocab_size': 32000, 'max_position_embeddings': 64}
TEXT_FAMILIES: dict[str, Settings] = {
    'clip_text_model': _TEXT_TOWER | {
        'hidden_size': 512, 'intermediate_size': 2048, 'num_attention_heads': 8,
        'vocab_size': 49408, 'max_position_embeddings': 77, 'hidden_act': 'quick_gelu',
        'layer_norm_eps': 1e-5, 'projection_dim': 512, 'eos_token_id': 49407},
    'siglip_text_model': _TEXT_TOWER | _SIGLIP_ACT,
    'siglip2_text_model': _TEXT_TOWER | _SIGLIP_ACT,
}
BERT: Settings = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
                  'num_attention_heads': 12, 'vocab_size': 30522, 'max_position_embeddings': 512,
                  'type_vocab_size': 2, 'hidden_act': 'gelu', 'layer_norm_eps': 1e-12}
# What such a config never says of its family: fields of ViT and of Text.
TOWER_FIELDS: dict[str, Settings] = {
    'vit': {}, 'deit': {'distilled': True}, 'vit_mae': {},
    'dinov2': {'layer_scale': 1.0, 'pool': 'cls_mean'},
    'dinov2_with_registers': {'layer_scale': 1.0, 'pool': 'cls_mean',
                              'position_resampling': 'bicubic_antialiased'},
    'clip_vision_model': {'pre_norm': True, 'patch_bias': False},
    'siglip_vision_model': {'class_token': False},
    'siglip2_vision_model': {'class_token': False, 'position_resampling': 'bilinear_antialiased'},
    'clip_text_model': {'causal': True, 'pool': 'eot'},
    'siglip_text_model': {'causal': False, 'pool': 'last', 'projection_bias': True},
    'siglip2_text_model': {'causal': False, 'pool': 'last', 'projection_bias': True},
}

def _lm(kind: str, width: int, depth: int, mlp: int, heads: int, kv_heads: int, vocabulary: int,
        **more: Any) -> Settings:
  """A config.json, in short."""
  return {'model_type': kind, 'hidden_size': width, 'num_hidden_layers': depth,
          'intermediate_size': mlp, 'num_attention_heads': heads, 'num_key_value_heads': kv_heads,
          'vocab_size': vocabulary, **more}


def _llama3(width: int, depth: int, mlp: int, heads: int, factor: float = 0.0,
            **more: Any) -> Settings:
  """Llama 3, or with a factor 3.1 to 3.3."""
  scaling = {'rope_scaling': {
      'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192}} if factor else {}
  return _lm('llama', width, depth, mlp, heads, 8, 128256, rms_norm_eps=1e-5, rope_theta=500000.0,
             max_position_embeddings=131072 if factor else 8192, **scaling, **more)


def _llama2(width: int, depth: int, mlp: int, heads: int, kv_heads: int, **more: Any) -> Settings:
  return _lm('llama', width, depth, mlp, heads, kv_heads, 32000, rms_norm_eps=1e-5,
             max_position_embeddings=4096, **more)


# As the released configs have them.
LMS: dict[str, Settings] = {
    'llama2_7b': _llama2(4096, 32, 11008, 32, 32),
    'llama2_13b': _llama2(5120, 40, 13824, 40, 40),
    'llama2_70b': _llama2(8192, 80, 28672, 64, 8),
    'vicuna_7b': _llama2(4096, 32, 11008, 32, 32),
    'vicuna_13b': _llama2(5120, 40, 13824, 40, 40),
    'vicuna_7b_16k': _llama2(4096, 32, 11008, 32, 32) | {
        'rope_scaling': {'type': 'linear', 'factor': 4.0}},
    'llama3_8b': _llama3(4096, 32, 14336, 32),
    'llama3_70b': _llama3(8192, 80, 28672, 64),
    'llama3.1_8b': _llama3(4096, 32, 14336, 32, 8.0),
    'llama3.1_70b': _llama3(8192, 80, 28672, 64, 8.0),
    'llama3.2_1b': _llama3(2048, 16, 8192, 32, 32.0, tie_word_embeddings=True),
    'llama3.2_3b': _llama3(3072, 28, 8192, 24, 32.0, tie_word_embeddings=True),
    'mistral_7b': _lm('mistral', 4096, 32, 14336, 32, 8, 32000, rms_norm_eps=1e-5,
                      max_position_embeddings=32768),
    'mistral_7b_v0.3': _lm('mistral', 4096, 32, 14336, 32, 8, 32768, rms_norm_eps=1e-5,
                           rope_theta=1e6, sliding_window=0, max_position_embeddings=32768),
    'qwen2_0.5b': _lm('qwen2', 896, 24, 4864, 14, 2, 151936, rope_theta=1e6,
                      max_position_embeddings=131072, tie_word_embeddings=True),
    'qwen2_7b': _lm('qwen2', 3584, 28, 18944, 28, 4, 152064, rope_theta=1e6,
                    max_position_embeddings=131072),
    'qwen2.5_0.5b': _lm('qwen2', 896, 24, 4864, 14, 2, 151936, rope_theta=1e6,
                        max_position_embeddings=32768, tie_word_embeddings=True),
    'qwen2.5_7b': _lm('qwen2', 3584, 28, 18944, 28, 4, 152064, rope_theta=1e6,
                      max_position_embeddings=131072),
    'qwen3_0.6b': _lm('qwen3', 1024, 28, 3072, 16, 8, 151936, rope_theta=1e6,
                      max_position_embeddings=40960, tie_word_embeddings=True),
    'qwen3_8b': _lm('qwen3', 4096, 36, 12288, 32, 8, 151936, rope_theta=1e6,
                    max_position_embeddings=40960),
}


def _clip_tower() -> Settings:
  return {'model_type': 'clip_vision_model', 'hidden_size': 1024, 'intermediate_size': 4096,
          'num_hidden_layers': 24, 'num_attention_heads': 16, 'image_size': 336, 'patch_size': 14}


def _siglip_tower() -> Settings:
  """SigLIP So400m without its last layer, which LLaVA-OneVision does not read."""
  return {'model_type': 'siglip_vision_model', 'hidden_size': 1152, 'intermediate_size': 4304,
          'num_hidden_layers': 26, 'num_attention_heads': 16, 'image_size': 384, 'patch_size': 14}


def _qwen_tower(out: int, version: str) -> Settings:
  if version == 'qwen2_vl':
    return {'depth': 32, 'embed_dim': 1280, 'num_heads': 16, 'mlp_ratio': 4, 'hidden_size': out}
  return {'depth': 32, 'hidden_size': 1280, 'num_heads': 16, 'intermediate_size': 3420,
          'out_hidden_size': out, 'window_size': 112, 'fullatt_block_indexes': (7, 15, 23, 31)}


def _vlm(kind: str, tower: Settings, text: Settings, image_token: int, **more: Any) -> Settings:
  return {'model_type': kind, 'vision_config': tower, 'text_config': text,
          'image_token_id': image_token, **more}


_TILES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_GRIDS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

# What a vision-language config.json may leave out: the model_type of its language model, and where
# there is no vision_config at all, the whole of it.
LLAVA_TEXTS = {'llava': 'llama', 'llava_next': 'llama', 'llava_onevision': 'qwen2'}
QWENS = ('qwen2_vl', 'qwen2_5_vl')
VLM_TOWERS: dict[str, Settings] = {
    'llava': _clip_tower(), 'llava_next': _clip_tower(), 'llava_onevision': _siglip_tower()}
IMAGE_TOKENS = {'llava': 32000, 'llava_next': 32000, 'llava_onevision': 151646,
                'qwen2_vl': 151655, 'qwen2_5_vl': 151655}
PINPOINTS = {'llava_next': _TILES, 'llava_onevision': _GRIDS}

_MROPE = {'rope_scaling': {'type': 'mrope', 'mrope_section': MROPE}, 'rope_theta': 1e6,
          'rms_norm_eps': 1e-6}
_VICUNA = {'vocab_size': 32064}

# Vision-language models (models/backbones/vlm.py), each as its released config.json, in short.
VLMS: dict[str, Settings] = {
    **{f'llava1.5_{size}': _vlm('llava', _clip_tower(), LMS[f'vicuna_{size}'] | _VICUNA, 32000)
       for size in ('7b', '13b')},
    **{f'llava1.6_vicuna_{size}': _vlm('llava_next', _clip_tower(),
                                       LMS[f'vicuna_{size}'] | _VICUNA, 32000,
                                       image_grid_pinpoints=_TILES) for size in ('7b', '13b')},
    'llava_onevision_0.5b': _vlm('llava_onevision', _siglip_tower(),
                                 LMS['qwen2_0.5b'] | {'vocab_size': 152000}, 151646,
                                 image_grid_pinpoints=_GRIDS),
    'llava_onevision_7b': _vlm('llava_onevision', _siglip_tower(),
                               LMS['qwen2_7b'] | {'vocab_size': 152128}, 151646,
                               image_grid_pinpoints=_GRIDS),
    'qwen2_vl_2b': _vlm('qwen2_vl', _qwen_tower(1536, 'qwen2_vl'), _lm(
        'qwen2', 1536, 28, 8960, 12, 2, 151936, tie_word_embeddings=True, **_MROPE), 151655),
    'qwen2_vl_7b': _vlm('qwen2_vl', _qwen_tower(3584, 'qwen2_vl'), _lm(
        'qwen2', 3584, 28, 18944, 28, 4, 152064, **_MROPE), 151655),
    'qwen2.5_vl_3b': _vlm('qwen2_5_vl', _qwen_tower(2048, 'qwen2_5_vl'), _lm(
        'qwen2', 2048, 36, 11008, 16, 2, 151936, tie_word_embeddings=True,
        max_position_embeddings=128000, **_MROPE), 151655),
    'qwen2.5_vl_7b': _vlm('qwen2_5_vl', _qwen_tower(3584, 'qwen2_5_vl'), _lm(
        'qwen2', 3584, 28, 18944, 28, 4, 152064, max_position_embeddings=128000, **_MROPE), 151655),
}
