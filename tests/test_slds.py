"""SLDS: enumeration of all switch paths, the filter's average weight, one switch that is an LGSSM."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dynavae import (
    LGSSM,
    SLDS,
    Resampling,
    Sequences,
    bootstrap,
    filter,
    forecast,
    generate,
    impute,
    objectives,
    scan,
)
from dynavae.distributions import MultivariateNormal
from dynavae.model import Frame, Past, Present
from dynavae.noise import draw
from dynavae.testing import sequences, small

NAN = float("nan")
close = torch.testing.assert_close


def enumerated(model, batch):
    """log p(x) of each sequence, and p(z_t = k | x_1:t) (B, T, S): every path of switches and its Kalman filter."""
    likelihoods, filters = [], []
    for row in batch:
        T = row.steps
        paths = torch.tensor(list(itertools.product(range(model.states), repeat=T)))
        z = paths.reshape(len(paths), 1, T, 1).double()
        filtered, _ = model.given_switches(row, z)
        log_p = torch.log_softmax(model.raw_initial, -1)[paths[:, 0]].expand(1, -1)
        for t in range(1, T):
            log_p = torch.cat([log_p, (log_p[-1] + model.log_transition[paths[:, t - 1], paths[:, t]])[None]])
        joint = log_p + filtered.log_likelihood.cumsum(
            0
        )  # (T, paths): p(z_1:t, x_1:t), each counted S^(T-t) times
        likelihoods.append(joint[-1].logsumexp(0))
        p = joint.softmax(-1)
        filters.append(
            torch.stack(
                [(p * (paths[:, t] == k)[None])[t].sum() for t in range(T) for k in range(model.states)]
            )
        )
    return torch.stack(likelihoods), [f.reshape(-1, model.states) for f in filters]


@pytest.fixture
def model():
    return small(SLDS, x_dim=2, states=2, h_dim=2)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("control_dim", [0, 1])
def test_the_filter_is_unbiased_for_the_enumerated_likelihood(missing, control_dim):
    """Mean of exp(bound - log p) is 1, within 6 standard errors; with both proposals, resampling or not."""
    torch.manual_seed(0)
    model = small(SLDS, x_dim=2, states=2, h_dim=2, control_dim=control_dim)
    batch = sequences(model, (5, 5, 4), missing)
    exact, _ = enumerated(model, batch)
    number = 3000
    many = batch[list(range(3)) * number]
    for options in (
        dict(resample=Resampling(threshold=1.0)),
        dict(resample=Resampling(threshold=0.5), propose=bootstrap),
        dict(),
    ):
        with torch.no_grad():
            noise = draw(
                model, many.steps, 4, len(many), resample=True, generator=torch.Generator().manual_seed(1)
            )
            run = scan(model, many, particles=4, noise=noise, **options)
            bound = objectives.fivo(run) if "resample" in options else objectives.iwae(run)
        ratio = (bound.reshape(number, 3) - exact.detach()).exp()
        error = ratio.std(0) / math.sqrt(number)
        assert bool(((ratio.mean(0) - 1).abs() < 6 * error + 1e-9).all()), (ratio.mean(0), error)
        assert float(bound.mean()) < float(exact.detach().mean())


def test_filtered_switches_are_those_of_the_enumeration(model):
    batch = sequences(model, (6, 6), missing=True)
    _, exact = enumerated(model, batch)
    found = filter(model, batch, particles=4000, seed=3)
    for row, p in enumerate(exact):
        close(found.mean[row, : len(p)], p.detach(), atol=0.05, rtol=0)


def test_the_optimal_proposal_has_weights_that_ignore_the_draw(model):
    """With everything looked at one step ahead, all particles with the same past get the same weight."""
    batch = sequences(model, (1, 1))
    run = scan(model, batch, particles=6)
    assert float(objectives.log_weights(run).detach().std(0).max()) < 1e-10
    blind = objectives.log_weights(scan(model, batch, particles=6, propose=bootstrap)).detach()
    assert float(blind.std(0).max()) > 1e-3


def test_equal_regimes_are_one_lgssm():
    """Then every path of switches has the likelihood of Kalman's filter, with gaps and control."""
    torch.manual_seed(0)
    linear = small(LGSSM, x_dim=3, z_dim=2, control_dim=1)
    p = linear.parameters_in_moments
    model = SLDS(x_dim=3, states=3, h_dim=2, control_dim=1).double()

    def repeated(a):
        return a.detach().expand(3, *a.shape)

    model.set_moments(
        m0=p.m0.detach(), P0=p.P0.detach(), A=repeated(p.A), Q=repeated(p.Q), b=repeated(p.b), C=repeated(p.C),
        R=repeated(p.R), d=repeated(p.d), B=p.B.detach(), D=p.D.detach(),
    )  # fmt: skip
    batch = sequences(linear, (9, 4, 6), missing=True)
    run = scan(model, batch, particles=5)
    log_w = objectives.log_weights(run).detach()
    close(log_w, linear.exact_log_likelihood(batch).detach().expand(5, -1), atol=1e-8, rtol=0)
    _, smoothed = model.given_switches(batch, run.z.permute(1, 2, 0, 3))
    mean, _ = linear.exact_smooth(batch)
    close(smoothed.mean.reshape(9, 5, 3, 2)[:, 0].transpose(0, 1), mean.detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("x_dim", [1, 7])
@pytest.mark.parametrize("gaps", [False, True])
def test_the_information_form_is_the_textbook_update(x_dim, gaps):
    """Density, belief and gradient of one frame, against a gain and a covariance in the space of what is observed."""
    torch.manual_seed(0)
    n, K, B = 3, 4, 20
    model = SLDS(x_dim=x_dim, states=3, h_dim=n, control_dim=2).double()
    root = torch.randn(K, B, n, n).double()
    z = torch.randint(3, (K, B, 1)).double()
    h = torch.randn(K, B, n).double(), root @ root.mT, torch.zeros(K, B, 3).double(), (z > 0).double()
    control, x = torch.randn(B, 2).double(), 3 * torch.randn(B, x_dim).double()
    observed = torch.rand(B, x_dim) > 0.4 if gaps else torch.ones(B, x_dim, dtype=torch.bool)
    past = Past(None, h, control, None)
    present = Present(None, model.absorb(past, z), control, None)
    p_x = model.likelihood(present)
    log_p = p_x.log_prob(x, observed)
    mean, covariance, *_ = model.update(present, model.features(Frame(x, observed, control)))
    joint = model.posterior(past, model.features(Frame(x, observed, control))).logits[..., 0, :]

    _, Q, R = model.covariances
    expected, grown = torch.zeros(K, B).double(), torch.zeros(K, B, 3).double()
    for k, b in itertools.product(range(K), range(B)):
        o = observed[b]

        def believed(s, k=k, b=b):
            if not h[3][k, b, 0]:
                return h[0][k, b], h[1][k, b]
            return model.A[s] @ h[0][k, b] + model.B @ control[b] + model.b[s], model.A[s] @ h[1][
                k, b
            ] @ model.A[s].mT + Q[s]

        for s in range(3):
            m, P = believed(s)
            C, S = model.C[s][o], (model.C[s] @ P @ model.C[s].mT + R[s])[o][:, o]
            e = (x[b] - model.C[s] @ m - model.D @ control[b] - model.d[s])[o]
            if o.any():
                grown[k, b, s] = torch.distributions.MultivariateNormal(torch.zeros_like(e), S).log_prob(e)
            if s == z[k, b]:
                gain = P @ C.mT @ torch.linalg.inv(S)
                expected[k, b] = grown[k, b, s]
                close(mean[k, b], m + gain @ e, atol=1e-9, rtol=1e-9)
                close(covariance[k, b], P - gain @ C @ P, atol=1e-9, rtol=1e-9)
    close(log_p, expected, atol=1e-9, rtol=1e-9)
    close(joint.softmax(-1), grown.softmax(-1), atol=1e-9, rtol=1e-9)
    close(MultivariateNormal(p_x.loc, p_x.scale_tril).log_prob(x, observed), log_p, atol=1e-9, rtol=1e-9)
    weights = [model.C, model.raw_R, model.raw_Q, model.d, model.D]
    by_form, by_book = (torch.autograd.grad(v.sum(), weights) for v in (log_p, expected))
    for a, b in zip(by_form, by_book, strict=True):
        close(a, b, atol=1e-8, rtol=1e-8)


def test_gaps_are_integrated_out_not_drawn(model):
    """A whole missing frame: with one particle and fixed switches the likelihood is the Kalman filter's, not an estimate."""
    batch = sequences(model, (6, 6), missing=True)
    run = scan(model, batch, particles=3)
    exact = model.given_switches(batch, run.z.permute(1, 2, 0, 3))[0].log_likelihood.reshape(6, 3, 2)
    close(run.log_likelihood.detach(), exact, atol=1e-9, rtol=0)


def test_tasks(model):
    made = generate(model, batch=3, length=12, seed=1)
    assert not made.mean.requires_grad
    data = made.x
    data[0, 4:7] = NAN
    data[1, 3, 0] = NAN
    assert forecast(model, data, horizon=4, samples=20).samples.isfinite().all()
    filled = impute(model, data, samples=20)
    assert filled.x.isfinite().all()
    stream = model.stream(batch=1, particles=16)
    assert stream.step(data[:1, 0]).log_prob.isfinite().all()


def test_a_frame_in_part_is_completed_by_its_conditional():
    """Mean and covariance of the missing coordinates given the others."""
    g = torch.Generator().manual_seed(0)
    L = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 0.7]], dtype=torch.float64)
    p = MultivariateNormal(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), L)
    x = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    observed = torch.tensor([True, False, False])
    noise = torch.randn(40_000, 3, generator=g, dtype=torch.float64)
    drawn = p.complete(x, observed, noise)
    S = L @ L.mT
    mean = p.loc[1:] + S[1:, 0] / S[0, 0] * (x[0] - p.loc[0])
    covariance = S[1:, 1:] - torch.outer(S[1:, 0], S[1:, 0]) / S[0, 0]
    assert bool((drawn[:, 0] == 2.0).all())
    close(drawn[:, 1:].mean(0), mean, atol=0.03, rtol=0)
    close(drawn[:, 1:].T.cov(), covariance, atol=0.03, rtol=0)


