"""What a GPU asks of a program, on a machine without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten

FORBIDDEN = {
    aten._local_scalar_dense: "asks for a value",
    aten.nonzero: "asks how many there are",
    aten.masked_select: "asks how many there are",
    aten.lift_fresh: "copies from the host",
    aten.bernoulli: "draws random numbers",
    aten.normal: "draws random numbers",
}


class Graph:
    """A CUDA graph on a CPU: the operations that a run came to, repeated on the same memory without running Python again.

    As there, recording computes nothing (what was computed is overwritten with NaN), and refuses what needs the host.
    """

    recorded = played = 0

    def __init__(self, device: torch.device) -> None:
        self.calls: list[_Call] = []

    @staticmethod
    def applies(device: torch.device) -> bool:
        return not torch.is_anomaly_enabled()

    @staticmethod
    def context(device: torch.device) -> int:
        return 0

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
        Graph.recorded += 1
        with _Record() as mode:
            outputs = run()
        self.calls = mode.calls
        for call in self.calls:
            call.forget()
        return outputs

    def play(self) -> None:
        Graph.played += 1
        with torch.inference_mode(False), torch.no_grad():
            for call in self.calls:
                call.again()


class _Call:
    def __init__(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.op, self.args, self.kwargs = op, args, kwargs
        returns = [r.alias_info for r in op._schema.returns]
        self.view = any(alias is not None and not alias.is_write for alias in returns)
        self.writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
        self.out = [] if self.view or self.writes else _tensors(out)

    def forget(self) -> None:
        for tensor in self.out:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def again(self) -> None:
        if self.view:
            return
        out = self.op(*self.args, **self.kwargs)
        for old, new in zip(self.out, _tensors(out) if self.out else (), strict=True):
            old.copy_(new)


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket in FORBIDDEN:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {op} {FORBIDDEN[op.overloadpacket]}"
            )
        out = op(*args, **(kwargs or {}))
        self.calls.append(_Call(op, args, kwargs or {}, out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [a for a in tree_flatten(tree)[0] if isinstance(a, Tensor)]


# --- a device of its own ----------------------------------------------------------------------------------


class Apart(torch.Tensor):
    """A tensor on the device "apart": its numbers are in `raw`, out of reach of whatever is on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> Apart:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device="apart:0",
            requires_grad=requires_grad,
        )

    def __init__(self, raw: Tensor, requires_grad: bool = False) -> None:
        self.raw = raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within, "apart" is a device like a GPU: a tensor has to be moved there, and meets no other that is not there.

    It computes on the CPU, by the CPU's own operations, so numbers are equal.
    """

    def __enter__(self) -> Any:
        self.made = _Made()
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Tensors made from numbers, lists as indices among them: on the host, and then moved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            if isinstance(args[0], Tensor):
                device = args[0].device if device is None else device
                return args[0].to(device, kwargs.get("dtype", args[0].dtype))
            out = function(*args, **kwargs)
            return out if device is None else out.to(device)
        if function is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and len(args) > 1:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        return function(*args, **kwargs)


CROSSING = (aten.copy_, aten._to_copy)
INDEXING = (aten.index, aten.index_put_, aten.index_put, aten._unsafe_index)


def _compute(op: Any, args: Any, kwargs: Any) -> Any:
    indexing = op.overloadpacket in INDEXING  # as with CUDA, indices may be on the host
    tensors = _tensors(((args[0], *args[2:]) if indexing else args, kwargs))
    there = any(isinstance(a, Apart) for a in tensors)
    here = [a for a in tensors if not isinstance(a, Apart) and a.ndim]
    if there and here and op.overloadpacket not in CROSSING:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, apart:0; {here[0].shape} is on cpu"
        )
    asked = kwargs.get("device")
    generator = kwargs.get("generator")
    there = there if asked is None else torch.device(asked).type == "apart"
    if generator is not None and (generator._cdata in Generator.there) != there:
        raise RuntimeError(f"{op}: the generator is not on the device of the numbers")
    if asked is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    out = FUSED.get(op.overloadpacket, op)(*raw_args, **raw_kwargs)
    written = [
        kwargs[a.name] if a.name in kwargs else args[i]
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if not op._schema.returns:
        return None
    if written:
        return written[0] if len(op._schema.returns) == 1 else tuple(written)
    return tree_map(lambda a: Apart(a) if isinstance(a, Tensor) else a, out) if there else out


def _lstm_cell(a: Tensor, b: Tensor, c: Tensor, b_x: Any = None, b_h: Any = None) -> tuple[Tensor, ...]:
    i, f, g, o = sum(t for t in (a, b, b_x, b_h) if t is not None).chunk(4, 1)  # type: ignore[union-attr]
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    d_h: Any, d_c: Any, c: Tensor, new: Tensor, gates: Tensor, bias: bool
) -> tuple[Any, ...]:
    i, f, g, o = gates.chunk(4, 1)
    d_h = torch.zeros_like(c) if d_h is None else d_h
    d = d_h * o * (1 - new.tanh() ** 2) + (0 if d_c is None else d_c)
    parts = d * g * i * (1 - i), d * c * f * (1 - f), d * i * (1 - g**2), d_h * new.tanh() * o * (1 - o)
    d_gates = torch.cat(parts, 1)
    return d_gates, d * f, d_gates.sum(0) if bias else None


def _gru_cell(a: Tensor, b: Tensor, h: Tensor, b_x: Any = None, b_h: Any = None) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (
        (t if s is None else t + s).chunk(3, 1) for t, s in ((a, b_x), (b, b_h))
    )
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (1 - z) * n + z * h, torch.cat([r, z, n, h, h_n], 1)


def _gru_cell_backward(d: Tensor, kept: Tensor, bias: bool) -> tuple[Any, ...]:
    r, z, n, h, h_n = kept.chunk(5, 1)
    d_n, d_z = d * (1 - z) * (1 - n**2), d * (h - n) * z * (1 - z)
    d_r = d_n * h_n * r * (1 - r)
    d_x, d_h = torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_n * r], 1)
    return d_x, d_h, d * z, d_x.sum(0) if bias else None, d_h.sum(0) if bias else None


FUSED: dict[Any, Callable[..., Any]] = {  # which the CPU has not
    aten._thnn_fused_lstm_cell: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl: _lstm_cell_backward,
    aten._thnn_fused_gru_cell: _gru_cell,
    aten._thnn_fused_gru_cell_backward: _gru_cell_backward,
}


def _raw(a: Any) -> Any:
    return a.raw if isinstance(a, Apart) else a


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Generator(torch.Generator):
    """The CPU's, which keeps in mind what device it was made for."""

    there: ClassVar[dict[int, Generator]] = {}

    def __new__(cls, device: Any = "cpu") -> Generator:
        out = super().__new__(cls)
        if torch.device(device).type == "apart":
            cls.there[out._cdata] = out
        return out

    @property
    def device(self) -> torch.device:
        return torch.device("apart:0" if self._cdata in self.there else "cpu")


def register() -> None:
    """Make "apart" a device of this process, for good; without inference mode, which knows no such tensors."""
    backend_registration._setup_privateuseone_for_python_backend("apart", _Module())
    torch.Generator = Generator  # type: ignore[misc]
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # type: ignore[assignment, misc]
