"""--target_model with torchvision's models, and float weights of elsewhere as the source; torchvision is the reference."""

from __future__ import annotations

import argparse
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from support.equal import Killed, kill_at, read, same
from support.tiny import arguments, settings, train
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import lifequant
from lifequant import options, registry
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint, float_weights, source
from lifequant.checkpointing.packed import MARK
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.methods.importance import CHUNK, at_quantized_weights, per_sample
from lifequant.models import torchvision_models
from lifequant.models.build import build, build_float
from lifequant.qat.convert import calibrate, quantize_model
from lifequant.qat.weights import body_weights
from lifequant.registry import penalty
from lifequant.training import history

SMALL = "shufflenet_v2_x0_5"
WITH_DROPOUT = "squeezenet1_1"  # and without a linear head


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("alexnet", 32, "can't take images of that size"),
        ("inception_v3", 64, "can't take images of that size"),
        ("maxvit_t", 64, "can't take images of that size"),
        ("vit_b_16", 32, "patches of 16 pixels, at least 4 along a side: give a multiple of 16 from 64 on"),
        ("vit_b_16", 72, "give a multiple of 16"),
        *[
            (name, 64, None)
            for name in ("vit_b_16", "swin_v2_t", "densenet121", "googlenet", "regnet_y_400mf", "vgg11")
        ],
        ("maxvit_t", 224, None),
    ],
)
def test_image_sizes(name, size, words):
    """A size that a network refuses is one line, before any image is read."""
    if words is None:
        torchvision_models.check(name, size, "auto")
    else:
        with pytest.raises(UserError, match=words):
            torchvision_models.check(name, size, "auto")


def test_every_name_is_known():
    every = torchvision.models.list_models(module=torchvision.models)
    assert len(every) >= 80 and all(options.make(target_model=name).target_model == name for name in every)


def stem(size: int, **more: str) -> tuple:
    net = build(options.make(target_model="resnet18", image_size=size, **more), 10)
    return net.conv1.kernel_size, net.conv1.stride, type(net.maxpool)


def test_stem():
    """Up to 64 pixels that of Mammoth's and DER's ResNet-18: 3x3, stride 1, no pooling."""
    cifar, imagenet = ((3, 3), (1, 1), nn.Identity), ((7, 7), (2, 2), nn.MaxPool2d)
    assert stem(32) == stem(64) == stem(224, stem="cifar") == cifar
    assert stem(65) == stem(32, stem="imagenet") == imagenet
    with pytest.raises(UserError, match="--stem cifar: only ResNets have one, and vgg11 is none"):
        torchvision_models.check("vgg11", 64, "cifar")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of two tasks of a network with dropout."""
    job = tmp_path_factory.mktemp("torchvision") / "run"
    train(tiny, job, target_model=WITH_DROPOUT, image_size=32, train_batch_size=16)
    return job


def test_two_tasks(run):
    """Everything but the image has at most 2^b codes; the first and the last layer have 8 bits."""
    found = read(run)
    codes = found["max_codes_per_tensor"]
    assert all(1 < entry["codes"] <= 2 ** entry["bits"] for entry in codes.values())
    layers = [n for n, m in torchvision.models.squeezenet1_1().named_modules() if isinstance(m, nn.Conv2d)]
    assert {n: codes[f"{n}.weight_quant"]["bits"] for n in layers} == {
        n: 8 if n in (layers[0], layers[-1]) else 4 for n in layers
    }
    assert found["config"]["penalty"] == "proxq" and found["memory_bytes"]["importance"] > 4 * 700_000


def test_resume(run, tiny, tmp_path, monkeypatch):
    """Killed in the second task and resumed: to the bit, though dropout draws at each step."""
    more = {"target_model": WITH_DROPOUT, "image_size": 32, "train_batch_size": 16, "checkpoint_seconds": 0}
    argv = arguments(settings(tiny, tmp_path / "run", **more))
    with monkeypatch.context() as patch:
        kill_at(patch, history, "step_sums", 4)
        with pytest.raises(Killed):
            command(argv)
    torch.manual_seed(1)  # another process has another state
    assert command([*argv, "--resume"]) == 0
    same(*(checkpoint.read(job / "model_best.pt", "model")["model"] for job in (run, tmp_path / "run")))
    same(read(run), read(tmp_path / "run"))


def test_no_linear_head(tiny, tmp_path, capsys):
    argv = arguments(settings(tiny, tmp_path / "run", target_model=WITH_DROPOUT, image_size=32, nme=True))
    assert run_main(command, argv) == 2
    assert "--nme: squeezenet1_1 has no linear layer that could be its head" in capsys.readouterr().err


def test_normalized_as_imagenet(run, tmp_path):
    """A torchvision network's input is what torchvision's own preset makes of the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    preset = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)
    expected = preset(torch.from_numpy(pixels).permute(2, 0, 1))
    torch.testing.assert_close(lifequant.load(run).preprocess(tmp_path / "image.png")[0], expected)


