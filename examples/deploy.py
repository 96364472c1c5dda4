"""Classify one image by an exported model, without torch and without LifeQuant: needs numpy, Pillow and onnxruntime.

python examples/deploy.py MODEL.onnx IMAGE.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels(path: str, size: int, resize: int) -> np.ndarray:
    """uint8 [1, 3, size, size]: the middle of the image, its shorter side scaled to ``resize``, as the run's evaluation."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # 16 bits of gray must become 8 before
    side = min(image.size)
    if resize != size:  # of --augment reference: torchvision's Resize and CenterCrop
        image = image.resize(tuple(resize * length // side for length in image.size), Image.Resampling.BILINEAR)
        left, top = (round((length - size) / 2) for length in image.size)
        return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)[None]
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)[None]


def main(model: str, path: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    class_names, size = json.loads(metadata["class_names"]), session.get_inputs()[0].shape[-1]
    images = pixels(path, size, int(metadata.get("resize", size)))
    (logits,) = session.run(["logits"], {"images": images})  # the model normalizes the pixels itself
    shares = np.exp(logits[0] - logits[0].max())
    shares /= shares.sum()
    for label in np.argsort(-shares)[:5]:
        print(f"{100 * shares[label]:5.1f} %  {class_names[label]}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
