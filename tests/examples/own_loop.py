"""Lifelong methods on a network and in a training loop of your own: two tasks of four classes each, one head.

Prints, for no protection, EWC and ours (ProxQ, BaLL and replay), the accuracy of the first task after the second.
"""

import warnings

import torch
from torch import nn

from lifequant import calibrate, options, quantize_model, registry
from lifequant.data.replay import epoch_order
from lifequant.data.task import Batch, user_task
from lifequant.qat.scales import Scales, param_groups

warnings.simplefilter("ignore")
SIZE, EPOCHS, LR = 32, 6, 0.02
noise = torch.Generator().manual_seed(0)
patterns = torch.randn(8, 3, 8, 8, generator=noise)  # of each class


def images_of(classes, count):
    y = torch.tensor(classes).repeat(count)
    return patterns[y] + 2 * torch.randn(len(y), 3, 8, 8, generator=noise), y


training = [images_of([0, 1, 2, 3], 64), images_of([4, 5, 6, 7], 64)]
test = images_of([0, 1, 2, 3], 200)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 8),
    )  # fmt: skip


def learn(config):
    drawn = torch.Generator().manual_seed(0)
    q = quantize_model(network(), config.quantizer, weight_bits=config.bitW, act_bits=config.abitW)
    calibrate(q, training[0][0].split(64))
    method = registry.method(config.method)(config)
    guard = registry.penalty(config.penalty)(config) if config.penalty != "none" else method
    callbacks = [method] if guard is method else [method, guard]
    replay_x, replay_y, past_y = None, None, None
    for t, (x, y) in enumerate(training):
        task = user_task(t, x, y, replay_x, replay_y, past_y, num_classes=8, batch_size=SIZE)
        optimizer = torch.optim.SGD(param_groups(q, LR), momentum=0.9)
        steps = Scales(q)
        for callback in callbacks:
            callback.begin_task(q, task)
        q.train()
        for _ in range(EPOCHS):
            order = epoch_order(task.labels[task.pool], task.counts, config.sampler, drawn)
            for places in order.split(SIZE):
                rows = task.pool[places]
                batch = Batch(*task.batch(rows), is_replay=places >= len(task.new_rows), rows=rows)
                logits = q(batch.x)
                penalty = guard.penalty(q) + guard.output_penalty(logits, batch)
                loss = method.task_loss(logits, batch) + config.ll_lambda * penalty
                optimizer.zero_grad()
                loss.backward()
                for callback in callbacks:
                    callback.after_backward(q)
                with steps.limit_scale_updates():
                    optimizer.step()
                for callback in callbacks:
                    callback.after_step(q, 1.0)
        for callback in callbacks:
            callback.end_task(q, task)
        if config.replay_rate != 0:  # the method replays: a fifth of the images is stored
            replay_x, replay_y, past_y = x[::5], y[::5], y
    return q


for name, settings in {
    "original": {"method": "original"},
    "ewc": {"method": "ewc", "ll_lambda": 10000},
    "ours": {"method": "ours"},
}.items():
    q = learn(options.make(**settings))
    with torch.no_grad():
        logits = q.eval()(test[0])
    right = 100 * (logits.argmax(1) == test[1]).double().mean()
    among = 100 * (logits[:, :4].argmax(1) == test[1]).double().mean()
    print(f"{name}: first task {right:.1f} %, {among:.1f} % among its own classes")
