"""Fill the gaps of a table

A CSV with a time column, two stations and holes in it, from file to filled values in the units of the file. This is
[own data](../own_data.md) with a picture; the benchmark there says which models fill gaps well.
"""

# %%
# Two weather stations, hourly. A twentieth of the rows is missing, a tenth of the cells is empty, and for a day one
# station sends no temperature.

import csv
import math
import random
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import dynavae
from dynavae.data import load

random.seed(0)
path = Path(tempfile.mkdtemp()) / "air.csv"
truth: dict[tuple[str, int], float] = {}
with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["station", "time", "temperature", "pm25"])
    for k, station in enumerate(["north", "south"]):
        weather = 0.0
        for hour in range(24 * 28):
            weather = 0.9 * weather + random.gauss(0, 1)
            celsius = 15 + 3 * k + 6 * math.sin(2 * math.pi * (hour - 9) / 24) + weather
            pm25 = 40 - 1.5 * (celsius - 15) + random.gauss(0, 3)
            truth[station, hour] = celsius
            broken = station == "south" and 618 <= hour < 638
            hidden = [broken or random.random() < 0.1, random.random() < 0.1]
            if random.random() < 0.05:
                continue
            cells = ["" if h else f"{v:.1f}" for h, v in zip(hidden, (celsius, pm25), strict=True)]
            writer.writerow([station, datetime(2024, 5, 1) + timedelta(hours=hour), *cells])

# %%
# `load` puts the rows on a grid, marks what is missing, cuts windows of two days and standardises by the training part. A
# linear-Gaussian model is exact and learns in seconds that the two columns inform each other.

splits = load(str(path), id_column="station", window=48, stride=24)
torch.manual_seed(0)
model = dynavae.LGSSM(x_dim=2, z_dim=4)
result = dynavae.fit(
    model, splits.train, splits.valid, epochs=10, batch_size=8, lr=0.03, progress=False, tensorboard=False
)
print(
    f"{result.parameters} parameters; {result.best['valid/nats_per_frame']:.3f} nats per frame on validation data"
)

filled = dynavae.impute(model, splits, split="test", samples=100)

# %%
# Two test days of the southern station, in the units of the file. Where only the temperature is missing, the dust tells
# something of it; no window was cut from these days for training.

to_units = splits.schema.to_units
start = [splits.origin("test", name) for name in splits.test.names]
row = next(i for i, (station, _) in enumerate(start) if station == "south")  # its first window
first = round((start[row][1] - datetime(2024, 5, 1, tzinfo=UTC).timestamp()) / 3600)
n = int(filled.lengths[row])
observed = filled.observed[row, :n].numpy()
hour = np.arange(first, first + n)
mean, low, high = (
    to_units(v[row, :n].numpy()) for v in (filled.x, filled.quantile(0.05), filled.quantile(0.95))
)
true = np.array([truth["south", h] for h in hour])

figure, axes = plt.subplots(2, 1, figsize=(10, 4.6), sharex=True)
for dim, (axis, name) in enumerate(zip(axes, splits.schema.columns, strict=True)):
    seen = np.where(observed[:, dim], mean[:, dim], np.nan)
    axis.fill_between(
        hour, low[:, dim], high[:, dim], color="tab:blue", alpha=0.25, linewidth=0, label="90 % of the draws"
    )
    axis.plot(hour, mean[:, dim], color="tab:blue", linewidth=1.2, label="filled")
    axis.plot(hour, seen, ".-", color="black", linewidth=1, markersize=4, label="observed")
    axis.set(ylabel=name)
axes[0].plot(
    hour,
    np.where(observed[:, 0], np.nan, true),
    ":",
    color="tab:orange",
    linewidth=2,
    label="what was not recorded",
)
axes[0].legend(frameon=False, ncol=4, loc="upper left")
axes[0].set(ylim=(None, 32))
axes[1].set(xlabel="hours since the first of May")
plt.show()

hole = ~observed[:, 0]
straight = np.interp(hour, hour[~hole], mean[~hole, 0])
error, error_of_lines = (np.abs(v - true)[hole].mean() for v in (mean[:, 0], straight))
print(
    f"mean absolute error in the {hole.sum()} holes: model {error:.2f} °C, straight lines {error_of_lines:.2f} °C"
)
