"""SVAE: modes against their enumeration, bounds against the exact likelihood, and the conjugate factor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from dynavae import SVAE, Sequences, fit, forecast, generate, impute, objectives, scan, score, smooth
from dynavae.distributions import MultivariateNormal, Normal
from dynavae.exact import kalman, switching
from dynavae.model import Frame
from dynavae.models.svae import Potentials
from dynavae.noise import draw
from dynavae.testing import sequences, small
from dynavae.testing.cases import noise_for

close = torch.testing.assert_close
GAIN, SPREAD = 1.7, 0.4


class Linear(SVAE):
    """x = c z + noise, and the potentials that belong to it."""

    def potentials(self, u):
        return Potentials(torch.full_like(u, GAIN**2 / SPREAD**2), GAIN * u / SPREAD**2)

    def likelihood(self, present):
        z = present.h[0]
        return Normal(GAIN * z, torch.full_like(z, SPREAD))


def paths_of(model, T):
    """All paths of modes and their log-probabilities."""
    d = model.dynamics.density()
    paths = torch.tensor(list(itertools.product(range(model.modes), repeat=T)))
    log_p = d.log_initial[paths[:, 0]]
    for t in range(1, T):
        log_p = log_p + d.log_transition[paths[:, t - 1], paths[:, t]]
    return paths, log_p


def along(model, path, u):
    """The linear-Gaussian model of one path of modes, with u = (control, 1) among the regressors."""
    d, n = model.dynamics.density(), model.z_dim
    k, eye = path[0], torch.eye(n, dtype=torch.float64)
    M, L = d.M[path].unsqueeze(1), d.L[path].unsqueeze(1)
    return kalman.LinearGaussian(
        d.m0[k], d.L0[k] @ d.L0[k].mT, M[..., :n], L @ L.mT, GAIN * eye, SPREAD**2 * eye, M[..., n:]
    )


def regressors(batch):
    ones = torch.ones(batch.steps, len(batch), 1, dtype=torch.float64)
    return ones if batch.control is None else torch.cat([batch.control.transpose(0, 1), ones], -1)


def enumerated(model, batch):
    """log p(x) of each sequence: a Kalman filter along every path."""
    x, observed = batch.x.transpose(0, 1), batch.observed.transpose(0, 1)
    paths, log_p = paths_of(model, batch.steps)
    u = regressors(batch)
    found = [
        kalman.kalman_filter(along(model, path, u), x, observed, u).log_likelihood.sum(0) for path in paths
    ]
    return torch.logsumexp(torch.stack(found) + log_p.unsqueeze(-1), 0).detach()


def switching_case(control_dim=0, gaps=False, T=5):
    model = small(Linear, x_dim=2, z_dim=2, modes=2, control_dim=control_dim)
    batch = sequences(model, (T, T))
    if gaps:  # whole frames: inside, first and last
        hidden = torch.zeros_like(batch.observed)
        hidden[0, 1:3] = hidden[1, 0] = hidden[1, -2:] = True
        batch = batch.hide(hidden)
    return model, batch


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("control_dim", [0, 2])
def test_the_prior_is_the_sum_over_all_paths_of_modes(control_dim, gaps):
    model, batch = switching_case(control_dim, gaps)
    run = scan(model, batch, particles=3, noise=noise_for(model, batch, 3))
    paths, log_p = paths_of(model, batch.steps)
    d, u = model.dynamics.density(), regressors(batch).unsqueeze(1).expand(-1, 3, -1, -1)
    terms = []
    for path, log_path in zip(paths, log_p, strict=True):
        value = log_path + MultivariateNormal(d.m0[path[0]], d.L0[path[0]]).log_prob(run.z[0])
        for t in range(1, batch.steps):
            w = torch.cat([run.z[t - 1], u[t]], -1)
            value = value + MultivariateNormal(w @ d.M[path[t]].mT, d.L[path[t]]).log_prob(run.z[t])
        terms.append(value)
    close(run.log_prior.sum(0), torch.logsumexp(torch.stack(terms), 0))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("control_dim", [0, 2])
def test_bounds_against_the_enumerated_likelihood(control_dim, gaps):
    """exp(iwae) has the mean p(x), the ELBO lies below log p(x), and mean field is near: all within 6 standard errors."""
    model, batch = switching_case(control_dim, gaps)
    exact = enumerated(model, batch)
    number = 1500
    many = batch[list(range(2)) * number]
    with torch.no_grad():
        noise = draw(model, many.steps, 4, len(many), generator=torch.Generator().manual_seed(1))
        run = scan(model, many, particles=4, noise=noise)
        ratio = (objectives.iwae(run).reshape(number, 2) - exact).exp()
        elbo = objectives.elbo(run, kl="sample").reshape(number, 2)
    assert bool(((ratio.mean(0) - 1).abs() < 6 * ratio.std(0) / number**0.5).all())
    error = elbo.std(0) / number**0.5
    assert bool((elbo.mean(0) < exact + 6 * error).all())
    assert bool((elbo.mean(0) > exact - 1).all())


def test_more_sweeps_tighten_the_bound():
    model, batch = switching_case()
    many = batch[list(range(2)) * 500]
    noise = draw(model, many.steps, 2, len(many), generator=torch.Generator().manual_seed(1))
    values = []
    for sweeps in (0, 1, 6):
        model.sweeps = sweeps
        with torch.no_grad():
            values.append(
                float(objectives.elbo(scan(model, many, particles=2, noise=noise), kl="sample").mean())
            )
    assert values[0] < values[1] < values[2] + 1e-3


def test_the_proposal_is_the_mean_field_chain():
    """log q of sampled paths is that of the joint Gaussian with expected natural parameters."""
    model, batch = switching_case(control_dim=2)
    run = scan(model, batch, particles=3, noise=noise_for(model, batch, 3))
    x = batch.x.transpose(0, 1)
    frame = Frame(x, None, batch.control.transpose(0, 1))
    found = model.infer(frame, model.features(frame), batch.lengths)
    z = switching.moments(
        switching.conditionals(
            model.dynamics.expected(), *found.q[:1], found.q.precision, found.q.linear, found.u
        )
    )
    P = torch.zeros(2, 10, 10).double()  # (B, T n, T n)
    e, n = model.dynamics.expected(), 2
    J = model.potentials(model.features(frame)).J
    for t in range(5):
        now, before = slice(t * n, t * n + n), slice(t * n - n, t * n)
        part = e.transition if t else e.first
        P[:, now, now] += torch.einsum("bs,sij->bij", found.q.gamma[t], part.precision) + torch.diag_embed(
            J[t]
        )
        if t:
            G = torch.einsum("bs,sij->bij", found.q.gamma[t], part.linear[..., :n])
            P[:, now, before] -= G
            P[:, before, now] -= G.mT
            P[:, before, before] += torch.einsum("bs,sij->bij", found.q.gamma[t], part.quadratic[:, :n, :n])
    joint = torch.distributions.MultivariateNormal(z.mean.transpose(0, 1).flatten(1), precision_matrix=P)
    path = run.z.permute(1, 2, 0, 3).flatten(2)
    close(run.log_proposal.sum(0), joint.log_prob(path))


def test_states_ignore_padding_and_what_follows_the_last_frame_seen():
    model, batch = switching_case()
    found = model.states(batch)
    assert found.modes.shape == (2, 5, 2) and found.covariance.shape == (2, 5, 2, 2)
    close(found.modes.sum(-1), torch.ones(2, 5).double())
    more = sequences(model, (8, 5, 5))
    x = torch.cat([more.x[:1], torch.nn.functional.pad(batch.x, (0, 0, 0, 3), value=7.0)])
    longer = Sequences.from_arrays(x, torch.tensor([8, 5, 5]))
    padded = [part[1:] for part in model.states(longer)]
    whole = Sequences.from_arrays(x[1:], torch.tensor([8, 8]))
    hidden = torch.zeros_like(whole.observed)
    hidden[:, 5:] = True
    blank = model.states(whole.hide(hidden))
    for a, b, c in zip(found, padded, blank, strict=True):
        close(a, b[:, :5])
        assert bool(b[:, 5:].isnan().all())
        close(a, c[:, :5])
        assert bool(c.isfinite().all())


def test_with_one_mode_states_are_those_of_the_smoother():
    model = small(Linear, x_dim=2, z_dim=2)
    batch = sequences(model, (5, 5))
    u, path = regressors(batch), torch.zeros(5, dtype=torch.long)
    params = along(model, path, u)
    filtered = kalman.kalman_filter(params, batch.x.transpose(0, 1), control=u)
    smoothed = kalman.kalman_smoother(params, filtered)
    found = model.states(batch)
    close(found.mean.transpose(0, 1), smoothed.mean.detach())
    close(found.covariance.transpose(0, 1), smoothed.covariance.detach())
    close(found.modes, torch.ones(2, 5, 1).double())


@pytest.mark.parametrize("conjugate", [False, True])
def test_tasks(conjugate):
    torch.manual_seed(0)
    model = SVAE(x_dim=2, z_dim=2, modes=2, layers=(8,), conjugate=conjugate)
    x = generate(model, batch=3, length=12, seed=1).x
    x[0, 4:7] = x[1, 9:] = x[2, 0] = x[2, 5, 1] = float("nan")
    for bound in ("elbo", "iwae", "fivo"):
        assert math.isfinite(score(model, x, bound=bound, particles=8).nats_per_frame)
    assert score(model, x).kl == "sample"
    assert forecast(model, x, horizon=4, samples=20).samples.isfinite().all()
    assert impute(model, x, samples=20).x.isfinite().all()
    assert smooth(model, x, samples=20).mean.isfinite().all()


@pytest.mark.parametrize("modes", [1, 2])
def test_mixed_precision_is_for_the_networks_only(modes):
    torch.manual_seed(0)
    model, x = SVAE(x_dim=2, z_dim=2, modes=modes, sweeps=1, layers=(8,)), torch.randn(4, 6, 2)
    batch = Sequences.from_arrays(x)
    noise = noise_for(model, batch, 2)
    noise = type(noise)(*(None if a is None else a.float() for a in noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = scan(model, batch, particles=2, noise=noise)
        chain = run.q
    for part in (run.z, run.log_prior, run.log_proposal, chain.loc):
        assert part.dtype == torch.float32
    close(chain.log_prob(run.z), run.log_proposal)  # the path is that of its own distribution, to float32


# --- the conjugate factor -----------------------------------------------------------------------------------


def normals(q, k, number, seed):
    """(A, Sigma) drawn from an MNIW of mode k."""
    g = torch.Generator().manual_seed(seed)
    n = q.scale.shape[-1]
    Sigma = torch.as_tensor(
        stats.invwishart(float(q.dof[k]), q.scale[k].numpy()).rvs(number, random_state=seed)
    )
    noise = torch.randn(number, n, q.mean.shape[-1], generator=g, dtype=torch.float64)
    right = torch.linalg.cholesky(torch.linalg.inv(q.rows[k]))
    return q.mean[k] + torch.linalg.cholesky(Sigma) @ noise @ right.mT, Sigma


def test_in_training_the_prior_is_an_expected_log_density():
    """Of one mode, over draws of theta; in evaluation it is the density at the mean of q(theta)."""
    model = small(Linear, x_dim=2, z_dim=2, conjugate=True)
    batch = sequences(model, (2,))
    noise = noise_for(model, batch, 1)
    model.train()
    run = scan(model, batch, noise=noise)
    z1, z2 = run.z[:, 0, 0]
    q = model.dynamics.q
    for t, (family, y, w) in enumerate(
        ((q.first, z1, torch.ones(1)), (q.transition, z2, torch.cat([z1, torch.ones(1)])))
    ):
        A, Sigma = normals(family, 0, 20000, t)
        each = torch.distributions.MultivariateNormal(A @ w.double(), Sigma).log_prob(y)
        assert abs(float(each.mean() - run.log_prior[t, 0, 0])) < 6 * float(each.std()) / 20000**0.5
    model.begin_global(10)
    close(scan(model, batch, noise=noise).log_prior[0], run.log_prior[0] - model.dynamics.kl() / 10)
    model.eval()
    d = model.dynamics.density()
    M, Sigma = q.transition.mean[0], q.transition.scale[0] / q.transition.dof[0]
    close(d.L[0] @ d.L[0].mT, Sigma)
    w = torch.cat([z1, torch.ones(1)])
    p = torch.distributions.MultivariateNormal(M @ w, Sigma)
    close(scan(model, batch, noise=noise).log_prior[1, 0, 0], p.log_prob(z2))


def test_with_matching_potentials_it_is_variational_bayes():
    """Every full step raises the whole bound, which a single path gives exactly, until it stands still."""
    torch.manual_seed(0)
    model = Linear(x_dim=2, z_dim=2, conjugate=True).double()
    true = torch.tensor([[0.9, 0.3], [-0.3, 0.9]]).double()
    z = [torch.randn(12, 2).double()]
    for _ in range(14):
        z.append(z[-1] @ true.mT + 0.2 * torch.randn(12, 2).double())
    x = GAIN * torch.stack(z, 1) + SPREAD * torch.randn(12, 15, 2).double()
    x[3, 4:6] = float("nan")
    batch = Sequences.from_arrays(x, torch.tensor([15] * 8 + [9] * 4))
    model.begin_global(12)
    model.train()
    values = []
    for _ in range(40):
        log_w = objectives.log_weights(scan(model, batch, particles=2))
        close(log_w[0], log_w[1])  # the posterior is exact: every path has the same weight
        values.append(float(log_w[0].sum()))
        model.natural_step(model.global_statistics(batch), 1.0)
    assert all(b >= a - 1e-8 for a, b in itertools.pairwise(values))
    assert values[-1] - values[-2] < 1e-3 < 10 < values[-1] - values[0]
    assert float((model.dynamics.q.transition.mean[0, :, :2] - true).abs().max()) < 0.15


def test_expected_sums_are_averages_over_sampled_states():
    """Of z and modes drawn from q(s) q(z), with gaps and lengths, within 6 standard errors."""
    model = small(Linear, x_dim=2, z_dim=2, modes=2, conjugate=True)
    batch = sequences(model, (4, 3))
    batch = batch.hide(torch.zeros_like(batch.observed).index_fill(1, torch.tensor([1]), True))
    found = model.global_statistics(batch)
    number = 5000
    many = batch[list(range(2)) * number]
    with torch.no_grad():
        z = scan(model, many, generator=torch.Generator().manual_seed(0)).z[:, 0]  # (T, B, n)
        gamma = model.states(batch).modes.nan_to_num(0.0).transpose(0, 1).repeat(1, number, 1)
    w = torch.cat([z[:-1], torch.ones_like(z[:-1, :, :1])], -1)
    for got, a, b in zip(found.transition, (z[1:], z[1:], w), (z[1:], w, w), strict=False):
        each = torch.einsum("tbs,tbi,tbj->bsij", gamma[1:], a, b).reshape(number, 2, *got.shape).sum(1)
        assert bool(((each.mean(0) - got).abs() < 6 * each.std(0) / number**0.5 + 1e-12).all())
    close(found.transition[3], gamma[1:, :2].sum((0, 1)))
    close(found.first[3], gamma[0, :2].sum(0))
    close(found.initial, gamma[0, :2].sum(0))
    assert abs(float(found.chain.sum()) - 5) < 1e-9
    total = model.global_statistics(batch[[0, 1, 0]])
    again = model.global_statistics(batch[[0]])
    for a, b, c in zip(total.transition, found.transition, again.transition, strict=True):
        close(a, b + c)


def rotating(B=60, T=20):
    torch.manual_seed(0)
    phase, t = 6.28 * torch.rand(B, 1), torch.arange(T)
    x = torch.stack([torch.sin(phase + 0.4 * t), torch.cos(phase + 0.4 * t)], -1)
    return x + 0.2 * torch.randn(x.shape)


def test_fit_moves_the_factor_and_resumes_exactly(tmp_path):
    x = rotating(20, 10)

    def model():
        torch.manual_seed(1)
        return SVAE(x_dim=2, z_dim=2, layers=(8,), modes=2, sweeps=1, conjugate=True)

    options = dict(batch_size=8, lr=0.01, global_lr=0.3, progress=False, accelerator="cpu")
    whole, parts = model(), model()
    before = whole.dynamics.q
    result = fit(whole, x, x[:4], epochs=3, **options)
    assert result.history[-1]["train/nats_per_frame"] < result.history[0]["train/nats_per_frame"]
    assert float(whole.dynamics.sequences) == 20
    # 3 steps an epoch: what is left of the first counts is 0.7 to the power of 9
    expected = before.transition.dof.sum() * 0.7**9 + (1 - 0.7**9) * (
        whole.dynamics.prior().transition.dof.sum() + 20 * 9
    )
    last = fit(model(), x, epochs=3, **options).model
    assert abs(float(last.dynamics.q.transition.dof.sum() - expected)) < 25  # batches of 8, 8 and 4 sequences
    fit(parts, x, epochs=1, out_dir=tmp_path / "run", **options)
    parts = model()
    fit(parts, x, epochs=3, out_dir=tmp_path / "run", resume=True, **options)
    for name, value in last.state_dict().items():
        close(parts.state_dict()[name], value, msg=name)


@pytest.mark.slow
def test_a_conjugate_factor_learns_a_rotation():
    """As far as dynamics by gradient do, and it knows how sure it is."""
    x = rotating(100)
    scores = {}
    for conjugate in (False, True):
        torch.manual_seed(1)
        model = SVAE(x_dim=2, z_dim=2, layers=(16,), conjugate=conjugate)
        fit(model, x[:80], epochs=60, batch_size=20, lr=0.01, progress=False, accelerator="cpu")
        scores[conjugate] = score(model, x[80:], particles=20).nats_per_frame
    assert scores[True] < scores[False] + 0.1
    A = model.dynamics.q.transition.mean[0, :, :2]
    angle = float(torch.linalg.eigvals(A).angle().abs().max())
    assert abs(angle - 0.4) < 0.05


def turning(B, T, seed):
    """A point on a circle turns by 0.8, or back by 0.5, a frame, seen through a network; and which of the two it did."""
    g = torch.Generator().manual_seed(seed)
    modes = [torch.randint(2, (B,), generator=g)]
    for _ in range(T - 1):
        turns = torch.rand(B, generator=g) < 0.06
        modes.append(torch.where(turns, 1 - modes[-1], modes[-1]))
    s = torch.stack(modes, 1)
    angle = 6.28 * torch.rand(B, 1, generator=g) + torch.tensor([0.8, -0.5])[s].cumsum(1)
    z = torch.stack([angle.cos(), angle.sin()], -1) + 0.02 * torch.randn(B, T, 2, generator=g)
    wide = torch.tanh(1.5 * z @ torch.randn(2, 8, generator=g))
    x = wide @ (torch.randn(8, 6, generator=g) / 8**0.5)
    return x + 0.05 * torch.randn(B, T, 6, generator=g), s


@pytest.mark.slow
def test_switching_times_are_found_behind_a_network():
    """Networks learn with one mode; then two part, and label held-out sequences almost as they were simulated.

    With other seeds it may end in a local optimum, whose bound is worse.
    """
    x, truth = turning(80, 25, seed=0)
    options = dict(batch_size=20, lr=0.02, global_lr=0.3, progress=False, accelerator="cpu")
    model = dict(x_dim=6, z_dim=2, layers=(32,), emission={"emission": "gaussian", "scale": "shared"})
    torch.manual_seed(1)
    one = SVAE(**model, conjugate=True)
    fit(one, x[:60], epochs=60, kl_warmup=30, kl_start=0.01, **options)
    two = SVAE(**model, conjugate=True, modes=2, sweeps=2)
    networks = {k: v for k, v in one.state_dict().items() if not k.startswith("dynamics.")}
    two.load_state_dict(networks, strict=False)
    fit(two, x[:60], epochs=20, calibrate=False, **options)
    test = Sequences.from_arrays(x[60:])
    found = two.states(test).modes.argmax(-1)[:, 1:]  # the first frame has moved from nowhere
    agreement = float((found == truth[60:, 1:]).float().mean())
    assert max(agreement, 1 - agreement) > 0.9
    assert score(two, test, particles=10).nats_per_frame < score(one, test, particles=10).nats_per_frame - 0.5


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SVAE(2, modes=0), ValueError, "modes of SVAE should be a positive integer; got 0"),
        (lambda: SVAE(2, sweeps=0), ValueError, "sweeps of SVAE should be a positive integer; got 0"),
        (lambda: SVAE(2, strength=0), ValueError, "sticky >= 0 and strength > 0; got 2.0 and 0"),
        (lambda: SVAE(2).begin_global(3), TypeError, r"take SVAE\(conjugate=True\)"),
        (lambda: fit(SVAE(2), torch.zeros(2, 3, 2), global_lr=0.1), ValueError, "which this SVAE has not"),
        (
            lambda: fit(SVAE(2, conjugate=True), torch.zeros(2, 3, 2), global_lr=2),
            ValueError,
            r"in \(0, 1\]; got 2",
        ),
    ],
)
def test_what_it_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()
