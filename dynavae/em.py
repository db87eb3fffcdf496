"""EM: expectation over batches, maximisation in closed form, until log p(x) rises no more.

A model that has it gives two methods: `expectation(batch)`, a tree of sums whose `log_likelihood` is that of the batch, and
`maximisation(sums)`, which moves the parameters. `fit(objective="em")` and `dynavae fit --objective em` run the same steps
with files, validation and resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynavae import tree
from dynavae.batch import Sequences
from dynavae.loading import Batch
from dynavae.model import SequentialLVM
from dynavae.parallel import gathered
from dynavae.tasks.capabilities import require

if TYPE_CHECKING:
    from dynavae.training import FitResult

__all__ = ["add", "choose_start", "fit_em", "polish", "step"]

TRIAL = 10
"""Iterations after which several starts are compared."""


def add(total: Any, more: Any) -> Any:
    """The sum of two trees of sums; None is nothing yet."""
    return more if total is None else tree.tree_map(torch.add, total, more)


def step(model: SequentialLVM, batches: Iterable[Sequences]) -> float:
    """One iteration: returns log p(x) in nats at the parameters *before* it.

    Example:
        >>> from dynavae import LGSSM
        >>> _ = torch.manual_seed(0)
        >>> model, data = LGSSM(x_dim=2, z_dim=1).double(), Sequences.from_arrays(torch.randn(3, 9, 2).double())
        >>> values = [step(model, [data]) for _ in range(5)]
        >>> values == sorted(values)
        True
    """
    sums = None
    for batch in batches:
        sums = add(sums, model.expectation(batch))
    if sums is None:
        raise ValueError("EM needs at least one batch of sequences.")
    model.maximisation(sums)
    return float(sums.log_likelihood)


class Iteration:
    """The expectation of an iteration, batch by batch, of a fit that may share batches with other processes, and resume."""

    def __init__(self) -> None:
        self._sums: Any = None  # of this process so far; a list of tensors, from a checkpoint

    def add(self, model: SequentialLVM, batch: Batch) -> float:
        """Take in a batch; returns its log p(x) in nats."""
        sums = model.expectation(batch.sequences)
        if batch.share is not None and not batch.share.index:  # a process without a row of this batch
            sums = tree.tree_map(torch.zeros_like, sums)
        if isinstance(self._sums, list):
            self._sums = _filled(sums, self._sums)
        self._sums = add(self._sums, sums)
        return float(sums.log_likelihood)

    def finish(self, model: SequentialLVM) -> None:
        """The maximisation, from the sums of all processes."""
        model.maximisation(everywhere(self._sums))
        self._sums = None

    def state(self) -> list[Tensor] | None:
        """What a checkpoint within an iteration has to hold: the sums of all processes, which all come here."""
        mine = self._sums if self._sums is None or isinstance(self._sums, list) else tree.leaves(self._sums)
        found = [part for part in gathered(mine and [a.cpu() for a in mine]) if part is not None]
        return [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)] if found else None

    def restore(self, state: list[Tensor] | None) -> None:
        self._sums = state


def everywhere(sums: Any) -> Any:
    """A tree of sums over all processes."""
    mine = [a.cpu() for a in tree.leaves(sums)]  # a tensor of one GPU would arrive on that GPU
    found = [torch.stack(parts).sum(0) for parts in zip(*gathered(mine), strict=True)]
    return _filled(sums, found)


def _filled(like: Any, tensors: list[Tensor]) -> Any:
    """A tree with these tensors in place of its own."""
    found = iter(tensors)
    return tree.tree_map(lambda a: next(found).to(a), like)


def choose_start(model: SequentialLVM, data: Any, starts: int = 1, seed: int = 0) -> float | None:
    """Start from the data, the best of several after a few iterations of each.

    Args:
        model: with a way to start from data (`em_start`); others keep their parameters.
        data: a data set, or `Sequences`.
        starts: how many are tried, each with a seed of its own.
        seed: of the first.

    Returns:
        log p(x) of the best of several, in nats, with its log-prior if EM has one; None if there was no choice.

    Raises:
        ValueError: several starts of a model that has none of its own.
    """
    from dynavae.training import values

    frames = list(values(data))
    if starts == 1:
        model.em_start(frames, torch.Generator().manual_seed(seed))
        return None
    like = next(model.parameters())
    whole = (data if isinstance(data, Sequences) else data.batch(list(range(len(data))))).to(like)
    best, weights = -torch.inf, model.state_dict()
    for i in range(starts):
        if not model.em_start(frames, torch.Generator().manual_seed(seed + i)):
            raise ValueError(
                f"{type(model).__name__} keeps the parameters it was built with, so starts={starts} would be all the same: "
                "leave starts=1; for an LGSSM take LGSSM(start='data')."
            )
        for _ in range(TRIAL):
            step(model, [whole])
        with torch.no_grad():
            found = float(model.exact_log_likelihood(whole).sum()) + model.em_log_prior()
        if found > best:
            best, weights = found, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    return best


def polish(model: SequentialLVM, data: Any, iterations: int = 200) -> float:
    r"""Go on from where EM stopped, in place, by quasi-Newton ascent of log p(x) with its exact gradient.

    EM takes steps in proportion to the share of the information that is not missing, so it crawls where the variances of
    the states are small against the noise. L-BFGS (Liu and Nocedal, 1989) learns the curvature instead: near a maximum it
    is faster than linear. Each step is that of a line search, and the best parameters are kept: log p(x) never falls. It is
    no cure for a bad start, as the likelihood is not concave: run EM first.

    Args:
        model: with an exact log p(x) that can be differentiated, such as an LGSSM; best in float64.
        data: a `SequenceDataset`, `Sequences`, an array (B, T, x_dim) or a list of (T_i, x_dim); NaN is missing.
        iterations: of L-BFGS, at most; it stops by itself at a maximum.

    Returns:
        log p(x) of the data at the end, in nats.

    Raises:
        ValueError: a model without an exact log p(x), without a parameter to learn, or fewer than one iteration.

    Example:
        >>> from dynavae import structural_model
        >>> from dynavae.exact.structural import level
        >>> x = torch.randn(1, 100, 1, dtype=torch.float64).cumsum(1)
        >>> model = structural_model(level()).double()
        >>> before = model.exact_log_likelihood(Sequences.from_arrays(x)).item()
        >>> polish(model, x) > before
        True
    """
    from dynavae.loading import to_data

    require(model, "exact")
    if iterations < 1:
        raise ValueError(f"iterations should be at least 1; got {iterations}.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"all parameters of this {type(model).__name__} are held; there is nothing to learn."
        )
    found = data if isinstance(data, Sequences) else to_data(data)
    batch = (found if isinstance(found, Sequences) else found.batch(list(range(len(found))))).to(
        parameters[0]
    )
    frames = int(batch.valid.sum())
    best, weights = -torch.inf, model.state_dict()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
    )

    def loss() -> float:
        nonlocal best, weights
        optimizer.zero_grad()
        total = model.exact_log_likelihood(batch).sum()
        (-total / frames).backward()
        value = float(total.detach())
        if value > best:
            best, weights = value, {k: v.clone() for k, v in model.state_dict().items()}
        return -value / frames

    with torch.enable_grad():
        optimizer.step(loss)
    optimizer.zero_grad()
    model.load_state_dict(weights)
    return best


_polish = polish  # fit_em has an argument of that name


def fit_em(
    model: SequentialLVM,
    train: Any,
    valid: Any = None,
    *,
    iterations: int = 100,
    tolerance: float | None = 1e-6,
    starts: int = 1,
    start: bool = True,
    batch_size: int = 1024,
    polish: int = 0,
    **options: Any,
) -> FitResult:
    """Fit a model by EM, in place: :func:`dynavae.fit` with `objective="em"`.

    Each iteration raises log p(x) of the training data, or leaves it as it is; there is no learning rate. With a prior of
    the parameters (`HMM(pseudo_count=...)`) it raises log p(x) plus the log of that prior, which `tolerance` goes by.

    Args:
        model: that has an M-step: LGSSM, HMM, GMM, PPCA, FactorAnalysis (with an emission that has one).
        train: a `SequenceDataset`, `Sequences`, an array (B, T, x_dim) or a list of (T_i, x_dim); NaN is missing.
        valid: the same, to keep the iteration that is best on it; None keeps the last.
        iterations: at most so many.
        tolerance: stop when an iteration gains less, in nats per frame of `train`; None never does.
        starts: try so many, for a few iterations each, and go on from the best.
        start: begin at a fit of the data's moments or clusters, where the model has one; False begins at the model's
            parameters. An LGSSM has one if it was built with `start="data"` or `"local_level"`.
        batch_size: sequences per E-step: memory only, the sums are those of all.
        polish: afterwards, at most so many steps of :func:`dynavae.em.polish`, for an LGSSM whose variances are small; the
            history of the result is that of EM. Not with `valid` or `out_dir`.
        **options: of :func:`dynavae.fit`: out_dir, patience, seed, progress, resume, ...

    Raises:
        ValueError, TypeError: as :func:`dynavae.fit`; for a model without an M-step; for `polish` with `valid` or `out_dir`.

    Example:
        >>> from dynavae import HMM
        >>> x = torch.cat([torch.zeros(1, 20, 1), torch.ones(1, 20, 1)], 1) + 0.1 * torch.randn(1, 40, 1)
        >>> model = HMM(x_dim=1, states=2, emission={"emission": "gaussian", "scale": "learned"})
        >>> result = fit_em(model, x, iterations=20, progress=False)
        >>> result.history[-1]["train/nats_per_frame"] < result.history[0]["train/nats_per_frame"]
        True
    """
    from dynavae.training import fit

    require(model, "em")
    if polish and (valid is not None or options.get("out_dir") is not None):
        raise ValueError(
            "polish climbs the likelihood of train alone, after what is selected by valid and saved in out_dir: leave them "
            "out, or call dynavae.em.polish(model, train) yourself and save the model."
        )
    result = fit(
        model,
        train,
        valid,
        objective="em",
        epochs=iterations,
        tolerance=tolerance,
        starts=starts,
        calibrate=start,
        batch_size=batch_size,
        **options,
    )
    if polish:
        _polish(model, train, polish)
    return result
