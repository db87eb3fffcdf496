"""How tight is a bound?

The same model, the same data, three bounds, and the truth beside them: in a linear-Gaussian model log p(x) is known. This
is why a score must say its bound and its K ([how to score](../scoring.md)).
"""

# %%
# The model is exact, so its own posterior would make every bound tight. With `propose=bootstrap` the latents are drawn from
# the prior, as poor a proposal as there is: what a neural posterior is worth lies in between.

import matplotlib.pyplot as plt
import torch

import dynavae

torch.manual_seed(0)
model = dynavae.LGSSM(x_dim=2, z_dim=2).set_moments(A=[[0.9, 0.2], [-0.2, 0.9]], R=[[0.5, 0.0], [0.0, 0.5]])
x = dynavae.generate(
    model, batch=64, length=40, seed=1
).x  # not the seed of the scores: they would draw the same z
exact = dynavae.score(model, x, bound="exact").nats_per_frame

counts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
found = {}
for bound in ("iwae", "fivo"):
    found[bound] = [
        dynavae.score(model, x, bound=bound, particles=k, propose=dynavae.bootstrap).nats_per_frame
        for k in counts
    ]
elbo = dynavae.score(model, x, particles=256, kl="sample", propose=dynavae.bootstrap).nats_per_frame

# %%

figure, axis = plt.subplots(figsize=(7, 3.6))
axis.axhline(elbo, color="tab:orange", linewidth=1.4, label="−ELBO")
axis.plot(counts, found["iwae"], "o-", color="tab:blue", markersize=4, label="−IWAE-K")
axis.plot(counts, found["fivo"], "o-", color="tab:green", markersize=4, label="−FIVO-K")
axis.axhline(exact, color="black", linewidth=1, linestyle="--", label="−log p(x), Kalman filter")
axis.set(xscale="log", xlabel="particles K", ylabel="nats per frame")
axis.set_xticks(counts, [str(k) for k in counts])
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()

print(
    f"exact {exact:.3f}; at K = 64: IWAE {found['iwae'][6]:.3f}, FIVO {found['fivo'][6]:.3f}; ELBO {elbo:.3f} nats per frame"
)

# %%
# IWAE weighs whole paths, and the longer a path, the fewer of them matter: it improves slowly in K. FIVO resamples on the
# way and is close after a few particles. All of them approach the same number, from above.
