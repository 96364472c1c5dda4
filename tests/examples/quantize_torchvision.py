"""torchvision's models at 4 bits in a plain training loop: python quantize_torchvision.py [model ...]"""

import sys
import warnings

import torch
import torch.nn.functional as F
from torchvision.models import get_model

from lifequant import calibrate, quantize_model
from lifequant.qat.scales import Scales, param_groups

MODELS = ["resnet18", "mobilenet_v2", "vgg11_bn", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0"]

warnings.simplefilter("ignore")  # calibrate() says what it could not reach; the table below has it, too
torch.manual_seed(0)
images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))  # a batch of yours

for name in sys.argv[1:] or MODELS:
    model = get_model(name, num_classes=10)  # with weights: before or after quantize_model, its state dict fits both
    q = quantize_model(model, quantizer="proxq", weight_bits=4, act_bits=4, first_last_bits=8)
    calibrate(q, [(images, labels)])  # a DataLoader: the first batches are read
    optimizer = torch.optim.SGD(param_groups(q, lr=0.01, weight_decay=1e-4), momentum=0.9)
    steps = Scales(q)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(q(images), labels)
        optimizer.zero_grad()
        loss.backward()
        with steps.limit_scale_updates():
            optimizer.step()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", q.quantization, sep="\n")
