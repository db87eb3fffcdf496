"""Levels, trends and seasons of classic series

A structural time series is a sum of components that walk: a level, a slope, a season, the effect of an input. As a
state-space model its likelihood is exact, with gaps; its variances are fitted by EM, by gradient, or by both in turn.
"""

# %%
# The flow of the Nile, in 10^9 cubic metres a year: a level in noise. EM climbs steadily to where the gradient arrives too.

import matplotlib.pyplot as plt
import torch

import dynavae
from dynavae.data import load_classic
from dynavae.exact.structural import level, seasonal, trend

nile = load_classic("nile")
years, flow = [int(t) for t in nile.times], nile.x / 10


def local_level() -> dynavae.LGSSM:
    return dynavae.structural_model(level(), initial_variance=1e6, start=50.0).double()


by_em, by_gradient = local_level(), local_level()
em = dynavae.fit_em(by_em, flow, iterations=150, tolerance=1e-7, progress=False)
descent = dynavae.fit(
    by_gradient, flow, objective="exact", epochs=150, lr=0.5, lr_schedule="cosine", progress=False
)

for name, model in (("EM", by_em), ("gradient", by_gradient)):
    p = model.parameters_in_moments
    total = float(model.exact_log_likelihood(dynavae.Sequences.from_arrays(flow)).detach())
    print(
        f"{name:8}: log p(x) = {total:.4f}, variances of the level {p.Q.item():.2f}, of the noise {p.R.item():.1f}"
    )

smoothed = dynavae.smooth(by_em, flow)
figure, (axis, curve) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2))
mean, band = smoothed.mean[0, :, 0], 1.64 * smoothed.stddev[0, :, 0]
axis.plot(years, flow[0, :, 0], ".-", color="0.6", linewidth=0.6, markersize=4, label="flow")
axis.fill_between(years, mean - band, mean + band, color="tab:blue", alpha=0.25, linewidth=0)
axis.plot(years, mean, color="tab:blue", label="level, 90 %")
axis.set(title="the Nile at Aswan", ylabel="10^9 m³ a year")
axis.legend(frameon=False)
for name, history in (("EM", em.history), ("gradient", descent.history)):
    curve.plot([-row["train/nats_per_frame"] for row in history], label=name)
curve.set(title="log p(x) per year", xlabel="iteration")
curve.legend(frameon=False)
plt.show()

# %%
# Carbon dioxide on Mauna Loa, monthly, with months missing at the start: a trend and a season of twelve months. The model
# reads the first 25 years, fills their gaps, and forecasts ten more, which are known. The slope's variance is so small that
# EM would crawl: it starts, and quasi-Newton steps on log p(x) finish (`polish`).

co2, seen, horizon = load_classic("co2"), 298, 120
values = co2.x[:, :seen] - 330
model = dynavae.structural_model(trend(), seasonal(12), initial_variance=1e4, start=0.05).double()
dynavae.fit_em(model, values, iterations=20, polish=200, progress=False)
print(
    "variances of level, slope, season:",
    [f"{v:.2g}" for v in model.parameters_in_moments.Q.diagonal()[:3].tolist()],
)
smoothed = dynavae.smooth(model, values)
future = dynavae.forecast(model, values, horizon=horizon, samples=200)
filled = dynavae.impute(model, values, samples=200)

