"""QuantLinear: packed weights, and where the recipe says so quantized and rotated inputs.

    y = int_gemm(quantize(rotate(x)), W) + bias      activation_format given
    y = weight_only_gemm(rotate(x), W) + bias        activation_format None, or at most decode_rows
                                                     rows (lowbit/nn/decode.py)

An activation_format with groups quantizes the input in slices: lowbit/nn/slices.py.

State dict: codes, scale, zero_point (asymmetric weights only), channel_scale (two-level scales
only), bias; canonical layout. And what a rotation of the input has learned: rotation.matrix_0.

In memory the codes of a layer lie as the kernels of their device read them (`QuantLinear.prepare`,
`layout`), and are laid out anew when they are assigned, loaded or moved. So on a CPU they are
ROW_MAJOR, and what is saved is ROW_MAJOR wherever it comes from.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.nn.online_map import OnlineMap
from lowbit.nn.slices import cut, quantized_by_slice, slices_of
from lowbit.ops import hadamard_quant, int_gemm, quantize, to_layout, weight_only_gemm
from lowbit.ops.kernel_layouts import input_layout, laid_out_for_device
from lowbit.transforms.online import OnlineTransform


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is saved and moved with its module, and never trained."""
    return nn.Parameter(tensor, requires_grad=False)


