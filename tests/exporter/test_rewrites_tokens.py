from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.rewrites import attention, embedding, loss, normalization, softmax
from tests.exporter.rewriting import draw, gradients, names, rewritten, rewritten_operator, targets, turns

aten = torch.ops.aten

MASKS = list(product([True, False], repeat=3))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 5, 16), 1), ((2, 5, 16), 2), ((7, 3), 1), ((2, 3, 4, 5), 3), ((6,), 1)], ids=str
)
def test_layer_norm(shape: tuple[int, ...], axes: int, affine: bool, mask: tuple[bool, bool, bool]) -> None:
    if not affine:
        mask = (mask[0], False, False)
    x, grad, normalized = 2 * draw(*shape) + 3, draw(*shape), list(shape[-axes:])
    weight, bias = (draw(*normalized), draw(*normalized)) if affine else (None, None)
    want = aten.native_layer_norm(x, normalized, weight, bias, 1e-5)
    torch.testing.assert_close(normalization.layer_norm(x, axes, weight, bias, 1e-5), want)
    backward = (grad, x, normalized, want[1], want[2], weight, bias, list(mask))
    expected = aten.native_layer_norm_backward(*backward)
    got = normalization.layer_norm_backward(grad, x, axes, want[1], want[2], weight, mask)
    assert [value is not None for value in got] == list(mask)
    for ours, theirs, asked in zip(got, expected, mask, strict=True):
        if asked:
            torch.testing.assert_close(ours, theirs)
    operator = aten.native_layer_norm.default
    assert operator not in targets(rewritten_operator(operator, x, normalized, weight, bias, 1e-5))


