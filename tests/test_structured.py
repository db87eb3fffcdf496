"""SVAE and DVBF: exact where they can be, and the equations of their docstrings."""

from __future__ import annotations

import pytest
import torch

from dynavae import fit, objectives, score
from dynavae.batch import Sequences
from dynavae.distributions import Normal
from dynavae.exact import kalman
from dynavae.models import DVBF, SVAE
from dynavae.models.svae import Potentials
from dynavae.scan import scan
from dynavae.testing import sequences, small
from dynavae.testing.cases import noise_for


class Linear(SVAE):
    """x = c z + noise, and the potentials that belong to it."""

    gain, spread = 1.7, 0.4

    def potentials(self, u):
        precision = self.gain**2 / self.spread**2
        return Potentials(torch.full_like(u, precision), self.gain * u / self.spread**2)

    def likelihood(self, present):
        z = present.h[0]
        return Normal(self.gain * z, torch.full_like(z, self.spread))


@pytest.mark.parametrize("control_dim", [0, 2])
@pytest.mark.parametrize("gaps", [False, True])
def test_matching_potentials_make_the_bound_the_exact_evidence(gaps, control_dim):
    model = small(Linear, x_dim=3, z_dim=3, control_dim=control_dim)
    batch = sequences(model)
    if gaps:  # whole frames: a potential is of a frame
        hidden = torch.zeros_like(batch.observed)
        hidden[0, 1:3] = hidden[2, -1] = True
        batch = batch.hide(hidden)
    m0, A, b = (p.detach() for p in (model.dynamics.m0, model.dynamics.A, model.dynamics.b))
    P0, Q = (torch.diag(s.detach() ** 2) for s in model.dynamics.scales)
    eye = torch.eye(3, dtype=torch.float64)
    B = None if model.dynamics.B is None else model.dynamics.B.detach()
    params = kalman.LinearGaussian(m0, P0, A, Q, model.gain * eye, model.spread**2 * eye, B, None, b)
    x, observed = batch.x.transpose(0, 1), batch.observed.transpose(0, 1)
    control = None if batch.control is None else batch.control.transpose(0, 1)
    exact = kalman.kalman_filter(params, x, observed, control).log_likelihood.sum(0)
    run = scan(model, batch, particles=5, noise=noise_for(model, batch, 5))
    log_w = objectives.log_weights(run)
    torch.testing.assert_close(log_w, exact.expand_as(log_w))


@pytest.mark.slow
def test_a_structured_model_learns_to_beat_frames_on_their_own():
    """A rotating point behind a tanh: the SVAE's bound beats that of a VAE of the same networks."""
    from dynavae import VAE

    torch.manual_seed(0)
    phase, t = 6.28 * torch.rand(120, 1), torch.arange(16)
    x = torch.stack([torch.sin(phase + 0.4 * t), torch.cos(phase + 0.4 * t)], -1).tanh()
    x = x + 0.3 * torch.randn(x.shape)
    options = dict(layers=(16,), emission={"emission": "gaussian", "scale": "shared"})
    bounds = {}
    for kind in (SVAE, VAE):
        torch.manual_seed(1)
        model = kind(x_dim=2, z_dim=2, **options)
        fit(model, x[:100], epochs=25, batch_size=20, lr=0.01, progress=False, accelerator="cpu")
        bounds[kind.__name__] = score(model, x[100:]).nats_per_frame
    assert bounds["SVAE"] < bounds["VAE"] - 0.1


def test_the_state_of_a_dvbf_is_that_of_a_hand_written_loop():
    model = small(DVBF, control_dim=2, state_dim=3)
    batch = sequences(model, (5,))
    run = scan(model, batch, particles=1, noise=noise_for(model, batch, 1))
    w, u = run.z[:, 0, 0], batch.control[0]
    state = model.to_first(w[0])
    for t in range(5):
        if t:
            alpha = model.to_weights(torch.cat([state, u[t]])).softmax(-1)
            A, B, C = ((alpha[:, None, None] * M).sum(0) for M in (model.A, model.B, model.C))
            state = A @ state + B @ u[t] + C @ w[t]
        torch.testing.assert_close(run.p_x.mean[t, 0, 0], model.p_x(model.decoder(state)).mean)
    later = Sequences.from_arrays(batch.x, control=batch.control.roll(1, 1))
    other = scan(model, later, particles=1, noise=noise_for(model, batch, 1))
    assert (other.p_x.mean - run.p_x.mean).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"state_dim": 0}, "state_dim of DVBF should be a positive integer; got 0"),
        ({"mixtures": 0}, "mixtures of DVBF should be a positive integer; got 0"),
    ],
)
def test_bad_options_of_a_dvbf(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DVBF(x_dim=4, **options)
