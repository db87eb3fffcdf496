"""Where a KVAE starts: codes at the slow features of the frames, moving at constant velocity."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynavae.distributions import Normal
from dynavae.exact.slow_features import slow_features
from dynavae.model import Frame

if TYPE_CHECKING:
    from dynavae.models.kvae import KVAE

UPDATES, BATCH, RATE = 600, 256, 1e-3
FRAMES = 50_000
"""Of so many frames, in sequences taken evenly from the data."""


def start_slowly(model: KVAE, sequences: Iterable[tuple[Tensor, Tensor]]) -> bool:
    r"""Train encoder and decoder for a few hundred updates as a VAE of frames around their slow features y_t.

    .. math::
        \mathcal L_t = \mathbb E_{q(a_t | x_t)} \log p(x_t \mid a_t) - \mathrm{KL}\big(q(a_t \mid x_t)\,\|\,
        \mathcal N(y_t, R)\big), \qquad \mathbb E\, y_t y_t^\top = P_0

    and set all dynamics to constant velocity, :math:`a_t = s_{t,1:d}`, :math:`s_{t,1:d} = s_{t-1,1:d} + s_{t-1,d+1:2d}`,
    plus what their random start was, which tells the sets apart. False, with a warning, where the data have no such
    features.
    """
    like = next(model.parameters())
    sequences = _thinned(sequences)
    seen = torch.cat([m for _, m in sequences])
    x = torch.where(seen, torch.cat([x for x, _ in sequences]), 0.0).to(like)
    try:
        y = slow_features(sequences, model.z_dim)(x.cpu(), seen).to(like) * model.start_variance**0.5
    except ValueError as error:
        warnings.warn(f"this {type(model).__name__} starts at random: {error}", stacklevel=2)
        return False
    frames = seen.any(-1).nonzero().squeeze(-1)
    d, n = model.z_dim, model.state_dim
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.A += 0.02 * torch.randn(model.A.shape, generator=generator).to(like)
        velocity = torch.arange(min(d, n - d))
        model.A[:, velocity, d + velocity] += 1.0
        model.C += torch.eye(d, n).to(like)
        prior_scale = model.R.diagonal().sqrt().to(like)
    parts = (model.encoder, model.q_a, model.decoder, model.p_x)
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], RATE)
    training = model.training
    model.train()
    with torch.enable_grad():
        for _ in range(UPDATES):
            at = frames[torch.randint(len(frames), (BATCH,), generator=generator)]
            observed = None if bool(seen[at].all()) else seen[at].to(like.device)
            q = Normal(*model.encoded(model.features(Frame(x[at], observed, None))))
            a = q.sample(torch.randn(q.loc.shape, generator=generator).to(like))
            kl = q.kl(Normal(y[at], prior_scale.expand_as(q.loc))).sum(-1)
            loss = (kl - model.p_x(model.decoder(a)).log_prob(x[at], observed)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.train(training)
    return True


def _thinned(sequences: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Every sequence, every second, every fourth ...: at most FRAMES frames, never all of the data in memory."""
    kept: list[tuple[Tensor, Tensor]] = []
    stride, total = 1, 0
    for i, (x, seen) in enumerate(sequences):
        if i % stride == 0:
            kept.append((x.float().cpu(), seen.cpu()))
            total += len(x)
        if total > FRAMES and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            total = sum(len(x) for x, _ in kept)
    return kept