class QuantLinear(nn.Module):
    """A linear layer over a PackedTensor.

    dtype: of the output for a quantized input; without an activation_format, the input's that the
    weight is prepared for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: IntFormat,
        activation_format: IntFormat | None = None,
        *,
        bias: bool = False,
        activation_clip: float = 1.0,
        transform: OnlineTransform | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if transform is not None and in_features % (transform.order * transform.inner):
            raise InputError(
                f"the input rotation must divide in_features {in_features}, got order "
                f"{transform.order} x inner {transform.inner}"
            )
        permuted = transform is not None and transform.kind == "permutation"
        if permuted and (activation_format is not None or transform.order != in_features):
            raise InputError(
                f"a permutation must be of all {in_features} features of a 16-bit input, got "
                f"order {transform.order} and activation {activation_format}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight_format, self.activation_format = weight_format, activation_format
        self.activation_clip = activation_clip
        self.rotation = None if transform is None else OnlineMap(transform, device)
        self.dtype = dtype
        self.backend: str | None = None
        self.decode_rows = 0  # inputs of so many rows, or fewer, are not quantized
        self.group: dist.ProcessGroup | None = None  # whose outputs are parts of a sum
        self.layout = Layout.ROW_MAJOR  # of self.codes, at this time

        groups = weight_format.num_groups(in_features)
        row_bytes = in_features * weight_format.storage_bits // 8

        def empty(width: int, dtype: torch.dtype) -> nn.Parameter:
            return frozen(torch.empty(out_features, width, dtype=dtype, device=device))

        self.codes = empty(row_bytes, torch.uint8)
        self.scale = empty(groups, weight_format.weight_scale_dtype)
        self.zero_point = None if weight_format.symmetric else empty(groups, torch.uint8)
        self.channel_scale = empty(1, torch.float32) if weight_format.two_level else None
        self.bias = frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_packed(
        cls,
        weight: PackedTensor,
        bias: Tensor | None = None,
        activation_format: IntFormat | None = None,
        activation_clip: float = 1.0,
        transform: OnlineTransform | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantLinear":
        """The module of a packed weight [out_features, in_features]."""
        out_features, in_features = weight.shape
        module = cls(
            in_features,
            out_features,
            weight.format,
            activation_format,
            bias=bias is not None,
            activation_clip=activation_clip,
            transform=transform,
            dtype=dtype,
            device=weight.codes.device,
        )
        module.assign(weight)
        if bias is not None:
            module.bias = frozen(bias.detach().to(dtype))
        return module

    def assign(self, weight: PackedTensor):
        """Take over the tensors of `weight`, which must be what this module was built for."""
        weight = to_layout(weight, Layout.ROW_MAJOR, self.backend)
        expected = (self.weight_format, (self.out_features, self.in_features), self.scale.dtype)
        got = (weight.format, tuple(weight.shape), weight.scale.dtype)
        if got != expected:
            raise InputError(f"packed weight must be {expected}, got {got}")
        self.codes, self.scale = frozen(weight.codes), frozen(weight.scale)
        self.layout = Layout.ROW_MAJOR
        if weight.zero_point is not None:
            self.zero_point = frozen(weight.zero_point)
        if weight.channel_scale is not None:
            self.channel_scale = frozen(weight.channel_scale)
        self.prepare()

    def prepare(self):
        """Lay the codes out for the kernels that will read them: those of `backend` and of the
        device where they lie. Another call, after either has changed, undoes it where need be."""
        weights = self.prepared_weights
        if self.backend in (None, "cuda"):
            grid, decode = self.activation_format, self.decode_rows > 0
            grid = grid and replace(grid, group_size=None)
            weights = [laid_out_for_device(w, grid, self.dtype, decode) for w in weights]
        else:
            weights = [to_layout(w, Layout.ROW_MAJOR) for w in weights]
        if weights[0].layout is Layout.ROW_MAJOR:
            self._make_row_major()
        elif weights[0].layout is not self.layout:
            codes = [w.codes for w in weights]
            codes = codes[0] if len(codes) == 1 else torch.cat(codes)
            self.codes, self.layout = frozen(codes), weights[0].layout

    def _make_row_major(self):
        if self.layout is not Layout.ROW_MAJOR:
            self.codes, self.layout = frozen(self.packed_weight.codes), Layout.ROW_MAJOR

    @property
    def slices(self) -> int:
        """Of the input, each quantized by itself."""
        grid = self.activation_format
        return 1 if grid is None else grid.num_groups(self.in_features)

    @property
    def packed_weight(self) -> PackedTensor:
        """The weight in the canonical layout; a copy of its codes where the layer is prepared."""
        codes = self.codes
        if self.layout is not Layout.ROW_MAJOR:
            parts = [to_layout(w, Layout.ROW_MAJOR).codes for w in self.prepared_weights]
            codes = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        shape = torch.Size((self.out_features, self.in_features))
        tensors = (codes, self.scale, self.zero_point)
        last = (self.weight_format, Layout.ROW_MAJOR, shape, self.channel_scale)
        return PackedTensor(*tensors, *last)

    @property
    def prepared_weights(self) -> list[PackedTensor]:
        """The weight as its GEMM gets it: the columns of each slice of the input, whose codes lie
        one behind the other in a kernel layout."""
        count = self.slices
        is_row_major = self.layout is Layout.ROW_MAJOR
        codes = cut(self.codes, count) if is_row_major else self.codes.chunk(count)
        scales = (cut(self.scale, count), cut(self.zero_point, count))
        shape = torch.Size((self.out_features, self.in_features // count))
        last = (self.weight_format, self.layout, shape, self.channel_scale)
        return [PackedTensor(*part, *last) for part in zip(codes, *scales, strict=True)]

    def quantize_input(self, x: Tensor) -> PackedTensor:
        """x, rotated and quantized; linears that read the same input may share the result."""
        if self.activation_format is None:
            raise ValueError("quantize_input needs an activation_format: this layer is weight-only")
        if self.rotation is None:
            return quantize(
                x,
                self.activation_format,
                self.activation_clip,
                self.input_layout,
                backend=self.backend,
            )
        x, order, inner, matrix = self.rotation.last(x, self.backend)
        return quantized_by_slice(
            lambda rows, format: hadamard_quant(
                rows,
                format,
                order,
                inner,
                matrix,
                self.activation_clip,
                self.input_layout,
                backend=self.backend,
            ),
            self.activation_format,
            x,
        )

    def quantizes(self, x: Tensor) -> bool:
        """Whether x [..., in_features], of any shape of so many elements, is quantized."""
        rows = x.numel() // self.in_features
        return self.activation_format is not None and not 0 < rows <= self.decode_rows

    @property
    def transform(self) -> OnlineTransform | None:
        """What rotates the input."""
        return None if self.rotation is None else self.rotation.transform

    @property
    def input_layout(self) -> Layout:
        """The layout of a quantized input that suits this weight's kernel."""
        return input_layout(self.layout)

    def forward(self, x: Tensor | PackedTensor, residual: Tensor | None = None) -> Tensor:
        """With a residual, of the output's shape and dtype, their sum."""
        if self.group is None:
            return self._of_own_inputs(x, residual)
        y = self._of_own_inputs(x, None)
        dist.all_reduce(y, group=self.group)
        return y if residual is None else y + residual

    def _of_own_inputs(self, x: Tensor | PackedTensor, residual: Tensor | None) -> Tensor:
        if isinstance(x, PackedTensor):
            if self.layout is not Layout.ROW_MAJOR:  # a layer that shares x may have wanted another
                x = to_layout(x, self.input_layout, self.backend)
            return self._product(x, self.dtype, residual)
        if self.quantizes(x):
            return self._product(self.quantize_input(x), x.dtype, residual)
        if self.rotation is not None:
            x = self.rotation(x, self.backend)
        first, *others = zip(cut(x, self.slices), self.prepared_weights, strict=True)
        in_one = None if others else residual
        y = weight_only_gemm(*first, self.bias, self.backend, in_one)
        for part in others:
            y = weight_only_gemm(*part, None, self.backend, y)
        return y if in_one is residual else y + residual

    def _product(self, x: PackedTensor, dtype: torch.dtype, residual: Tensor | None) -> Tensor:
        first, *others = zip(slices_of(x), self.prepared_weights, strict=True)
        in_one = None if others else residual
        y = int_gemm(*first, self.bias, dtype, backend=self.backend, residual=in_one)
        for part, weight in others:
            y = int_gemm(part, weight, None, dtype, backend=self.backend, residual=y)
        return y if residual is in_one else y + residual

    def _apply(self, fn, recurse=True):
        """model.to(dtype) changes what the layer computes in, never the scales it was given;
        model.to(device) lays the codes out as that device's kernels read them."""
        scales = {"scale": self.scale, "channel_scale": self.channel_scale}
        # what their data was, also after it is replaced
        given = {name: scale.detach() for name, scale in scales.items() if scale is not None}
        super()._apply(fn, recurse)
        for name, scale in given.items():
            if getattr(self, name).dtype != scale.dtype:
                getattr(self, name).data = scale.to(self.codes.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.prepare()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not Layout.ROW_MAJOR:
            destination[prefix + "codes"] = self.packed_weight.codes

    def _load_from_state_dict(self, *args):
        self._make_row_major()  # as what is loaded
        super()._load_from_state_dict(*args)
        self.prepare()

    def extra_repr(self) -> str:
        activation = self.activation_format
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, weight={_describe(self.weight_format)}",
            f"activation={'float' if activation is None else _describe(activation)}",
        ]
        if self.transform is not None:
            t = self.transform
            parts.append(f"rotation={t.kind}(order={t.order}, inner={t.inner})")
        if self.decode_rows:
            parts.append(f"float up to {self.decode_rows} rows")
        return ", ".join(parts)


