"""Fill and continue videos of a bouncing ball

A Kalman variational auto-encoder (`KVAE`) turns each frame into a point in the plane, and moves the point by linear
dynamics, mixed anew in every step. Given the points, its filter and smoother are exact.
"""

# %%
# The videos are simulated on first use (`pip install dynavae[video]`). What the simulation knows stays aside.
# A small model and a short training, so that this page is made in a minute or two; the preset `kvae-box` takes all 5000
# videos.

import matplotlib.pyplot as plt
import torch

import dynavae
from dynavae.data import load, true_states

torch.manual_seed(0)
box = load("box", train=1500, valid=100, test=200)
model = dynavae.KVAE(
    x_dim=1024, layers=(128, 64), h_dim=64, mixtures=5, offsets=True, learn_noise=True, emission="bernoulli"
)
result = dynavae.fit(
    model,
    box.train,
    box.valid,
    epochs=16,
    batch_size=32,
    lr=0.005,
    lr_schedule="cosine",
    gradient_clip=150,
    beta=3.33,  # the weight 0.3 of the reconstruction in the paper
    kl_start=0.1,
    kl_warmup=1.5,
    progress=False,
)
print(result)

# %%
# Twelve of twenty frames are hidden. The filter knows what came before, the smoother also what comes after; the last row
# saw four frames and nothing else.

video = box.test.batch([1])
gap, rest = torch.zeros(1, 20, 1024, dtype=torch.bool), torch.zeros(1, 20, 1024, dtype=torch.bool)
gap[:, 4:16] = True
rest[:, 4:] = True
across, onward = model.states(video.hide(gap)), model.states(video.hide(rest))
rows = {
    "true": video.x,
    "filtered": model.decoded(across.filtered_a),
    "smoothed": model.decoded(across.smoothed_a),
    "generated": model.decoded(onward.filtered_a),
}
figure, axes = plt.subplots(4, 1, figsize=(10, 2.9))
for axis, (name, frames) in zip(axes, rows.items(), strict=True):
    strip = torch.nn.functional.pad(frames[0].reshape(20, 32, 32), (0, 4), value=0.6)
    axis.imshow(strip.permute(1, 0, 2).reshape(32, -1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(name, loc="left", fontsize=8)
    axis.axis("off")
    axis.axvline(4 * 36 - 2.5, color="tab:orange")
    axis.axvline(16 * 36 - 2.5, color="tab:orange")
plt.show()

# %%
# Over all test videos: how many pixels are wrong in the gap? Against straight lines between the points around it, which
# know nothing of walls.

test = box.test.batch()
gap = gap.expand(len(test), -1, -1)
hidden = gap[..., 0]
points, filled = model.states(test).a, model.states(test.hide(gap)).smoothed_a
share = torch.linspace(0, 1, 14)[1:-1].unsqueeze(-1)
straight = points.clone()
straight[:, 4:16] = (1 - share) * points[:, 3:4] + share * points[:, 16:17]
for name, a in (("straight lines", straight), ("smoother", filled)):
    wrong = (model.decoded(a) > 0.5) != (test.x > 0.5)
    print(f"{name:15} {wrong[hidden].double().mean():.2%} of the pixels are wrong")

# %%
# The points are the true positions, but for a linear map: no one told the model that there is a plane with a ball in it. It
# started from the slow features of the frames, which unfold that plane. Then the weights of the five dynamics, over the true
# position.

states = model.states(test)
a, truth = states.a.flatten(0, 1), torch.from_numpy(true_states(box)[..., :2]).flatten(0, 1)
inputs = torch.cat([a, torch.ones(len(a), 1)], 1)
fitted = inputs @ torch.linalg.lstsq(inputs, truth).solution
r2 = 1 - (truth - fitted).square().sum() / (truth - truth.mean(0)).square().sum()
print(f"R² of a linear map from a_t to the true position: {r2:.3f}")

figure, axes = plt.subplots(1, 6, figsize=(12, 2.4), sharex=True, sharey=True)
axes[0].scatter(*truth.T, s=1, c=fitted[:, 0], cmap="viridis")
axes[0].set_title("first coordinate, from a_t")
for k, axis in enumerate(axes[1:]):
    axis.scatter(*truth.T, s=1, c=states.weights[..., k].flatten(), cmap="viridis", vmin=0, vmax=1)
    axis.set_title(f"weight of dynamics {k + 1}")
for axis in axes:
    axis.set(xlabel="true x", aspect="equal")
axes[0].set_ylabel("true y")
plt.show()