FORMS = {
    "plain.pth": lambda state: state,
    "ddp.pth": lambda state: {f"module.{k}": v for k, v in state.items()},
    "timm.pth": lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "reference.pth": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"state": {}}},
    "weights.safetensors": lambda state: state,
}


@pytest.mark.parametrize("form", [*FORMS, "legacy.pth"])
def test_weights_of_elsewhere(form, tmp_path):
    """1,000 classes, as torchvision writes them: all is taken over but the head, which is said."""
    torch.manual_seed(3)
    theirs = torchvision.models.shufflenet_v2_x0_5()
    if form.endswith(".safetensors"):
        save_file(theirs.state_dict(), tmp_path / form)
    elif form == "legacy.pth":
        torch.save(theirs.state_dict(), tmp_path / form, _use_new_zipfile_serialization=False)
    else:
        torch.save(FORMS[form](theirs.state_dict()), tmp_path / form)
    found = float_weights.read(tmp_path / form)
    assert not source.is_ours(found)
    config, said = options.make(target_model=SMALL, image_size=64), []
    tensors = float_weights.state_dict_in(found, form)
    state = float_weights.load_float(form, tensors, config, 10, said.append)
    assert said == [
        f"source {form}: its head has another number of classes, so this run's begins anew (fc.weight, fc.bias)"
    ]
    own = build_float(config, 10).state_dict()
    assert all(torch.equal(v, own[k] if k.startswith("fc.") else theirs.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("classes", [10, 4])
def test_a_head_of_another_name(classes):
    """The names of a well-known ResNet-20 for CIFAR-10: ``module.`` before all, and ``linear`` for the head."""
    config = options.make(method="original", bitW=32)
    theirs = build_float(config, 10).state_dict()
    tensors = float_weights.state_dict_in(
        {"best_prec1": 91.7, "state_dict": {"module." + n.replace("fc.", "linear."): v + 1 for n, v in theirs.items()}},
        "x",
    )
    state = float_weights.load_float("x", tensors, config, classes, print)
    assert torch.equal(state["fc.weight"], theirs["fc.weight"] + 1) == (classes == 10)
    assert torch.equal(state["layer3.2.conv2.weight"], theirs["layer3.2.conv2.weight"] + 1)
    with pytest.raises(UserError, match=r"projection\.weight is not in resnet20"):
        float_weights.load_float("x", {**tensors, "projection.weight": torch.ones(2, 2)}, config, 10, print)


def test_source_file(tiny, tmp_path, capsys):
    """From the command line; what does not fit is named, and nothing is left behind."""
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=6)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    flags = {"image_size": 32, "source_file": tmp_path / "theirs.pth", "lr": 1e-9, "num_tasks": 1, "bitW": 32}
    train(tiny, tmp_path / "run", target_model=SMALL, **flags)
    ours = dict(lifequant.load(tmp_path / "run").named_parameters())
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours[name], value.detach(), atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    argv = arguments(settings(tiny, tmp_path / "other", target_model=WITH_DROPOUT, **flags))
    assert run_main(command, argv) == 2
    err = capsys.readouterr().err
    assert "its weights do not fit squeezenet1_1: conv1.0.weight is not in squeezenet1_1; " in err
    assert err.count(";") == 2 and " more" in err and not (tmp_path / "other" / "config.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02 no pickle", "it is damaged, or no checkpoint at all"),
        (nn.Linear(1, 1), r"torch.save\(model.state_dict\(\), ...\) writes a file that can be read"),
        ({"epoch": 3}, "no state dict in it"),
        ([torch.zeros(1)], "no state dict in it"),
    ],
)
def test_no_weights(content, words, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=words):
        float_weights.state_dict_in(float_weights.read(file), file)


