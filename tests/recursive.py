"""Models of which the tests of the recursion, and of its recordings, make use."""

from __future__ import annotations

import torch


def build(kind: type, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(x_dim=3, z_dim=2, h_dim=5, **options).double()
    with torch.no_grad():  # far from the symmetric start, so that no term vanishes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
