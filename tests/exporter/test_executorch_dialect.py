from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.device_runtime.executorch_engine import ExecuTorchProgram
from frostline.exporter.executorch_dialect import execution_graph
from frostline.exporter.executorch_lowering import lower_portable, missing_kernels

aten = torch.ops.aten


def _traced(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    traced: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    return traced


def _run(
    function: Callable[..., Any], arguments: Sequence[Tensor], written: Sequence[int] = ()
) -> list[Tensor]:
    """What the runtime returns; `arguments` are written."""
    lowered = lower_portable(_traced(function, *arguments), arguments, written)
    # Results lie in its memory.
    program = ExecuTorchProgram(lowered.content, "test")
    return [result.clone() for result in program.run(arguments)]


def _targets(function: Callable[..., Any], *arguments: Tensor) -> list[str]:
    graph = execution_graph(_traced(function, *arguments), {}).graph
    return [str(node.target) for node in graph.nodes if node.op in ("call_function", "get_attr")]


def test_arguments_are_written_once_their_old_values_have_been_read() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    (total,) = _run(lambda a, b: [b, a * 2, a + b], [a, b], written=[0, 1])
    torch.testing.assert_close(
        (a, b, total), (torch.tensor([3.0, 4.0]), torch.tensor([2.0, 4.0]), torch.tensor([4.0, 6.0]))
    )


def test_an_argument_is_written_after_what_reads_it_through_a_view() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    (sums,) = _run(lambda a: [a + 1, a.view(3, 2).sum(1)], [a], written=[0])
    torch.testing.assert_close(sums, torch.tensor([1.0, 5.0, 9.0]))
    torch.testing.assert_close(a, torch.arange(6.0).reshape(2, 3) + 1)


def test_a_view_of_one_argument_is_written_to_another() -> None:
    a, b = torch.arange(4.0), torch.zeros(2, 2)
    _run(lambda a, b: [a * 0, a.view(2, 2), b.sum(0)], [a, b], written=[0, 1])
    torch.testing.assert_close((a, b), (torch.zeros(4), torch.arange(4.0).reshape(2, 2)))


def test_an_argument_that_keeps_its_value_is_left_alone() -> None:
    a = torch.tensor([1.0])
    (double,) = _run(lambda a: [a, a * 2], [a], written=[0])
    assert (a.item(), double.item()) == (1.0, 2.0)


def test_views_cost_nothing_and_are_copied_where_they_are_returned() -> None:
    x = torch.arange(6.0)
    targets = _targets(lambda x: [(x.view(2, 3).unsqueeze(0).squeeze(0) * 2).view(3, 2).sum(0)], x)
    assert not any("copy" in target for target in targets)
    whole, turned = _run(lambda x: [x.view(2, 3), x.view(2, 3).t()], [x])
    assert torch.equal(whole, x.view(2, 3)) and torch.equal(turned, x.view(2, 3).t())


def test_axes_of_length_one_are_moved_for_nothing() -> None:
    assert not any(
        "permute" in each for each in _targets(lambda x: x.permute(1, 2, 0) * 2, torch.zeros(1, 2, 3))
    )
    assert any("permute" in each for each in _targets(lambda x: x.permute(2, 1, 0) * 2, torch.zeros(1, 2, 3)))


def test_one_constant_serves_wherever_a_number_is_read() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [(x * 2 + 2.0) * 2.0, x.to(torch.float64) * 2]

    assert sum(target.startswith("constant") for target in _targets(function, torch.zeros(3))) == 2
    single, double = _run(function, [torch.ones(3)])
    assert single.tolist() == [8.0] * 3 and double.dtype == torch.float64


@pytest.mark.parametrize("operation", [torch.add, torch.mul, torch.sub, torch.div])
def test_mixed_dtypes_are_made_one(operation: Callable[..., Tensor]) -> None:
    numbers, ids = torch.tensor([1.5, -2.0]), torch.tensor([2, 3])
    arguments = [numbers, ids, torch.tensor([True, False])]
    for pair in ((0, 1), (1, 0), (0, 2), (1, 1)):
        if operation is torch.sub and 2 in pair:
            continue
        got = _run(lambda *all, pair=pair: [operation(*(all[i] for i in pair))], arguments)[0]
        want = operation(*(arguments[i] for i in pair))
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_operators_with_several_results() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    values, places = _run(lambda x: list(torch.topk(x, 2)), [x])
    assert values.tolist() == [[3.0, 2.0], [5.0, 4.0]] and places.tolist() == [[0, 2], [1, 2]]
    first, second = _run(lambda x: [part * 1 for part in aten.split_copy.Tensor(x, 2, 1)], [x])
    assert torch.equal(first, x[:, :2]) and torch.equal(second, x[:, 2:])


def test_operators_without_kernels_are_found_before_lowering() -> None:
    graph = _traced(lambda x: (torch.erfinv(x) + x.lgamma()).view(2, 2), torch.zeros(4)).graph
    missing = missing_kernels(graph)
    assert {name: node.target for name, node in missing.items()} == {
        "aten::erfinv": aten.erfinv.default,
        "aten::lgamma": aten.lgamma.default,
    }
