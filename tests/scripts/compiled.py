"""`compile=True` gives the trajectory and the gradients of the plain scoring, at two lengths. Run by test_recursion.py.

In a process of its own: the type checks that the tests put around every function are not for the compiler.
"""

import torch

from dynavae import Sequences, objectives
from dynavae.models import VRNN
from dynavae.noise import draw
from dynavae.scan import scan


def main() -> None:
    torch.manual_seed(0)
    model = VRNN(x_dim=3, z_dim=2, h_dim=5, emission="bernoulli")
    for steps in (6, 9):
        x = torch.bernoulli(torch.full((4, steps, 3), 0.4))
        batch = Sequences.from_arrays(x, lengths=[steps, steps, 3, 1])
        noise = draw(model, steps, 2, 4)
        runs = [scan(model, batch, particles=2, noise=noise, compile=c) for c in (True, False)]
        values = [objectives.elbo(run).sum() + objectives.elbo(run, kl="sample").sum() for run in runs]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(runs[0].p_x.mean, runs[1].p_x.mean)
        grads = [torch.autograd.grad(v, list(model.parameters())) for v in values]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main()
