"""Regimes: the states of a hidden Markov model

A series that switches between calm, trend and turmoil. An `HMM` finds the regimes without labels; filter, smoother and
Viterbi path are exact.
"""

# %%
# Three regimes, each with its mean and spread, that change rarely. Two recordings have a gap.

import matplotlib.pyplot as plt
import torch

import dynavae

generator = torch.Generator().manual_seed(0)
mean, spread = torch.tensor([0.0, 1.2, -0.5]), torch.tensor([0.25, 0.4, 1.2])
stay = 0.97


def recording(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    state, states = 0, []
    for _ in range(length):
        if torch.rand((), generator=generator) > stay:
            state = (state + int(torch.randint(1, 3, (), generator=generator))) % 3
        states.append(state)
    s = torch.tensor(states)
    return s, (mean[s] + spread[s] * torch.randn(length, generator=generator)).unsqueeze(-1)


pairs = [recording(200) for _ in range(48)]
x = [values.clone() for _, values in pairs]
x[-1][90:110] = x[-2][30:50] = float("nan")

torch.manual_seed(1)
model = dynavae.HMM(x_dim=1, states=3, emission={"emission": "gaussian", "scale": "learned"}, sticky=3.0)
result = dynavae.fit(model, x[:40], x[40:], epochs=25, lr=0.1, batch_size=16, progress=False)
print(dynavae.score(model, x[40:], bound="exact"))

# %%
# The order of the states is arbitrary: here they are sorted by their spread. Filtering uses the past only, so it hesitates
# at the switches; smoothing has seen both sides.

p_x = model.p_x(torch.eye(3))
order = p_x.stddev.flatten().argsort()
filtered = dynavae.filter(model, [x[-1]]).mean[0][:, order]
smoothed = dynavae.smooth(model, [x[-1]]).mean[0][:, order]
path = model.most_probable_path(dynavae.Sequences.from_arrays([x[-1]]))[0]
true = pairs[-1][0]

figure, axes = plt.subplots(3, 1, figsize=(10, 5.4), sharex=True)
colours = ["tab:blue", "tab:orange", "tab:red"]
axes[0].plot(x[-1], ".-", color="black", linewidth=0.7, markersize=3)
axes[0].set(ylabel="x")
for axis, probability, name in ((axes[1], filtered, "filter"), (axes[2], smoothed, "smoother")):
    axis.stackplot(range(200), probability.T.detach(), colors=colours, alpha=0.75, linewidth=0)
    axis.set(ylabel=name, ylim=(0, 1.12), yticks=[0, 1])
    for k in range(3):
        axis.fill_between(range(200), 1.04, 1.12, where=true == k, color=colours[k], linewidth=0, step="mid")
axes[2].set(xlim=(0, 199), xlabel="frame; the strip above each panel is the true regime")
plt.show()

# %%

rank = order.argsort()
right = (rank[path] == true).float().mean()
print(f"the Viterbi path names the true regime in {right:.0%} of the frames")
print(
    "stays:",
    [round(float(v), 3) for v in model.log_transition.detach().exp().diagonal()[order]],
    f"; true {stay}",
)
