"""torchvision's classification models by their names: made with a data set's class count, and quantized by quantize_model.

torchvision takes a second to import, so it is imported where it is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.qat.convert import quantize_model
from lifequant.qat.layers import Scheme

CIFAR_STEM_UP_TO = (
    64  # pixels a side: Mammoth and the DER paper have the small stem at 32 (CIFAR) and 64 (Tiny ImageNet)
)
LEAST_PATCHES = 4  # along a side of an image, of a Vision Transformer


def names() -> list[str]:
    """The names of torchvision's classification models."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def weights_of(name: str, weights: str) -> Any:
    """torchvision's entry of a model's pretrained weights: "DEFAULT", or a name as IMAGENET1K_V1. Raises UserError."""
    import torchvision

    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(
            f"--source_weights {weights}: torchvision has no such weights of {name} (known: {', '.join(known.__members__)})"
        )
    return known[weights]


def quantized(
    name: str,
    num_classes: int,
    scheme: Scheme,
    image_size: int,
    stem: str = "auto",
    layer_bits: dict[str, tuple[int, int]] | None = None,
) -> nn.Module:
    """A quantized model, x float32 [N, 3, image_size, image_size] -> logits [N, num_classes], not calibrated.

    Raises UserError for an image size that the model refuses, and for a stem that it does not have.
    """
    return quantize_model(
        make(name, num_classes, image_size, stem),
        quantizer=scheme.weights,
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        first_last_bits=scheme.first_last_bits if scheme.weight_bits < 32 else 32,
        act_quantizer=scheme.activations,
        per_channel=scheme.per_channel,
        layer_bits=layer_bits,
    )


def make(name: str, num_classes: int, image_size: int, stem: str = "auto") -> nn.Module:
    """The float model, initialized by torchvision from torch's random generator.

    ``stem``: "cifar" gives a ResNet a first convolution of 3x3 and stride 1, and no max pooling, as Mammoth and Buzzega et
    al. (NeurIPS 2020) have it; "auto" does so up to 64 pixels. Auxiliary heads are left out.
    """
    import torchvision
    from torchvision.models.resnet import ResNet

    model = torchvision.models.get_model(name, num_classes=num_classes, **_arguments(name, image_size))
    if isinstance(model, ResNet):
        if stem == "cifar" or (stem == "auto" and image_size <= CIFAR_STEM_UP_TO):
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
            model.maxpool = nn.Identity()
    elif stem == "cifar":
        raise UserError(f"--stem cifar: only ResNets have one, and {name} is none: leave --stem out")
    return model


def _arguments(name: str, image_size: int) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    return {}


def check(name: str, image_size: int, stem: str) -> None:
    """Raises UserError if the model can't take images of that size, before any image is read. It has no weights here."""
    if name.startswith("vit_"):
        patch = _patch(name)
        if image_size % patch or image_size < LEAST_PATCHES * patch:
            raise UserError(
                f"--image_size {image_size}: {name} cuts images into patches of {patch} pixels, at least {LEAST_PATCHES} along a "
                f"side: give a multiple of {patch} from {LEAST_PATCHES * patch} on"
            )
    if needs_weights(name):  # it takes any size
        return
    try:
        with torch.device("meta"), torch.no_grad():
            make(name, 2, image_size, stem).eval()(torch.empty(1, 3, image_size, image_size))
    except UserError:
        raise
    except Exception as error:  # each architecture has its own
        raise UserError(
            f"--image_size {image_size}: {name} can't take images of that size ({short(error)}): give a larger one, like 224"
        ) from None


def needs_weights(name: str) -> bool:
    """Whether a model can't be made on torch's device "meta": RegNets compute their widths by tensors."""
    return name.startswith("regnet_")


def fitted_positions(
    name: str, image_size: int, tensors: dict[str, Tensor], state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A Vision Transformer's weights with position embeddings for images of that size; all else as it is."""
    key = "encoder.pos_embedding"
    if not name.startswith("vit_") or key not in tensors or tensors[key].shape == state[key].shape:
        return tensors
    from torchvision.models.vision_transformer import interpolate_embeddings

    return dict(interpolate_embeddings(image_size, _patch(name), OrderedDict(tensors)))


def _patch(name: str) -> int:
    """Pixels along a side of a Vision Transformer's patch: 16 of vit_b_16."""
    return int(name.rsplit("_", 1)[1])
