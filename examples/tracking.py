"""Filter, smooth and forecast a noisy track

A target moves in a plane; a sensor measures its position with noise and is silent for a while. The linear-Gaussian
state-space model (`LGSSM`) is exact here: its filter is Kalman's, its smoother that of Rauch, Tung and Striebel.
"""

# %%
# The state is position and velocity, so the physics is a matrix. `set_moments` writes it into the model; nothing is
# trained.

import matplotlib.pyplot as plt
import torch

import dynavae

torch.manual_seed(0)
still, noise = 0.02, 0.4  # stddev of the acceleration per step, and of the sensor
eye, zero = torch.eye(2), torch.zeros(2, 2)
A = torch.cat([torch.cat([eye, eye], 1), torch.cat([zero, eye], 1)])
Q = still**2 * torch.cat([torch.cat([eye / 3, eye / 2], 1), torch.cat([eye / 2, eye], 1)])
C = torch.cat([eye, zero], 1)
physics = dynavae.LGSSM(x_dim=2, z_dim=4, noise="diagonal")
physics.set_moments(A=A, Q=Q, C=C, R=noise**2 * eye, P0=torch.diag(torch.tensor([1.0, 1.0, 0.02, 0.02])))

drawn = dynavae.generate(physics, batch=1, length=120, seed=3)
truth, sensor = drawn.z[0, :, :2], drawn.x[0].clone()
sensor[45:65] = float("nan")  # silent
seen = sensor[:100]  # the rest is the future

# %%
# One call each. A gap needs no special treatment: NaN is missing.

belief = dynavae.filter(physics, [seen])  # p(z_t | x_1:t)
smoothed = dynavae.smooth(physics, [seen])  # p(z_t | x_1:T)
future = dynavae.forecast(physics, [seen], horizon=20, samples=500)

figure, (plane, axis) = plt.subplots(1, 2, figsize=(10, 3.8))
plane.plot(*truth.T, color="black", linewidth=1, label="truth")
plane.plot(*seen.T, ".", color="0.6", markersize=4, label="sensor")
plane.plot(*belief.mean[0, :, :2].T, color="tab:orange", linewidth=1.2, label="filter")
plane.plot(*smoothed.mean[0, :, :2].T, color="tab:blue", linewidth=1.8, label="smoother")
plane.plot(*future.mean[0].T, color="tab:green", linewidth=1.8, label="forecast")
plane.set(xlabel="first coordinate", ylabel="second coordinate", title="the plane")
plane.legend(frameon=False)

t = torch.arange(120)
for latents, colour, name in ((belief, "tab:orange", "filter"), (smoothed, "tab:blue", "smoother")):
    mean, band = latents.mean[0, :, 0], 2 * latents.stddev[0, :, 0]
    axis.fill_between(t[:100], mean - band, mean + band, color=colour, alpha=0.25, linewidth=0)
    axis.plot(t[:100], mean, color=colour, linewidth=1.2, label=f"{name}, ± 2 stddev")
low, high = future.quantile(0.05)[0, :, 0], future.quantile(0.95)[0, :, 0]
axis.fill_between(t[100:], low, high, color="tab:green", alpha=0.25, linewidth=0)
axis.plot(t[100:], future.mean[0, :, 0], color="tab:green", label="forecast of the sensor, 90 %")
axis.plot(t, truth[:, 0], color="black", linewidth=1)
axis.plot(t[:100], seen[:, 0], ".", color="0.6", markersize=4)
axis.set(xlabel="frame", title="the first coordinate in time")
axis.legend(frameon=False)
plt.show()

# %%
# The smoother knows what came after the gap, the filter does not: within the gap its band grows until the sensor comes
# back. How good are they?

gap = torch.zeros(100, dtype=torch.bool)
gap[45:65] = True
for name, estimate in (
    ("sensor", seen),
    ("filter", belief.mean[0, :, :2]),
    ("smoother", smoothed.mean[0, :, :2]),
):
    distance = (estimate - truth[:100]).norm(dim=-1)
    outside, inside = (distance[where].square().mean().sqrt() for where in (~gap, gap))
    print(f"root mean squared distance from the truth, {name:8}: {outside:.2f}; in the gap {inside:.2f}")
within = (belief.mean[0, gap, :2] - truth[:100][gap]).abs() < 2 * belief.stddev[0, gap, :2]
print(f"{within.float().mean():.0%} of the true coordinates in the gap are within 2 stddev of the filter")