t = 1958 + (2 + torch.arange(seen + horizon)) / 12
figure, (whole, start, season) = plt.subplots(1, 3, figsize=(11, 3.4))
whole.plot(t, co2.x[0, : seen + horizon, 0], color="0.5", linewidth=0.7, label="monthly mean")
whole.plot(t[:seen], smoothed.mean[0, :, 0] + 330, color="tab:blue", linewidth=1, label="level")
low, high = (future.quantile(q)[0, :, 0] + 330 for q in (0.05, 0.95))
whole.fill_between(t[seen:], low, high, color="tab:green", alpha=0.3, linewidth=0, label="forecast, 90 %")
whole.plot(t[seen:], future.mean[0, :, 0] + 330, color="tab:green", linewidth=0.7)
whole.set(title="carbon dioxide, ppm")
whole.legend(frameon=False)
first = slice(0, 90)
missing = values[0, first, 0].isnan()
middle, low, high = (v[0, first, 0] + 330 for v in (filled.x, filled.quantile(0.05), filled.quantile(0.95)))
start.plot(t[first], values[0, first, 0] + 330, ".-", color="0.5", linewidth=0.7, markersize=3)
bars = torch.stack([middle - low, high - middle])[:, missing]
start.errorbar(t[first][missing], middle[missing], yerr=bars, fmt=".", color="tab:red", label="imputed, 90 %")
start.set(title="the first years")
start.legend(frameon=False)
for year, colour in ((1960, "tab:cyan"), (1980, "tab:purple")):
    january = (year - 1958) * 12 - 2
    effect, stddev = (v[0, january : january + 12, 2] for v in (smoothed.mean, smoothed.stddev))
    season.errorbar(
        range(1, 13), effect, yerr=1.64 * stddev, fmt=".-", color=colour, linewidth=1, label=str(year)
    )
season.set(title="the season, 90 %", xlabel="month")
season.legend(frameon=False)
plt.show()
inside = (co2.x[0, seen : seen + horizon, 0] - 330 >= future.quantile(0.05)[0, :, 0]) & (
    co2.x[0, seen : seen + horizon, 0] - 330 <= future.quantile(0.95)[0, :, 0]
)
print(f"{inside.double().mean():.0%} of the ten years to come are within the band of 90 %")

# %%
# Two more, where their files are at hand (see {func}`dynavae.data.load_classic`): airline passengers, in logarithms,
# forecast from what was known two years before the end; and road casualties, where the seat-belt law is an input whose
# effect is estimated along with level and season.

try:
    airline, belts = load_classic("airline"), load_classic("seatbelts")
except FileNotFoundError as error:
    print(error)
else:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    x, n = airline.x.log(), airline.x.shape[1]
    model = dynavae.structural_model(
        trend(None, 0.0), seasonal(12), initial_variance=100.0, start=0.01
    ).double()
    dynavae.fit_em(model, x[:, :-24], iterations=20, polish=200, progress=False)
    future = dynavae.forecast(model, x[:, :-24], horizon=24, samples=500)
    t = 1949 + torch.arange(n) / 12
    axes[0].plot(t, airline.x[0, :, 0], color="0.5", linewidth=0.8, label="passengers, thousands")
    low, high = (future.quantile(q)[0, :, 0].exp() for q in (0.05, 0.95))
    axes[0].fill_between(
        t[-24:], low, high, color="tab:green", alpha=0.3, linewidth=0, label="forecast, 90 %"
    )
    axes[0].plot(t[-24:], future.mean[0, :, 0].exp(), color="tab:green")
    axes[0].set(title="airline passengers")
    axes[0].legend(frameon=False)

    data = dynavae.Sequences.from_arrays(belts.x.log(), control=belts.control)
    model = dynavae.structural_model(
        level(), seasonal(12), control_dim=1, initial_variance=100.0, start=0.01
    ).double()
    dynavae.fit_em(model, data, iterations=20, polish=200, progress=False)
    effect = model.value("D").item()
    print(f"the law changes casualties by {100 * (torch.tensor(effect).exp() - 1):.0f} %")
    under = dynavae.smooth(model, data).mean[0, :, 0] + effect * belts.control[0, :, 0]
    t = 1969 + torch.arange(len(under)) / 12
    axes[1].plot(t, belts.x[0, :, 0], color="0.5", linewidth=0.8, label="killed or seriously injured")
    axes[1].plot(t, under.exp(), color="tab:blue", label="level and law")
    axes[1].set(title="car drivers in Great Britain")
    axes[1].legend(frameon=False)
    plt.show()
