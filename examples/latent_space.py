"""What the latents find: a circle, and what stays the same

Sixteen pixels see a spot that goes round; its speed and width differ from recording to recording. `DSAE` has two kinds of
latents: z_t of each frame, and w of the whole sequence. What changes should go into z, what stays into w, and nobody tells.
"""

# %%

import matplotlib.pyplot as plt
import torch

import dynavae

torch.manual_seed(0)
B, T, pixels = 256, 24, 16
place = torch.arange(pixels) / pixels
phase = torch.rand(B, 1) + torch.where(torch.rand(B, 1) < 0.5, -1, 1) * torch.linspace(0, 1.2, T)
width = torch.empty(B).uniform_(0.06, 0.22)
distance = (place - phase.unsqueeze(-1) + 0.5) % 1 - 0.5
x = torch.exp(-0.5 * (distance / width[:, None, None]) ** 2) + 0.05 * torch.randn(B, T, pixels)

model = dynavae.DSAE(x_dim=pixels, z_dim=2, w_dim=1, h_dim=48, decoder_layers=(64, 64))
result = dynavae.fit(
    model, x[:200], x[200:], epochs=40, lr=0.005, batch_size=32, kl_warmup=10, progress=False
)
print(
    f"{result.parameters} parameters; {result.best['valid/nats_per_frame']:.3f} nats per frame on validation data"
)

# %%
# Left, a recording; middle, the smoothed means of z_t of all held-out frames, coloured by where the spot is: a ring, since
# the spot goes round. Right, w against the width of the spot.

latents = dynavae.smooth(model, x[200:], samples=20)
z = latents.mean.flatten(0, 1)
batch = dynavae.Sequences.from_arrays(x[200:])
run = dynavae.scan(model, batch, particles=1)
w = run.w.mean(0).squeeze(-1).detach()

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4))
left.imshow(x[200].T.numpy(), aspect="auto", cmap="magma", interpolation="none")
left.set(xlabel="frame", ylabel="pixel", title="a recording")
colour = phase[200:].remainder(1).flatten()
middle.scatter(*z.T, c=colour, cmap="twilight", s=5)
middle.set(xlabel="$z_1$", ylabel="$z_2$", title="z_t, coloured by the place of the spot", aspect="equal")
right.plot(width[200:], w, ".", color="tab:blue")
right.set(xlabel="width of the spot", ylabel="w", title="w of each recording", xticks=[0.1, 0.15, 0.2])
plt.show()

correlation = torch.corrcoef(torch.stack([width[200:].log(), w]))[0, 1].abs()
print(f"correlation of w with the logarithm of the width: {correlation:.2f}")
