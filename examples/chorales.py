"""Chorales: train, generate, continue

The JSB chorales ship with the package: 382 pieces in quarter notes, 88 keys, binary. This is a few seconds of training,
so expect keys and chords rather than Bach; `make demo` and the presets train longer.
"""

# %%
# A variational recurrent network with Bernoulli notes.

import matplotlib.pyplot as plt
import numpy as np
import torch

import dynavae
from dynavae.data import load
from dynavae.music import note_name

splits = load("jsb")
torch.manual_seed(0)
model = dynavae.VRNN(x_dim=88, z_dim=16, h_dim=64, emission="bernoulli")
result = dynavae.fit(
    model,
    splits.train,
    splits.valid,
    epochs=10,
    batch_size=16,
    lr=0.003,
    lr_schedule="cosine",
    kl_warmup=3,
    progress=False,
)
print(
    f"{result.parameters} parameters; {result.best['valid/nats_per_frame']:.3f} nats per frame on validation data"
)

# %%
# Four new pieces. `generate` draws z_t from its prior, the notes from their likelihood, and feeds them back.

made = dynavae.generate(model, batch=4, length=64, seed=1)


def roll(axis: plt.Axes, notes: torch.Tensor, **options: float | str) -> None:
    axis.imshow(np.asarray(notes).T, aspect="auto", origin="lower", interpolation="none", **options)
    keys = range(0, 88, 12)
    axis.set(
        ylim=(20, 78),
        yticks=[k for k in keys if 20 <= k < 78],
        yticklabels=[note_name(21 + k) for k in keys if 20 <= k < 78],
    )


figure, axes = plt.subplots(2, 2, figsize=(10, 4.6), sharex=True, sharey=True)
for axis, notes in zip(axes.flat, made.x, strict=True):
    roll(axis, notes, cmap="Blues", vmin=0, vmax=1.3)
for axis in axes[1]:
    axis.set(xlabel="frame (quarter note)")
plt.show()

# %%
# A test chorale, continued 200 times from its 32nd frame: shades are the share of continuations with the note, dots the true
# notes. Right after the cut it is fairly sure; then the future spreads.

piece = splits.test.batch([5])
future = dynavae.forecast(model, piece, horizon=16, context=32, samples=200)
known = piece.x[0, :48]
share = torch.cat([known[:32], future.samples[:, 0].mean(0)])
figure, axis = plt.subplots(figsize=(10, 3.2))
roll(axis, share, cmap="Blues", vmin=0, vmax=1)
t, key = np.nonzero(known.numpy()[32:])
axis.plot(t + 32, key, ".", color="tab:orange", markersize=4, label="what Bach wrote")
axis.axvline(31.5, color="0.4", linestyle="--", linewidth=1)
axis.set(xlabel="frame (quarter note)")
axis.legend(frameon=True, loc="upper left")
plt.show()

# %%
# To listen: `dynavae.music.to_midi(made.x[0] > 0.5, "new.mid", 0.5)`; `dynavae generate RUN` writes MIDI and sound files.
# How good is the model? A number, with all that it takes to compare it ([how to score](../scoring.md)):

print(dynavae.score(model, splits, split="valid", bound="iwae", particles=10))
