"""A network from a Config."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lifequant import registry
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data.augment import statistics_of
from lifequant.models import torchvision_models
from lifequant.qat.layers import Scheme, set_layer_bits
from lifequant.qat.weights import weights


def build(config: Config, num_classes: int) -> nn.Module:
    """The quantized network of a config, randomly initialized from its seed alone."""
    scheme = make_scheme(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.target_model in registry.names("model"):
            model = registry.model(config.target_model)(num_classes, scheme, config.shortcut)
            set_layer_bits(model, scheme, config.bits_of_layers())
            if next(weights(model), None) is None:
                raise UserError(
                    f"--target_model {config.target_model}: it has no layer of the scheme it is given (scheme.conv, scheme.linear), so "
                    "nothing of it can be quantized"
                )
        else:
            model = torchvision_models.quantized(
                config.target_model, num_classes, scheme, config.image_size, config.stem, config.bits_of_layers()
            )
    model.statistics = statistics_of(config)  # for who has the model alone
    return model.to(memory_format=torch.channels_last)


def build_float(config: Config, num_classes: int) -> nn.Module:
    """The same network in float, as its authors have it, with the same random weights."""
    if config.target_model in registry.names("model"):
        return build(replace(config, bitW=32, abitW=32, layer_bits=None), num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return torchvision_models.make(config.target_model, num_classes, config.image_size, config.stem)


def operations(config: Config) -> int:
    """Multiplications and additions of the forward pass of one image in float. Found without weights, so at once."""
    on = "cpu" if torchvision_models.needs_weights(config.target_model) else "meta"
    with torch.device(on), torch.no_grad():
        net = build_float(config, 2).eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            net(image)
    return counter.get_total_flops()


def check_model(config: Config) -> None:
    """Raises UserError if the network can't be built, before any image is read."""
    if config.target_model not in registry.names("model"):
        torchvision_models.check(config.target_model, config.image_size, config.stem)


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
