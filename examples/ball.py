"""A ball in flight: filter, smooth, fill a gap, predict

The worked example of every lecture on the Kalman filter. The state is position and velocity, gravity is a known input, and a
camera sees the position with noise; for a while, something is in its way.
"""

# %%
# The physics is a matrix: $x_t = x_{t-1} + \Delta\, \dot x_{t-1}$, and gravity as control, which adds $-\frac12 g \Delta^2$
# to the height and $-g \Delta$ to its velocity.

import matplotlib.pyplot as plt
import torch

import dynavae

torch.manual_seed(0)
step, g = 0.05, 9.81
A = [[1.0, step, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, step], [0.0, 0.0, 0.0, 1.0]]
B = [[0.0], [0.0], [-0.5 * step**2], [-step]]
C = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
push, noise = 0.03, 0.25  # stddev of what the air does to the velocity in a step, and of the camera
physics = dynavae.LGSSM(x_dim=2, z_dim=4, control_dim=1, noise="diagonal").double()
physics.set_moments(
    m0=[0.0, 6.0, 1.0, 9.0],
    P0=torch.diag(torch.tensor([0.1, 1.0, 0.1, 1.0]) ** 2),
    A=A,
    B=B,
    C=C,
    D=torch.zeros(2, 1),
    Q=torch.diag(torch.tensor([0.1, 1.0, 0.1, 1.0]) * push) ** 2,
    R=noise**2 * torch.eye(2),
)
frames, seen, gap = 40, 30, slice(10, 18)
gravity = torch.full((1, frames, 1), g, dtype=torch.float64)
flight = dynavae.generate(physics, batch=1, length=frames, control=gravity, seed=8)
truth, camera = flight.z[0][:, [0, 2]], flight.x.clone()[:, :seen]
camera[0, gap] = float("nan")
data = dynavae.Sequences.from_arrays(camera, control=gravity[:, :seen])

# %%
# A missing frame is NaN. The filter knows the past, the smoother both sides; the forecast goes on without the camera.

filtered = dynavae.filter(physics, data)
smoothed = dynavae.smooth(physics, data)
filled = dynavae.impute(physics, data, samples=500)
future = dynavae.forecast(physics, data, horizon=frames - seen, samples=500, control=gravity)

figure, axis = plt.subplots(figsize=(9, 3.4))
axis.plot(*truth.T, color="black", linewidth=1.2, label="true path")
axis.plot(*camera[0].T, ".", color="0.55", markersize=6, label="camera")
axis.plot(*filtered.mean[0][:, [0, 2]].T, color="tab:orange", linewidth=1.2, label="filtered")
axis.plot(*smoothed.mean[0][:, [0, 2]].T, color="tab:blue", linewidth=2, label="smoothed")
paths = filled.samples[:30, 0, gap]
axis.plot(paths[..., 0].T, paths[..., 1].T, ".", color="tab:blue", markersize=2, alpha=0.35)
axis.plot([], [], ".", color="tab:blue", markersize=4, label="imputed camera values")
axis.plot(*future.mean[0].T, color="tab:green", linewidth=2, label="predicted")
low, high = future.quantile(0.05)[0], future.quantile(0.95)[0]
axis.fill_between(future.mean[0, :, 0], low[:, 1], high[:, 1], color="tab:green", alpha=0.2, linewidth=0)
axis.plot([], [], color="tab:green", alpha=0.2, linewidth=8, label="90 % of the camera's next values")
axis.set(xlabel="distance, m", ylabel="height, m", aspect="equal")
axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
# How far from the true path, and does the band hold?

hidden = torch.zeros(seen, dtype=torch.bool)
hidden[gap] = True
for name, estimate in (
    ("camera", camera[0]),
    ("filtered", filtered.mean[0][:, [0, 2]]),
    ("smoothed", smoothed.mean[0][:, [0, 2]]),
):
    distance = (estimate - truth[:seen]).norm(dim=-1)
    outside, inside = (distance[where].square().mean().sqrt() for where in (~hidden, hidden))
    there = "" if name == "camera" else f", {inside:.2f} m in the gap"
    print(f"{name:8}: {outside:.2f} m off where the camera saw{there}")
inside = (flight.x[0, seen:] >= low) & (flight.x[0, seen:] <= high)
print(f"{inside.double().mean():.0%} of the camera's next values are in the band of 90 %")

# %%
# Without the physics: EM finds a transition, an effect of the control and the noise from other flights, four states and all.
# The camera's values to come are predicted about as well.

flights = dynavae.generate(physics, batch=60, length=frames, control=gravity.expand(60, -1, -1), seed=3)
others = dynavae.Sequences.from_arrays(flights.x, control=gravity.expand(60, -1, -1))
learned = dynavae.LGSSM(x_dim=2, z_dim=4, control_dim=1, noise="diagonal", start="data").double()
result = dynavae.fit_em(learned, others, iterations=60, progress=False)
print(result)
fresh = dynavae.generate(physics, batch=40, length=frames, control=gravity.expand(40, -1, -1), seed=4)
test = dynavae.Sequences.from_arrays(fresh.x, control=gravity.expand(40, -1, -1))
for name, model in (("physics", physics), ("learned by EM", learned)):
    ahead = dynavae.forecast(model, test, horizon=10, context=30, samples=50)
    error = (ahead.mean - fresh.x[:, 30:]).square().mean().sqrt()
    nats = dynavae.score(model, test, bound="exact").nats_per_frame
    print(f"{name:13}: {nats:.3f} nats per frame; forecasts {error:.2f} m off")