def test_regimes_are_found():
    """Two oscillators of different speed: training on the filter's bound tells them apart."""
    import dynavae

    torch.manual_seed(0)
    turn = torch.tensor([[[0.98, -0.17], [0.17, 0.98]], [[0.5, 0.0], [0.0, 0.5]]])
    true = SLDS(x_dim=2, states=2, h_dim=2)
    true.set_moments(A=turn, C=torch.eye(2).expand(2, -1, -1), Q=0.02 * torch.eye(2).expand(2, -1, -1),
                     R=0.02 * torch.eye(2).expand(2, -1, -1), b=torch.tensor([[0.0, 0.0], [1.0, 1.0]]), d=torch.zeros(2, 2),
                     transition=[[0.95, 0.05], [0.05, 0.95]])  # fmt: skip
    x = generate(true, batch=24, length=40, seed=0).x
    best = dynavae.score(true, x, bound="fivo", particles=32).nats_per_frame
    model = SLDS(x_dim=2, states=2, h_dim=2)
    before = dynavae.score(model, x, bound="fivo", particles=32).nats_per_frame
    dynavae.fit(model, x, objective="fivo", particles=4, epochs=12, batch_size=6, lr=0.03, progress=False)
    after = dynavae.score(model, x, bound="fivo", particles=32).nats_per_frame
    assert best < after < before - 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SLDS(2, states=1), "an SLDS needs states >= 2 and h_dim >= 1; got 1 and 4"),
        (lambda: SLDS(2, min_scale=0.0), "min_scale should be positive; got 0.0"),
        (lambda: SLDS(2).set_moments(X=1.0), "SLDS has no parameter 'X'"),
        (lambda: SLDS(2, 2, 2).set_moments(A=torch.eye(2)), r"A should have shape \(2, 2, 2\); got \(2, 2\)"),
    ],
)
def test_what_it_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_shapes_of_switch_paths(model):
    batch = Sequences.from_arrays(torch.zeros(2, 3, 2, dtype=torch.float64))
    filtered, smoothed = model.given_switches(batch, torch.zeros(4, 2, 3, 1, dtype=torch.float64))
    assert filtered.mean.shape == smoothed.mean.shape == (3, 8, 2)


def test_a_switch_that_never_happens():
    """A transition of probability 0 weighs as one; it is no NaN."""
    model = SLDS(x_dim=1, states=2, h_dim=1).double().set_moments(transition=[[1.0, 0.0], [0.5, 0.5]])
    x = torch.randn(1, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = scan(model, Sequences.from_arrays(x), particles=50, noise=draw(model, 5, 50, 1))
    assert bool(run.log_w.isfinite().all())
    z = run.z.squeeze(-1).squeeze(-1).long()  # (T, K)
    assert not bool(((z[:-1] == 0) & (z[1:] == 1)).any())
