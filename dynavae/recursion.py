r"""The recurrent step of the standard models, with few operations and a backward written by hand.

Of a model whose posterior reads z_{<t} only this much has to happen frame by frame:

.. math::
    (\mu_t, r_t) = q(s_{t-1}, e_t), \qquad z_t = \mu_t\,(+\,\mu^p_t) + \sigma(r_t)\,\epsilon_t, \qquad
    s_t = \mathrm{RNN}(s_{t-1}, [g_t, \varphi_z(z_t)]) \;\text{or}\; s_t = z_t

where e_t and g_t read x only and are known for all t, and :math:`\mu^p_t = p(s_{t-1})` is the mean of the
prior where the posterior is relative to it. :func:`recur` runs this and nothing else. Automatic differentiation
of such a loop spends its time on many small operations and on one product of rank B per weight and step. Here the
derivatives of activations and gates are taken for all t at once, a step of the backward loop is one product per
matrix and one multiplication per nonlinearity, and each weight gets its gradient from one product over all frames.
The readable form is the model's `posterior`, `absorb` and `update`, which the plain scan runs: a law compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynavae.nn.cells import CELLS, Cell
from dynavae.nn.heads import ToNormal, to_scale
from dynavae.nn.memory import Memory
from dynavae.nn.mlp import ACTIVATIONS
from dynavae.nn.through_time import Dense, Size, derivative
from dynavae.recording import differentiable


class Stage(NamedTuple):
    """y_t = share * mask_t * act(W x_t + before_t) + after_t."""

    weight: Tensor
    before: Tensor  # a bias (out,), or (T, B, out) if it reads x
    act: nn.Module | None = None
    dropout: float = 0.0
    share: float = 1.0
    after: Tensor | None = None  # (T, B, out)


def stages(
    *modules: nn.Module, before: Tensor | None = None, reads: tuple[Any, ...] = (...,)
) -> list[Stage] | None:
    """The layers of some modules, one after the other, as stages; None if one of them has no fast form.

    Args:
        before: (T, B, out), in place of the first layer's bias: all it reads of x, bias included.
        reads: what the first layer's input consists of, in order: tensors (T, B, .) known for all t, and an
            ellipsis where the recursion's own state comes. None is skipped.
    """
    out: list[Stage] = []
    for layer in _layers(*modules):
        if isinstance(layer, nn.Linear):
            bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            out.append(Stage(layer.weight, bias) if out else _first(layer.weight, bias, before, reads))
        elif isinstance(layer, nn.Dropout) and out:
            if layer.training and layer.p:
                out[-1] = out[-1]._replace(dropout=layer.p)
        elif (
            type(layer) in (nn.Tanh, *ACTIVATIONS.values())
            and out
            and out[-1].act is None
            and not layer.state_dict()
        ):
            out[-1] = out[-1]._replace(act=layer)
        else:
            return None
    return out


def _first(weight: Tensor, bias: Tensor, before: Tensor | None, reads: tuple[Any, ...]) -> Stage:
    """The first layer, with what it reads of known tensors multiplied for all t."""
    parts = [part for part in reads if part is not None]
    own = weight.shape[1] - sum(part.shape[-1] for part in parts if part is not ...)
    columns = weight.split([own if part is ... else part.shape[-1] for part in parts], 1)
    before = bias if before is None else before
    for part, w in zip(parts, columns, strict=True):
        if part is not ...:
            before = before + linear(part, w)
    state = next(w for part, w in zip(parts, columns, strict=True) if part is ...)
    return Stage(state, before)


def _layers(*modules: nn.Module) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _layers(*module)
        else:
            yield module


class Recursed(NamedTuple):
    """What the loop leaves behind, with leading axes (T, K, B)."""

    z: Tensor
    q: Tensor  # what the posterior's network gave, 2 z_dim numbers, before the prior's mean is added
    p: Tensor | None  # what the prior's network gave, if it ran
    f: Tensor | None  # phi_z(z_t)
    h: Tensor | None  # output of the memory before each step
    last: Any  # state of the memory after the last step


class Layer(NamedTuple):
    """Of a stage all that is not a tensor."""

    act: nn.Module | None
    share: float

    def __repr__(self) -> str:
        """Equal for layers that do the same, whatever an activation says of itself."""
        options = () if self.act is None else vars(self.act).items()
        said = {k: v for k, v in options if not k.startswith("_") and k != "training"}
        return f"Layer({type(self.act)}, {said}, {self.share})"


class Kind(NamedTuple):
    """What a recursion is, its tensors apart."""

    size: Size
    nets: tuple[tuple[Layer, ...], ...]  # posterior, features, prior
    scale: str
    min_scale: float
    cell: str | None  # None: z_t is the state
    layers: int  # of the memory


def recur(
    noise: Tensor,
    posterior: Sequence[Stage] | None,
    to_normal: ToNormal,
    start: Any,
    *,
    prior: Sequence[Stage] | None = (),
    features: Sequence[Stage] | None = (),
    memory: Memory | None = None,
    reads: Tensor | None = None,
) -> Recursed | None:
    """Run the recursion over all frames; None if a part of it has no fast form (layer norm, stacked dropout).

    Args:
        noise: standard normals (T, K, B, z_dim).
        posterior: from s_{t-1} to 2 z_dim numbers.
        to_normal: how these become a Gaussian.
        start: s_0, a state of the memory, or z_0 (K, B, z_dim).
        prior: from s_{t-1} to 2 z_dim numbers, whose first half is added to the posterior's mean.
        features: from z_t to what the memory reads; none: z_t itself.
        memory: None makes z_t the state.
        reads: what the memory reads before f_t in its input, (T, B, .); None: nothing.
    """
    if posterior is None or features is None or prior is None:
        return None
    if memory is not None and memory.dropout and memory.training:
        return None
    T, K, B, z_dim = noise.shape
    by_sigmoid = False  # whether f = 2 s - 1 of what the loop computes
    if sigmoids_pay(noise):
        posterior, features, prior = map(_by_sigmoids, (posterior, features, prior))
        by_sigmoid = memory is not None and bool(features) and _is_tanh(features[-1])
        if by_sigmoid:
            features = [*features[:-1], _by_sigmoid(features[-1])]
    nets = posterior, features, prior
    flat: list[Tensor | None] = []
    for net in nets:
        for stage in net:
            flat += [stage.weight, stage.before, stage.after]
    if memory is None:
        flat.append(start.reshape(K * B, -1))
    else:
        f_dim = len(features[-1].weight) if features else z_dim
        for i, state in enumerate(start):
            w_x, w_h, b_x, b_h = memory.weights(i)
            own = b_h if memory.cell == "gru" else None
            before = b_x if own is not None else b_x + b_h
            if i == 0:
                w_reads, w_x = w_x[:, :-f_dim], w_x[:, -f_dim:]
                if by_sigmoid:
                    w_x, before = _after_sigmoid(w_x, before)
                if reads is not None:
                    before = linear(reads, w_reads, before)
            flat += [w_x, before, w_h, own]
            flat += [part.reshape(K * B, -1) for part in state]
    keep = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in flat)
    size = Size(T, K, B, keep)
    masks = [
        size.mask(noise, len(s.weight), s.dropout, s.share) if s.dropout else None
        for net in nets
        for s in net
    ]
    kind = Kind(
        size,
        tuple(tuple(Layer(s.act, s.share) for s in net) for net in nets),
        to_normal.kind,
        to_normal.min_scale,
        None if memory is None else memory.cell,
        0 if memory is None else memory.layers,
    )
    flat = [
        None if a is None else a.to(noise.dtype) for a in flat
    ]  # autocast may have made some of them short
    with torch.autocast(noise.device.type, enabled=False):
        z, q, p, f, *states = differentiable(
            Recursion, kind, keep, noise.reshape(T, K * B, z_dim), *masks, *flat
        )

    def lead(a: Tensor | None) -> Tensor | None:
        return None if a is None else a.view(T, K, B, a.shape[-1])

    h = last = None
    if memory is not None:
        before_first = start[-1][0].reshape(1, K * B, -1)
        h = torch.cat([before_first, states[-memory.parts][:-1]])
        ends = iter([s[-1].view(K, B, -1) for s in states])
        last = tuple(tuple(next(ends) for _ in state) for state in start)
    if by_sigmoid:
        f = 2 * f - 1
    return Recursed(lead(z), lead(q), lead(p), lead(f), lead(h), last)  # type: ignore[arg-type]


# On a CPU torch's tanh takes up to four times as long as its sigmoid. tanh(a) = 2 sigmoid(2 a) - 1, and a layer between two
# products leaves these constants to the weights before and behind it.

SIGMOID = nn.Sigmoid()


def sigmoids_pay(like: Tensor) -> bool:
    """On a CPU, where no number is short: 2 W s and W 1 have to cancel."""
    full = like.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(like.device.type)
    return like.is_cpu and full


def _is_tanh(stage: Stage) -> bool:
    """Whether the stage is tanh(W x + before) and nothing else."""
    return isinstance(stage.act, nn.Tanh) and not stage.dropout and stage.share == 1 and stage.after is None


def _by_sigmoid(stage: Stage) -> Stage:
    """sigmoid(2 a) in place of tanh(a)."""
    return stage._replace(weight=2 * stage.weight, before=2 * stage.before, act=SIGMOID)


def _after_sigmoid(weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """W (2 s - 1) + before = 2 W s + (before - W 1)."""
    return 2 * weight, before - weight.sum(1)


def _by_sigmoids(net: Sequence[Stage]) -> list[Stage]:
    """The same network, with the tanh of its layers but the last as sigmoids."""
    out = list(net)
    for i in range(len(out) - 1):
        if _is_tanh(out[i]):
            weight, before = _after_sigmoid(out[i + 1].weight, out[i + 1].before)
            out[i], out[i + 1] = _by_sigmoid(out[i]), out[i + 1]._replace(weight=weight, before=before)
    return out


class Recursion:
    """The loop and its backward, on buffers that hold all frames."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def forward(self, noise: Tensor, *others: Tensor | None) -> list[Tensor | None]:
        """z, what the last layers of posterior, prior and features gave, and all states of the memory."""
        kind, size = self.kind, self.kind.size
        count = sum(map(len, kind.nets))
        factors, given = iter(others[:count]), iter(others[count:])
        nets: list[list[Dense]] = []
        for net in kind.nets:
            nets.append([])
            for i, layer in enumerate(net):
                weight, before, after = (next(given) for _ in range(3))
                last = i == len(net) - 1
                nets[-1].append(
                    Dense(size, weight, before, after, layer.act, next(factors), layer.share, last)
                )  # type: ignore[arg-type]
        posterior, features, prior = nets
        cells: list[Cell] = []
        if kind.cell is None:
            state = first = next(given)
        else:
            cls = CELLS[kind.cell]
            for _ in range(kind.layers):
                weights = [next(given) for _ in range(4)]
                cells.append(cls(size, *weights, [next(given) for _ in range(cls.parts)]))  # type: ignore[arg-type, misc]
            state = first = cells[-1].start[0]
        z = torch.empty_like(noise)
        zs, eps, z_dim = z.unbind(), noise.unbind(), noise.shape[-1]
        locs, raws = (half.unbind() for half in posterior[-1].y.split(z_dim, -1))
        for t in range(size.T):
            q = state
            for layer in posterior:
                q = layer.forward(t, q)
            loc, raw = locs[t], raws[t]
            if prior:
                p = state
                for layer in prior:
                    p = layer.forward(t, p)
                loc = loc + p[:, :z_dim]
            state = torch.addcmul(loc, to_scale(raw, kind.scale, kind.min_scale), eps[t], out=zs[t])
            for layer in features:
                state = layer.forward(t, state)
            for cell in cells:
                state = cell.forward(t, state)
        if size.keep:
            self.work = nets, cells, first, noise, z
        ends = [net[-1].y if net else None for net in (posterior, prior, features)]
        return [z, *ends, *(part for cell in cells for part in cell.states)]

    def backward(self, *grads: Tensor | None) -> list[Tensor | None]:
        """Gradients of all that `forward` was given; it may be called again."""
        (posterior, features, prior), cells, first, noise, z = self.work
        kind, size, z_dim = self.kind, self.kind.size, noise.shape[-1]
        q = posterior[-1].y
        by_scale = derivative(lambda r: to_scale(r, kind.scale, kind.min_scale), q[..., z_dim:])
        # dz/d(loc, raw) = (1, noise * scale'(raw))
        by_q = torch.cat([torch.ones_like(noise), noise.mul(by_scale)], -1).unflatten(-1, (2, z_dim)).unbind()
        d_q, d_p = _total(grads[1], q), _total(grads[2], prior[-1].y) if prior else None
        d_qs, d_q_halves = d_q.unbind(), d_q.unflatten(-1, (2, z_dim)).unbind()
        d_ps = None if d_p is None else d_p.unbind()
        outer_z, outer_f, *outer_states = (None if g is None else g.unbind() for g in (grads[0], *grads[3:]))
        for net, total in ((posterior, d_q), (features, None), (prior, d_p)):
            for layer in net:
                layer.prepare(total if layer is net[-1] else None)
        parts = len(cells[0].states) if cells else 1
        outer_h = [outer_states[i * parts : (i + 1) * parts] for i in range(len(cells))]
        for cell, outer in zip(cells, outer_h, strict=True):
            cell.prepare(outer)
        nothing = first.new_zeros(())
        carried: Tensor | None = None  # dL/ds_t from all that comes after it
        for t in reversed(range(size.T)):
            d = carried
            for i in reversed(range(len(cells))):
                if i < len(cells) - 1:
                    d = _plus(d, cells[i].d_h)
                d = _plus(d, None if outer_h[i][0] is None else outer_h[i][0][t])
                d = cells[i].backward(t, nothing.expand_as(first) if d is None else d)
            if features:
                d = _plus(d, None if outer_f is None else outer_f[t])
                for layer in reversed(features):
                    d = layer.backward(t, d)
            d = _plus(d, None if outer_z is None else outer_z[t])
            if d is not None:
                d_q_halves[t].addcmul_(d.unsqueeze(1), by_q[t])
                if d_ps is not None:
                    d_ps[t][:, :z_dim].add_(d)
            carried = cells[-1].d_h if cells else None
            for net, ds in ((posterior, d_qs), (prior, d_ps)):
                if net:
                    d = ds[t]
                    for layer in reversed(net[1:]):
                        d = layer.backward(t, d)
                    carried = net[0].backward(t, d, carried)
        before = cells[-1].shifted() if cells else torch.cat([first.unsqueeze(0), z[:-1]])
        out: list[Tensor | None] = []
        for net, x in ((posterior, before), (features, z), (prior, before)):
            for layer in net:
                out += layer.gradients(x)
                x = layer.y
        x = features[-1].y if features else z
        for cell in cells:
            out += cell.gradients(x)
            out += cell.d_start(carried if cell is cells[-1] else cell.d_h)
            x = cell.h
        factors = [None for net in kind.nets for _ in net]
        return [None, *factors, *out] if cells else [None, *factors, *out, carried]


def _total(grad: Tensor | None, like: Tensor) -> Tensor:
    """A buffer that starts with the gradient from outside the recursion."""
    return torch.zeros_like(like) if grad is None else grad.clone(memory_format=torch.contiguous_format)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