def _describe(grid: IntFormat) -> str:
    group = "" if grid.group_size is None else f"g{grid.group_size}"
    levels = "-twolevel" if grid.two_level else ""
    return f"int{grid.bits}{group}{'' if grid.symmetric else '-asym'}{levels}"


def prepare(model: nn.Module):
    """Lay out the weights of every QuantLinear of `model` for its backend and device.

    They do so themselves when they are assigned, loaded from a state dict or moved, and set_backend
    calls this: it is for who writes to a layer's `backend` or `codes` directly.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()


def shared_input(linear: nn.Module, x: Tensor | PackedTensor) -> Tensor | PackedTensor:
    """What linears that read x take: x quantized once, where `linear`, one of them, does so."""
    if isinstance(x, PackedTensor):
        return x
    if isinstance(linear, QuantLinear) and linear.quantizes(x):
        return linear.quantize_input(x)
    return x


def check_same_input(block_part: str, *linears: nn.Module):
    """Linears that share a quantized input must agree on how it is rotated and quantized."""
    grids = {
        (m.activation_format, m.activation_clip, m.transform)
        for m in linears
        if isinstance(m, QuantLinear)
    }
    if len(grids) > 1:
        raise InputError(
            f"linears of the {block_part} that share an input must rotate and quantize it "
            f"alike, got {sorted(map(str, grids))}"
        )
