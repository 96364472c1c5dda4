"""Three steps of a quantized model under torchrun (gloo, CPU): DistributedDataParallel, or FSDP2's sharded parameters."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lifequant import calibrate, quantize_model
from lifequant.qat.scales import param_groups


class Net(nn.Module):
    """A transposed convolution, an encoder layer whose attention no trace shows, and a head of five outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.up = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.relu(self.conv(x)))
        return self.fc(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return quantize_model(Net(), per_channel=True).eval()


def main(kind: str) -> None:
    """Each process takes half of the batch. One process alone averages the gradients of both halves."""
    dist.init_process_group("gloo")
    q, x = network(), torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(q, x)
    alone, own = copy.deepcopy(q), x.chunk(2)[dist.get_rank()]
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for part in (q.up, q.encoder):
            fully_shard(part, mesh=mesh)
        net = fully_shard(q, mesh=mesh)
    else:
        net = nn.parallel.DistributedDataParallel(q)
    optimizers = [torch.optim.SGD(param_groups(model, lr=0.1), momentum=0.9) for model in (q, alone)]
    losses = (lambda: net(own).square().mean(), lambda: sum(alone(part).square().mean() for part in x.chunk(2)) / 2)
    for _ in range(3):
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    state = get_model_state_dict(q, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        again, before = network(), network().state_dict()
        again.load_state_dict(state)
        expected = alone.state_dict()
        torch.testing.assert_close({name: state[name] for name in expected}, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(again(x), alone(x), rtol=1e-3, atol=1e-4)
        moved = [name for name, p in again.named_parameters() if not torch.equal(p, before[name])]
        print("moved", len(moved), "of", len(list(again.parameters())))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
