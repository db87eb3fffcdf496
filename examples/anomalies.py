"""Anomalies as they happen

A stream takes frames one at a time and says of each how surprising it was, before it learns from it. The model has seen
normal recordings only.
"""

# %%
# Two coordinates of a rotating machine. Normal recordings differ in speed and phase.

import matplotlib.pyplot as plt
import torch

import dynavae

torch.manual_seed(0)
t = torch.arange(160.0)


def recordings(n: int) -> torch.Tensor:
    angle = 2 * torch.pi * torch.rand(n, 1) + t * torch.empty(n, 1).uniform_(0.15, 0.25)
    return torch.stack([angle.sin(), angle.cos()], -1) + 0.1 * torch.randn(n, len(t), 2)


normal = recordings(96)
model = dynavae.VRNN(x_dim=2, z_dim=4, h_dim=32)
dynavae.fit(model, normal[:64], normal[64:], epochs=15, lr=0.01, batch_size=16, progress=False)

# %%
# The threshold is a quantile of the scores of normal recordings which were not trained on, from their tenth frame on:
# before, the model knows neither speed nor phase. `step` takes one frame of each sequence. A density has units, so no
# threshold can be right a priori.


def scores(x: torch.Tensor) -> torch.Tensor:
    stream = model.stream(batch=len(x), particles=64, seed=0)
    return torch.stack([stream.step(x_t).score for x_t in x.unbind(1)], 1)


threshold = scores(recordings(50))[:, 10:].quantile(0.999)

machine = recordings(1)
machine[:, 40:50] = float("nan")  # silence is no anomaly
machine[:, 70, 0] = float("nan")  # nor is a lost coordinate
machine[:, 90] += 1.5  # a spike
machine[:, 120:] = machine[:, 120:121] + 0.1 * torch.randn(1, 40, 2)  # it stands still
stream = model.stream(batch=1, particles=64, seed=1)
low, high, score = [], [], []
for x_t in machine.unbind(1):
    now = stream.step(x_t)
    low.append(now.predicted.quantile(0.05)[0])
    high.append(now.predicted.quantile(0.95)[0])
    score.append(now.score[0])
low, high, score = torch.stack(low), torch.stack(high), torch.stack(score)

figure, axes = plt.subplots(3, 1, figsize=(10, 5.4), sharex=True)
for dim, axis in enumerate(axes[:2]):
    axis.fill_between(
        t, low[:, dim], high[:, dim], color="tab:blue", alpha=0.3, linewidth=0, label="expected, 90 %"
    )
    axis.plot(t, machine[0, :, dim], ".-", color="black", linewidth=0.7, markersize=3, label="seen")
    axis.set(ylabel=f"x {dim}", ylim=(-2.4, 2.9))
axes[0].legend(frameon=False, ncol=2, loc="upper left")
alarm = (score > threshold) & (t >= 10)
axes[2].plot(t, score, color="0.4", linewidth=1)
axes[2].plot(t[alarm], score[alarm], "o", color="tab:red", markersize=4, label="alarm")
axes[2].axhline(threshold, color="tab:red", linestyle="--", linewidth=1, label="99.9 % of normal scores")
axes[2].set(ylabel="nats per coordinate", xlabel="frame", yscale="symlog", ylim=(-3, 200))
axes[2].legend(frameon=False, loc="upper left")
plt.show()

first = alarm[120:].nonzero().min()
print(
    f"spike at 90: {'alarm' if alarm[90] else 'missed'}; stands still at 120: first alarm {first} frames later"
)
print(f"alarms in normal operation: {int(alarm[10:90].sum())} of {int((~score[10:90].isnan()).sum())} frames")
