"""BERT from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.backbones.bert import Bert
from models.checkpoints import config_keys
from models.families import BERT


def from_config(config: Mapping[str, Any], **fields: Any) -> Bert:
  """Returns the model that a checkpoint's config.json describes.

  Args:
    config: the file's content; what it leaves out has the published default.
    **fields: of Bert that differ.

  Raises:
    ValueError: settings that are not known.
  """
  config_keys.check(config, 'bert')
  stated = {**BERT, **config}
  config_keys.divides(stated, 'num_attention_heads', 'hidden_size')
  return Bert(**({
      'width': stated['hidden_size'], 'depth': stated['num_hidden_layers'],
      'mlp': stated['intermediate_size'], 'heads': stated['num_attention_heads'],
      'vocabulary': stated['vocab_size'], 'context': stated['max_position_embeddings'],
      'types': stated['type_vocab_size'],
      'activation': config_keys.ACTIVATIONS[stated['hidden_act']],
      'norm_eps': stated['layer_norm_eps']} | fields))