def test_packed_is_no_source(tmp_path):
    """A packed model of ours has codes in place of weights."""
    save_file({"features.0": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={MARK: "{}"})
    with pytest.raises(UserError, match="a packed model of LifeQuant's: give the run"):
        float_weights.read(tmp_path / "m.safetensors")


def test_stem_of_a_source(tmp_path):
    """ImageNet's first layer in a network with the small stem: the line says what to do."""
    state = torchvision.models.resnet18(num_classes=6).state_dict()
    with pytest.raises(UserError, match=r"conv1.weight is \[64, 3, 7, 7\], here \[64, 3, 3, 3\]; --stem imagenet has"):
        float_weights.load_float("r.pth", state, options.make(target_model="resnet18"), 6, print)


def test_positions():
    """A Vision Transformer's position embeddings are interpolated to the image size, as torchvision does it."""
    tensors = {"encoder.pos_embedding": torch.randn(1, 197, 768)}
    found = torchvision_models.fitted_positions(
        "vit_b_16", 64, tensors, {"encoder.pos_embedding": torch.empty(1, 17, 768)}
    )
    old = tensors["encoder.pos_embedding"][:, 1:].mT.reshape(1, 768, 14, 14)
    new = nn.functional.interpolate(old, size=4, mode="bicubic", align_corners=True).reshape(1, 768, 16).mT
    torch.testing.assert_close(found["encoder.pos_embedding"][:, 1:], new)


def test_download(tiny, tmp_path, monkeypatch, capsys):
    """Weights that torchvision downloads; where there is no network, the line names the file to bring."""
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, *args, **more: state)
    flags = {"target_model": SMALL, "image_size": 32, "num_tasks": 1, "source_weights": "DEFAULT"}
    train(tiny, tmp_path / "run", **flags)
    assert "this run's begins anew (fc.weight, fc.bias)" in capsys.readouterr().out

    def no_network(*args, **more):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    assert run_main(command, arguments(settings(tiny, tmp_path / "other", **flags))) == 2
    err = capsys.readouterr().err
    assert "bring the file https://download.pytorch.org/models/shufflenetv2_x0.5-" in err and "--source_file" in err


def test_nothing_to_quantize(tiny, tmp_path, monkeypatch, capsys):
    """A network of another package that has torch's own layers alone."""
    registry.names("model")
    monkeypatch.setitem(registry._registered["model"], "float", lambda classes, scheme, shortcut: nn.Flatten())
    assert run_main(command, arguments(settings(tiny, tmp_path / "run", target_model="float"))) == 2
    assert "--target_model float: it has no layer of the scheme" in capsys.readouterr().err


def small_transformer() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.encoder.layers[0].self_attention.in_proj_bias)
    q = quantize_model(model, "lsq")
    calibrate(q, torch.randn(16, 3, 16, 16))
    return q.eval()


def test_importances_of_attention():
    """Mean squared gradients of one image at a time, by plain autograd, of all quantized weights but the head's."""
    net = at_quantized_weights(small_transformer())
    x, y = torch.randn(CHUNK + 3, 3, 16, 16), torch.arange(CHUNK + 3) % 3
    names = [w.name for w in body_weights(net)]
    layer = "encoder.layers.encoder_layer_0"
    assert names == ["conv_proj", f"{layer}.self_attention.in_proj_weight", f"{layer}.self_attention.out_proj",
                     f"{layer}.mlp.0", f"{layer}.mlp.3"]  # fmt: skip
    tensors = [w.tensor for w in body_weights(net)]
    expected = [torch.zeros_like(t) for t in tensors]
    for i in range(len(x)):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), tensors)
        expected = [e + g.square() / len(x) for e, g in zip(expected, gradients, strict=True)]
    for found, value in zip(per_sample(net, [(x, y)]).values(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-9)


def test_chunks(monkeypatch):
    """Of a large network fewer images' gradients are held at a time; the mean is the same."""
    net = at_quantized_weights(small_transformer())
    data = [(torch.randn(9, 3, 16, 16), torch.arange(9) % 3)]
    whole = per_sample(net, data)
    monkeypatch.setattr("lifequant.methods.importance.MOST_GRADIENTS", 10_000)  # of 3,300 weights: three images
    for found, value in zip(per_sample(net, data).values(), whole.values(), strict=True):
        torch.testing.assert_close(found, value)


def test_penalty_holds_attention():
    """ProxQ's anchor has the projections of attention, as integer codes and a scale."""
    model = small_transformer()
    held = penalty("proxq")(options.make(penalty="proxq"))
    values = held.values(model)
    key = next(name for name in values if name.endswith("in_proj_weight"))
    codes, scale = held.anchors(model)[key]
    assert codes.dtype == torch.int8 and torch.equal(codes * scale, values[key])
    module = model.encoder.layers[0].self_attention
    assert torch.equal(values[key], module.weight_quant(module.in_proj_weight))
