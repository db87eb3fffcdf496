"""`fit(..., compile=...)` on a GPU gives the losses of the plain way. Run by test_recording.py, with "recursion" or "True".

In a process of its own: the type checks that the tests put around every function are not for the compiler.
"""

import sys

import torch

import dynavae
from dynavae.models import VRNN


def main() -> None:
    x = torch.randn(12, 10, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for way in (True if sys.argv[1] == "True" else sys.argv[1], False):
        torch.manual_seed(0)
        model = VRNN(x_dim=3, z_dim=2, h_dim=5)
        result = dynavae.fit(
            model, x, epochs=3, batch_size=4, crop=5, progress=False, accelerator="gpu", compile=way
        )
        losses.append(torch.tensor([row["train/loss"] for row in result.history]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0.0)
    print("equal")


if __name__ == "__main__":
    main()
