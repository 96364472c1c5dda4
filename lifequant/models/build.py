"""A network from a Config."""

from __future__ import annotations

import torch
from torch import nn

from lifequant import registry
from lifequant.config import Config
from lifequant.qat.layers import Scheme, set_layer_bits


def build(config: Config, num_classes: int) -> nn.Module:
    """The quantized network of a config, randomly initialized from its seed alone."""
    scheme = make_scheme(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = registry.model(config.target_model)(num_classes, scheme, config.shortcut)
    set_layer_bits(model, scheme, config.bits_of_layers())
    return model.to(memory_format=torch.channels_last)


def make_scheme(config: Config) -> Scheme:
    """Weights and activations may have different quantizers."""
    activations = config.act_quantizer or config.quantizer
    return Scheme(
        weights=registry.quantizer(config.quantizer, **config.option(config.quantizer, "quantizer")),
        activations=registry.quantizer(activations, **config.option(activations, "quantizer")),
        weight_bits=config.bitW,
        act_bits=config.abitW,
        first_last_bits=config.first_last_bits,
        per_channel=config.per_channel,
    )
