"""The weights that a run begins with, made again."""

from __future__ import annotations

from headway.data.tokenizers import load_tokenizer
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.model_building import base_config
from headway.training.rng import preserved_rng, seed_everything
from headway.training.starting_model import starting_model


def weights_before_training(config: TrainConfig) -> MultiTokenLM:
    """The model of a run as it was before its first step; the global random state is afterwards as it was.

    Args:
        config: of the run.
    """
    shape = base_config(config, load_tokenizer(config.tokenizer_name))
    with preserved_rng():
        seed_everything(config.seed)
        return starting_model(config, shape)
