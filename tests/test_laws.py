"""Every law on every model, a model with two latents per step, and models that each law must catch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynavae import DKF, DSAE, MODELS, RVAE, SRNN, STORN, VAE, VRNN, Resampling, Sequences, objectives, scan
from dynavae.distributions import Chain, GaussianMixture, MultivariateNormal, Normal, Product
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import GaussianHead, Memory
from dynavae.nn import memory as memory_module
from dynavae.noise import draw
from dynavae.plan import Plan
from dynavae.testing import (
    LAWS,
    cases,
    check_model,
    dependency_table,
    describe,
    law_device,
    law_docstring,
    sequences,
    small,
)
from dynavae.tree import cat

CASES = list(cases())


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_law(case, law):
    law(case.build)


@pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)
def test_docstring_says_what_is_read(cls):
    law_docstring(cls)


def test_a_docstring_that_is_wrong_or_silent_is_caught():
    class Wrong(VRNN):
        """Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_t)``"""

    class Silent(VRNN):
        """Says nothing."""

    with pytest.raises(AssertionError, match="but it reads"):
        law_docstring(Wrong)
    with pytest.raises(AssertionError, match="should have a line"):
        law_docstring(Silent)


def test_check_model_says_where_a_model_stopped():
    class Misfit(TwoLevels):
        """Reads: ``p(z_t | z_{t-1:t})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1:t})``"""

        def likelihood(self, present: Present) -> Any:
            return self.p_x(present.h[..., 1:])

    with pytest.raises(AssertionError, match=r"law docstring stopped in likelihood, line \d+: RuntimeError"):
        check_model(Misfit)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_cuda_equals_cpu(case):
    law_device(case.build)


def test_cases_cover_every_model_and_variant():
    names = {c.name for c in CASES}
    assert len(names) == len(CASES)
    for name, cls in MODELS.items():
        assert {name, *(f"{name}-{v}" for v in cls.variants)} <= names


# --- several latents per step -------------------------------------------------------------------------


class TwoLevels(SequentialLVM):
    """z_t = (a_t, b_t): a_t | a_{t-1};  b_t | a_t, b_{t-1};  x_t | a_t, b_t;  q likewise, with x_{t:T}.

    Reads: ``p(z_t | z_{t-1:t})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1:t})``
    """

    def __init__(
        self, x_dim: int, h_dim: int = 5, sizes: tuple[int, ...] = (2, 1), control_dim: int = 0
    ) -> None:
        super().__init__(x_dim, sum(sizes), control_dim=control_dim)
        self.sizes = tuple(sizes)
        a, b = self.sizes
        self.p_a, self.p_b = GaussianHead(a + control_dim, a), GaussianHead(a + b, b)
        self.back = Memory(self.input_dim, h_dim)
        self.q_a, self.q_b = GaussianHead(a + h_dim, a), GaussianHead(a + b + h_dim, b)
        self.p_x = self.emit(a + b)

    def evidence(self, seen: Evidence) -> Tensor:
        return self.back.backward(seen.u, seen.lengths)

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.z_dim)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def prior(self, past: Past) -> Chain:
        a, b = past.h.split(self.sizes, -1)
        return Chain(
            [lambda: self.p_a(cat(a, past.control)), lambda now: self.p_b(cat(now, b))], list(self.sizes)
        )

    def posterior(self, past: Past, e: Tensor) -> Chain:
        a, b = past.h.split(self.sizes, -1)
        return Chain([lambda: self.q_a(cat(a, e)), lambda now: self.q_b(cat(now, b, e))], list(self.sizes))

    def likelihood(self, present: Present) -> Any:
        return self.p_x(present.h)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("control_dim", [0, 2])
def test_two_latents_per_step(law, control_dim):
    law(lambda: small(TwoLevels, control_dim=control_dim))


def test_check_model_runs_on_a_class():
    check_model(TwoLevels)


def test_two_latents_per_step_have_an_analytic_kl_and_resample():
    model = small(TwoLevels)
    batch = sequences(model, missing=True)
    noise = draw(model, batch.steps, 4, len(batch), resample=True)
    paths = scan(model, batch, particles=4, noise=noise)
    assert isinstance(paths.q, Product)
    assert paths.kl is not None and paths.kl.shape == (6, 4, 3, 3)
    # the divergence of the second level is taken at the sampled first level, by hand:
    a, b = paths.z.split((2, 1), -1)
    before = torch.cat([torch.zeros_like(b[:1]), b[:-1]])
    torch.testing.assert_close(model.p_b(torch.cat([a, before], -1)).loc, paths.p_z.parts[1].loc)
    by_level = [q.kl(p) for q, p in zip(paths.q.parts, paths.p_z.parts, strict=True)]
    masked = torch.where(paths.valid[:, None, :, None], torch.cat(by_level, -1), 0.0)
    torch.testing.assert_close(paths.kl, masked)
    resampled = scan(model, batch, particles=4, noise=noise, resample=Resampling(threshold=1.0))
    assert bool((resampled.ancestors != torch.arange(4)[None, :, None]).any())
    assert bool(torch.isfinite(objectives.fivo(resampled)).all())


def test_dependencies_of_two_latents_per_step():
    table = dependency_table(small(TwoLevels))
    assert table == ("z_{t-1:t}", "z_t", "x_{t:T}, z_{t-1:t}", None)  # b_t reads a_t within the step


# --- conditionals that read no z ------------------------------------------------------------------------


class ReadsOnlyX(VAE):
    """p(z_t | x_{<t}) and q(z_t | x_t), neither with a particle axis; nothing is declared that would speed it up."""

    autoregressive = True
    mean_field = False

    def __init__(self, x_dim: int, z_dim: int = 3, h_dim: int = 5) -> None:
        super().__init__(x_dim, z_dim, h_dim)
        self.past_x = Memory(self.input_dim, h_dim)
        self.p_z = GaussianHead(h_dim, z_dim)

    def prior(self, past: Past) -> Normal:
        return self.p_z(past.x)


@pytest.mark.parametrize("law", [law for name, law in LAWS.items() if name != "factorisation"])
def test_conditionals_that_read_no_z(law):
    law(lambda: small(ReadsOnlyX))


def test_a_posterior_that_could_be_drawn_at_once_is_reported():
    broken("factorisation", lambda: small(ReadsOnlyX), "reads no z_s with s < t: declare mean_field = True")


# --- laws can fail: a mutant for each -----------------------------------------------------------------


def broken(law: str, build: Any, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        LAWS[law](build)


def declared(cls: type[SequentialLVM], **attributes: Any) -> Any:
    """A build whose model declares something else than it does."""

    def build() -> SequentialLVM:
        model = small(cls)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    return build


@pytest.mark.parametrize(
    ("cls", "attributes", "match"),
    [
        (DKF, {"causal": True}, r"DKF\(\).*posterior at t reads x_s, s > t, but causal is declared"),
        (VRNN, {"causal": False}, r"VRNN\(\).*reads no x_s with s > t: declare causal = True"),
        (
            VAE,
            {"autoregressive": True},
            "declares autoregressive, but neither prior nor likelihood reads x_<t",
        ),
        (
            SRNN,
            {"autoregressive": False},
            "the prior at t reads x_s, s < t, but autoregressive is not declared",
        ),
        (VRNN, {"mean_field": True}, "the posterior at t reads z_s, s < t, but mean_field is declared"),
        (STORN, {"mean_field": False}, "reads no z_s with s < t: declare mean_field = True"),
        (DKF, {"reads_prior": True}, "reads_prior is True, but its posterior does not read past.prior"),
    ],
)
def test_a_wrong_declaration_is_caught(cls, attributes, match):
    broken("factorisation", declared(cls, **attributes), match)


def test_a_posterior_that_reads_the_prior_without_saying_so_is_caught():
    class Undeclared(SRNN):
        def __init__(self, x_dim: int, z_dim: int = 3, h_dim: int = 5) -> None:
            super().__init__(x_dim, z_dim, h_dim)
            self.reads_prior = False

        def posterior(self, past: Past, e: Tensor) -> Normal:
            prior = self.prior(past) if past.prior is None else past.prior
            q = super().posterior(past, e)
            return q._replace(loc=q.loc + prior.loc)

    broken(
        "factorisation", lambda: small(Undeclared), "reads_prior is False, but its posterior reads past.prior"
    )


def test_a_forgotten_shift_is_caught(monkeypatch):
    monkeypatch.setattr(Memory, "before", Memory.run)
    broken("factorisation", lambda: small(SRNN), r"the prior at t reads x_s, s >= t; \(t, s\) = \[\[0, 0\]")


class Unshifted(Memory):
    """Gives m_{t+1} for m_t."""

    def before(self, u, m=None, valid=None, fused=True):
        return self.run(u, m, valid, fused)


class Copies(VAE):
    """Its likelihood reads the frame that it scores, which the gradient of log p(x_t | .) would not show."""

    autoregressive = True

    def __init__(self, x_dim: int, z_dim: int = 3, h_dim: int = 5) -> None:
        super().__init__(x_dim, z_dim, h_dim)
        self.past_x = Unshifted(x_dim, h_dim)
        self.p_x = self.emit(2 * h_dim)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(cat(self.decoder(present.h), present.x))


def test_a_likelihood_that_reads_its_own_frame_is_caught():
    broken("factorisation", lambda: small(Copies), "the likelihood at t reads x_s, s >= t")


class Shifted(VAE):
    """Its fast path pairs frames with the wrong latents."""

    def unroll(self, z, u, c, control, w, h):
        return z, z.roll(1, 0), z[-1]


class BatchMean(VAE):
    """Normalises by the batch."""

    def encode(self, frame: Frame) -> Tensor:
        x = super().encode(frame)
        return x - x.mean(-2, keepdim=True)


class Unused(VAE):
    def __init__(self, x_dim: int, z_dim: int = 3, h_dim: int = 5) -> None:
        super().__init__(x_dim, z_dim, h_dim)
        self.forgotten = nn.Linear(2, 2)


class Restless(VAE):
    """Has randomness of its own."""

    def evidence(self, seen: Evidence) -> Tensor:
        return super().evidence(seen) + 0.1 * torch.randn(())


class Unsaved(VAE):
    """What it computes with is not in its state."""

    def __init__(self, x_dim: int, z_dim: int = 3, h_dim: int = 5) -> None:
        super().__init__(x_dim, z_dim, h_dim)
        self.offset = torch.rand(())

    def evidence(self, seen: Evidence) -> Tensor:
        return super().evidence(seen) + self.offset


class Silent(VAE):
    def __repr__(self) -> str:
        return "a model"


class Double(VAE):
    def likelihood(self, present: Present) -> Any:
        p = super().likelihood(present)
        return p._replace(loc=p.loc.double())


class Squeezes(VAE):
    def evidence(self, seen: Evidence) -> Tensor:
        return super().evidence(seen).squeeze()


class Counts(VRNN):
    """Counts frames from the start of a chunk."""

    def evidence(self, seen: Evidence) -> Tensor:
        t = torch.arange(len(seen.u), dtype=seen.u.dtype).reshape(-1, *[1] * (seen.u.ndim - 1))
        return super().evidence(seen._replace(u=seen.u + t))


@pytest.mark.parametrize(
    ("law", "cls", "match"),
    [
        (
            "fast_equals_slow",
            Shifted,
            r"Shifted\(\) breaks 'fast equals slow': p_x .*one path, complete data",
        ),
        ("rows", BatchMean, "has gradient .* in another row"),
        ("batch", BatchMean, "breaks 'the batch does not matter'"),
        ("gradients", Unused, "forgotten.weight gets no gradient"),
        ("seeds", Restless, "z under the same seed"),
        ("checkpoint", Unsaved, "breaks 'save and load'"),
        ("representation", Silent, "repr should name the class"),
        ("types", Double, "log_likelihood has torch.float64 in a float32 model"),
        ("chunks", Counts, "breaks 'chunks equal the whole': log_"),
    ],
)
def test_a_broken_model_is_caught(law, cls, match):
    broken(law, lambda: small(cls), match)


def test_a_model_that_squeezes_is_caught():
    with pytest.raises((AssertionError, RuntimeError)):
        LAWS["sizes"](lambda: small(Squeezes))


def test_a_copy_that_shares_parameters_is_caught(monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda model: model)
    broken("copy", lambda: small(VAE), "breaks 'copies'")


def test_reading_padding_backwards_is_caught(monkeypatch):
    monkeypatch.setattr(memory_module, "reverse", lambda u, lengths: u.flip(0))
    broken("padding", lambda: small(RVAE), "breaks 'padding changes nothing'")


def test_keeping_hidden_values_is_caught(monkeypatch):
    from_arrays = Sequences.from_arrays

    def careless(x: Any, lengths: Any = None, observed: Any = None, control: Any = None) -> Sequences:
        s = from_arrays(x, lengths, observed, control)
        return Sequences(torch.as_tensor(x).to(s.x.dtype), s.observed, s.lengths, s.control, s.names)

    monkeypatch.setattr(Sequences, "from_arrays", staticmethod(careless))
    broken("unseen", lambda: small(DKF), "in an unseen x")
    monkeypatch.setattr(
        Sequences,
        "hide",
        lambda self, hidden: Sequences(
            self.x, self.observed & ~hidden, self.lengths, self.control, self.names
        ),
    )
    read_on(monkeypatch)  # else nothing reads what is asked for after the last frame that was seen
    broken("forecast", lambda: small(DKF), "in the x to be forecast")


def read_on(monkeypatch) -> None:
    """Inference networks read to the end of each sequence, seen or not."""
    init = Plan.__init__

    def careless(self: Plan, *args: Any) -> None:
        init(self, *args)
        self.seen_until = self.lengths

    monkeypatch.setattr(Plan, "__init__", careless)


@pytest.mark.parametrize("cls", [DKF, DSAE, RVAE])
def test_reading_what_is_asked_for_is_caught(cls, monkeypatch):
    read_on(monkeypatch)
    broken("padding", lambda: small(cls), "with 3 more frames to forecast")


@pytest.mark.parametrize(
    ("kind", "emission"),
    [(MultivariateNormal, "multivariate_gaussian"), (GaussianMixture, "gaussian_mixture")],
)
def test_drawing_without_the_rest_of_the_frame_is_caught(kind, emission, monkeypatch):
    monkeypatch.setattr(
        kind,
        "complete",
        lambda self, x, observed, noise: torch.where(observed, x, self.sample(noise)),
    )
    broken("marginal", lambda: small(VAE, emission=emission), "product of coordinates")


def test_a_bound_without_its_constant_is_caught(monkeypatch):
    monkeypatch.setattr(objectives, "iwae", lambda t: torch.logsumexp(objectives.log_weights(t), 0))
    broken("bounds", lambda: small(VAE), r"renyi\(alpha=0\) and iwae")


def test_a_kl_without_minus_one_is_caught(monkeypatch):
    kl = Normal.kl
    monkeypatch.setattr(Normal, "kl", lambda q, p: kl(q, p) + 0.5)
    broken("divergence", lambda: small(VAE), "sampled minus analytic KL of z")


def test_a_variance_for_a_standard_deviation_is_caught(monkeypatch):
    monkeypatch.setattr(Normal, "sample", lambda p, noise: p.loc + p.scale**2 * noise)
    broken("generation", lambda: small(DKF), "variance of the standardised residual of")


def test_a_likelihood_of_what_is_missing_is_caught(monkeypatch):
    log_prob = Normal.log_prob
    monkeypatch.setattr(Normal, "log_prob", lambda p, x, observed=None: log_prob(p, x))
    broken("marginal", lambda: small(VAE), "for another value there")


def test_an_inexact_exact_model_is_caught():
    def build() -> SequentialLVM:
        model = small(MODELS["LGSSM"])
        exact = model.exact_log_likelihood
        model.exact_log_likelihood = lambda batch: exact(batch) + 1e-3
        return model

    broken("exact", build, "log-weight of each path")


def test_an_m_step_that_falls_is_caught():
    def build() -> SequentialLVM:
        model = small(MODELS["LGSSM"])
        good = model.maximisation

        def overshoots(statistics: Any) -> None:
            good(statistics)
            with torch.no_grad():
                model.C.mul_(1.5)

        model.maximisation = overshoots
        return model

    broken("em", build, r"LGSSM\(\) breaks 'EM never falls': iteration \d took log p\(x\) from")


def test_messages_name_the_options():
    assert (
        describe(small(VRNN, residual=True, emission="laplace")) == "VRNN(residual=True, emission='laplace')"
    )
