"""What a number on piano rolls has to beat: models without latents, whose likelihood is exact.

marginal      every key sounds with its share of the training frames
first-order   every key depends on itself one frame before (silent before the first)
GRU           one recurrent layer reads x_{<t}; keys are independent given it (factorised Bernoulli)
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dynavae import Sequences
from dynavae.data import DataSplits, SequenceDataset
from dynavae.loading import loader

FLOORS = ("marginal", "first-order", "GRU")
PSEUDO_COUNT = 0.5


class Floor(NamedTuple):
    """Minus the log-likelihood, total nats / total frames, the first frame scored."""

    nats_per_frame: float
    parameters: int
    seconds: float


def floor(name: str, splits: DataSplits, split: str, seed: int = 0) -> Floor:
    """Train one of :data:`FLOORS` on the train split and score it on another."""
    started = time.perf_counter()
    data = splits.split(split)
    if name == "marginal":
        nats, parameters = _counts(splits.split("train"), data, order=0)
    elif name == "first-order":
        nats, parameters = _counts(splits.split("train"), data, order=1)
    else:
        model = _fit_gru(splits, seed)
        nats, parameters = _gru_nats(model, data), sum(p.numel() for p in model.parameters())
    return Floor(nats, parameters, time.perf_counter() - started)


def _counts(train: SequenceDataset, data: SequenceDataset, order: int) -> tuple[float, int]:
    """Keys that depend on nothing (order 0) or on themselves a frame before (order 1)."""

    def before(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(x[:1]), x[:-1]]) if order else np.zeros_like(x)

    now = np.concatenate(train.x).astype(np.float64)
    past = np.concatenate([before(x) for x in train.x]).astype(np.float64)
    p = []
    for state in (0, 1)[: order + 1]:  # of the frame before
        where = past == state
        p.append(((now * where).sum(0) + PSEUDO_COUNT) / (where.sum(0) + 2 * PSEUDO_COUNT))
    nats = 0.0
    for x in data.x:
        q = np.where(before(x) == 1, p[-1], p[0])
        nats -= float(np.log(np.where(x == 1, q, 1 - q)).sum())
    return nats / data.frames, p[0].size * len(p)


class GRU(nn.Module):
    """p(x_t | x_{<t}): logits (B, T, x_dim)."""

    def __init__(self, x_dim: int, h_dim: int = 200, dropout: float = 0.3) -> None:
        super().__init__()
        self.rnn = nn.GRU(x_dim, h_dim, batch_first=True)
        self.dropout, self.to_x = nn.Dropout(dropout), nn.Linear(h_dim, x_dim)

    def forward(self, batch: Sequences) -> Tensor:
        """Minus log p of each sequence, (B,)."""
        x = batch.x
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        logits = self.to_x(self.dropout(self.rnn(before)[0]))
        nats = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        return (nats * batch.valid).sum(1)


@torch.no_grad()
def _gru_nats(model: GRU, data: SequenceDataset) -> float:
    model.eval()
    total = sum(float(model(batch.sequences).sum()) for batch in loader(data, 32))
    model.train()
    return total / data.frames


def _fit_gru(splits: DataSplits, seed: int, epochs: int = 200, patience: int = 8) -> GRU:
    """Adam on pieces of 64 frames, until the valid split has not improved for so many epochs; the best epoch."""
    torch.manual_seed(seed)
    model, train = GRU(splits.x_dim), splits.split("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    best, waited, weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    batches: Any = loader(train, 16, shuffle=True, seed=seed, crop=64)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            loss = model(batch.sequences).sum() / batch.frames
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        nats = _gru_nats(model, splits.split("valid"))
        waited += 1
        if nats < best:
            best, waited, weights = nats, 0, copy.deepcopy(model.state_dict())
        if waited == patience:
            break
    model.load_state_dict(weights)
    return model
