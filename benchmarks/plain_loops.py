"""Training steps as they are usually written: everything in one Python loop over t.

The rivals of `engine_speed.py`. Each function takes a model of the library, uses its very weights, and returns the ELBO
of each sequence (B,) for complete sequences of equal length: features, recurrences, posterior, prior and decoder are
called frame by frame, results are appended to lists and stacked for the loss. With `whole=True` recurrences whose whole
input is known beforehand (those over x alone) are one call of `torch.nn.LSTM`, as careful authors write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynavae.distributions import Normal
from dynavae.models import DKF, RVAE, SRNN, VRNN

State = tuple[Tensor, Tensor]


def lstm_step(rnn: nn.LSTM, u: Tensor, state: State) -> State:
    return torch.lstm_cell(u, state, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)  # type: ignore[return-value]


def lstm(rnn: nn.LSTM, u: list[Tensor], whole: bool) -> list[Tensor]:
    """Outputs after each input."""
    if whole:
        return list(rnn(torch.stack(u))[0])
    state = start(u[0], rnn.hidden_size)
    out = []
    for u_t in u:
        state = lstm_step(rnn, u_t, state)
        out.append(state[0])
    return out


def start(like: Tensor, h_dim: int) -> State:
    zero = like.new_zeros(len(like), h_dim)
    return zero, zero


def normal(raw: Tensor) -> Normal:
    loc, log_variance = raw.chunk(2, -1)
    return Normal(loc, torch.exp(0.5 * log_variance.clamp(-15, 10)))


def split_mlp(net: Any, e: Tensor, z: Tensor) -> Tensor:
    """The multilayer perceptron on [e, z]."""
    weight = torch.cat([net.from_e.weight, net.from_z.weight], 1)
    return net.rest(nn.functional.linear(torch.cat([e, z], -1), weight, net.from_e.bias))


def elbo(x: Tensor, q: list[Normal], p: list[Normal], p_x: list[Any]) -> Tensor:
    """Of steps appended one by one."""
    q_z, p_z = (Normal(torch.stack([d.loc for d in ds]), torch.stack([d.scale for d in ds])) for ds in (q, p))
    decoded = type(p_x[0])(*(torch.stack(parts) for parts in zip(*p_x, strict=True)))
    kl = q_z.kl(p_z)
    assert kl is not None
    return (decoded.log_prob(x) - kl.sum(-1)).sum(0)


def vrnn(model: VRNN, x: Tensor, noise: Tensor, whole: bool = False) -> Tensor:
    rnn = model.rnn.rnn
    state = start(x[0], model.rnn.out_dim)
    qs, ps, p_xs = [], [], []
    for t in range(len(x)):
        phi_x = model.phi_x(x[t])
        prior = model.p_z(model.prior_net(state[0]))
        q = normal(split_mlp(model.q_z, phi_x, state[0]))
        z = q.loc + q.scale * noise[t]
        phi_z = model.phi_z(z)
        p_xs.append(model.p_x(model.decoder(torch.cat([phi_z, state[0]], -1))))
        state = lstm_step(rnn, torch.cat([phi_x, phi_z], -1), state)
        qs.append(q)
        ps.append(prior)
    return elbo(x, qs, ps, p_xs)


def srnn(model: SRNN, x: Tensor, noise: Tensor, whole: bool = False) -> Tensor:
    phi_x = [model.phi_x(x_t) for x_t in x]
    d = [
        torch.zeros_like(x[0, :, :1]).expand(-1, model.past_x.out_dim),
        *lstm(model.past_x.rnn, phi_x, whole)[:-1],
    ]
    pairs = [model.encoder(torch.cat([d_t, u], -1)) for d_t, u in zip(d, phi_x, strict=True)]
    a = lstm(model.back.rnn, pairs[::-1], whole)[::-1]
    z = x.new_zeros(x.shape[1], model.z_dim)
    qs, ps, p_xs = [], [], []
    for t in range(len(x)):
        prior = model.p_z(model.prior_net(torch.cat([d[t], z], -1)))
        q = normal(split_mlp(model.q_z, a[t], z))
        q = q._replace(loc=q.loc + prior.loc)
        z = q.loc + q.scale * noise[t]
        p_xs.append(model.p_x(model.decoder(torch.cat([d[t], z], -1))))
        qs.append(q)
        ps.append(prior)
    return elbo(x, qs, ps, p_xs)


def dkf(model: DKF, x: Tensor, noise: Tensor, whole: bool = False) -> Tensor:
    g = lstm(model.back.rnn, [model.phi_x(x_t) for x_t in x.flip(0)], whole)[::-1]
    z = x.new_zeros(x.shape[1], model.z_dim)
    qs, ps, p_xs = [], [], []
    for t in range(len(x)):
        prior = model.p_z(z)
        q = model.q_z(model.combiner((torch.tanh(model.z_to_h(z)) + g[t]) / 2))
        z = q.loc + q.scale * noise[t]
        p_xs.append(model.p_x(model.decoder(z)))
        qs.append(q)
        ps.append(prior)
    return elbo(x, qs, ps, p_xs)


def rvae(model: RVAE, x: Tensor, noise: Tensor, whole: bool = False) -> Tensor:
    g = lstm(model.back.rnn, list(x.flip(0)), whole)[::-1]
    inferring, decoding = start(x[0], model.inference.out_dim), start(x[0], model.generation.out_dim)
    qs, ps, p_xs = [], [], []
    for t in range(len(x)):
        q = normal(split_mlp(model.q_z, g[t], inferring[0]))
        z = q.loc + q.scale * noise[t]
        inferring = lstm_step(model.inference.rnn, z, inferring)
        decoding = lstm_step(model.generation.rnn, z, decoding)
        p_xs.append(model.p_x(model.decoder(decoding[0])))
        qs.append(q)
        ps.append(Normal(torch.zeros_like(z), torch.ones_like(z)))
    return elbo(x, qs, ps, p_xs)


PLAIN: dict[str, Callable[..., Tensor]] = {"VRNN": vrnn, "SRNN": srnn, "DKF": dkf, "RVAE-C": rvae}
MODELS = {"VRNN": VRNN, "SRNN": SRNN, "DKF": DKF, "RVAE-C": RVAE}