def test_root_mean_square_norm_is_made_of_fast_operators() -> None:
    model, x = nn.RMSNorm(8).double(), draw(2, 5, 8)
    graph = rewritten(gradients(model, x), x, *(p.detach() for p in model.parameters()))
    assert not names(graph) & {"pow", "mean"}


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("logarithm", [False, True])
def test_softmax(axis: int, logarithm: bool) -> None:
    x, grad = 40 * draw(3, 4, 5), draw(3, 4, 5)
    forward = aten._log_softmax.default if logarithm else aten._softmax.default
    backward = aten._log_softmax_backward_data.default if logarithm else aten._softmax_backward_data.default
    y = forward(x, axis, False)
    for graph in (
        rewritten_operator(forward, x, axis, False),
        rewritten_operator(backward, grad, y, axis, torch.float64),
    ):
        assert not {forward, backward} & set(targets(graph))
    functions = (softmax.log_softmax, softmax.log_softmax_backward)
    ours, ours_backward = functions if logarithm else (softmax.softmax, softmax.softmax_backward)
    last = forward(x, -1, False)
    torch.testing.assert_close(ours(x), last)
    torch.testing.assert_close(ours_backward(grad, last), backward(grad, last, -1, torch.float64))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "mask", ["none", "causal", "boolean", "float", "keys", "nothing seen", "little seen"]
)
@pytest.mark.parametrize(("t", "s", "d"), [(5, 5, 8), (7, 4, 3)])
def test_attention(t: int, s: int, d: int, mask: str, scale: float | None) -> None:
    tensors = [draw(2, 3, t, d), draw(2, 3, s, d), draw(2, 3, s, d)]
    boolean = torch.ones(t, s).tril().bool()
    added = {
        "boolean": torch.zeros(t, s, dtype=torch.float64).masked_fill(~boolean, -math.inf),
        "float": draw(2, 3, t, s),
        "keys": draw(2, 1, 1, s),
        # The second position sees nothing: PyTorch gives zeros for -inf, and means for any finite number.
        "nothing seen": torch.zeros(t, s, dtype=torch.float64).index_fill(0, torch.tensor([1]), -math.inf),
        "little seen": torch.zeros(t, s, dtype=torch.float64).index_fill(0, torch.tensor([1]), -1e37),
    }.get(mask)
    causal, factor = mask == "causal", 1 / math.sqrt(d) if scale is None else scale
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    want = F.scaled_dot_product_attention(*leaves, attn_mask=added, is_causal=causal, scale=scale)
    grad = torch.randn_like(want)
    got, logarithms = attention.attention(*tensors, added, causal, factor)
    torch.testing.assert_close(got, want)
    ours = attention.attention_backward(grad, *tensors, got, logarithms, added, causal, factor)
    torch.testing.assert_close(ours, torch.autograd.grad(want, leaves, grad))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            options: dict[str, Any] = {"attn_mask": boolean if mask == "boolean" else added}
            y = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale, **options)
        return y, torch.autograd.grad(y, leaves, torch.ones_like(y))

    graph = rewritten(step, *tensors)
    assert not [name for name in names(graph) if "attention" in name or "softmax" in name]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first: bool, need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((5, 5), -math.inf, dtype=x.dtype).triu(1) if batch_first else None
            y, _ = self.attention(x, x, x, need_weights=need_weights, attn_mask=mask)
            return y

    model, x = Model().double(), draw(5, 5, 16)
    graph = rewritten(gradients(model, x), x, *(p.detach() for p in model.parameters()))
    assert not names(graph) & {"addmm", "baddbmm", "_softmax"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_never_permutes_activations(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        64, 2, 128, 0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).double()
    x = draw(4, 32, 64)
    # GELU's tail is approximated.
    graph = rewritten(gradients(layer, x), x, *(p.detach() for p in layer.parameters()), tolerance=1e-5)
    assert not turns(graph)
    slow = {"where", "erf", "gelu", "native_layer_norm", "_softmax", "addmm", "transpose_copy", "expand_copy"}
    assert not names(graph) & slow


@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("padding", [-1, 0, 3])
@pytest.mark.parametrize("count", [10, embedding.WIDEST, embedding.WIDEST + 1])
def test_embedding_backward(count: int, padding: int, shape: tuple[int, ...]) -> None:
    indices = torch.randint(0, 10, shape)
    indices.view(-1)[:2] = 3
    grad = draw(*shape, 6)
    arguments = (grad, indices, count, padding, False)
    want = aten.embedding_dense_backward(*arguments)
    torch.testing.assert_close(embedding.embedding_backward(grad, indices, count, padding), want)
    operator = aten.embedding_dense_backward.default
    assert operator not in targets(rewritten_operator(operator, *arguments))


def test_gradients_scaled_by_frequency() -> None:
    operator = aten.embedding_dense_backward.default
    grad, rows = draw(4, 3), torch.tensor([0, 1, 1, 2])
    graph = rewritten_operator(operator, grad, rows, 5, -1, True)
    torch.testing.assert_close(graph(grad, rows), operator(grad, rows, 5, -1, True))


@pytest.mark.parametrize("reduction", [0, loss.MEAN, loss.SUM])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [(), (3, 4)], ids=["classes", "pixels"])
def test_nll_loss(pixels: tuple[int, ...], weighted: bool, reduction: int) -> None:
    scores, target = draw(6, 5, *pixels), torch.randint(0, 5, (6, *pixels))
    target[0] = -100
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    forward = aten.nll_loss2d_forward.default if pixels else aten.nll_loss_forward.default
    backward = aten.nll_loss2d_backward.default if pixels else aten.nll_loss_backward.default
    want, total = forward(scores, target, weight, reduction, -100)
    graph = rewritten_operator(forward, scores, target, weight, reduction, -100)
    assert forward not in targets(graph)
    grad = torch.randn_like(want)
    graph = rewritten_operator(backward, grad, scores, target, weight, reduction, -100, total)
    assert backward not in targets(graph)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted: bool, smoothing: float) -> None:
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    target = torch.tensor([0, 4, 2, -100])

    def step(logits: Tensor) -> Any:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = F.cross_entropy(leaf, target, weight, label_smoothing=smoothing)
        return value, torch.autograd.grad(value, leaf)

    rewritten(step, 30 * draw(4, 5))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss(reduction: str) -> None:
    def step(x: Tensor, target: Tensor) -> Any:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = F.mse_loss(leaf, target, reduction=reduction)
        return value, torch.autograd.grad(value, leaf, torch.ones_like(value))

    assert not [name for name in names(rewritten(step, draw(4, 5), draw(4, 5))) if "mse" in name]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(512, 64, 16), (512, 16, 64), (64, 48, 48)])
def test_the_smaller_factor_of_a_weight_gradient_is_turned(rows: int, inner: int, columns: int) -> None:
    graph = rewritten(lambda a, b: aten.mm(aten.t(a), b), draw(rows, inner), draw(rows, columns))
    largest = max(rows * inner, rows * columns)
    turned = [
        node.args[0].meta["val"].numel()
        for node in graph.graph.nodes
        if node.target in (aten.permute_copy.default, aten.linear.default)
    ]
    assert len(turned) <= 3
    assert inner <= columns or largest not in turned
