"""``elman.nn`` against ``torch.nn``: values, gradients, weights, errors; on what PyTorch tests its own with, too."""

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import elman.nn
from elman.ops import record_backends

NAMES = ("RNN", "LSTM", "GRU")
by_name = pytest.mark.parametrize("name", NAMES)
F64 = torch.float64


def both(name: str, *args: Any, **options: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """PyTorch's module, and ours with its weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **options)
    ours = getattr(elman.nn, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def numbers(tree: Any) -> list[Tensor]:
    """Its floating-point tensors."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def outcome(module: torch.nn.RNNBase, given: Any, hx: Any = None) -> list[Tensor]:
    """The outputs, the last states, and the gradients of a function of all of them for all that has one."""
    given, hx = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), (given, hx))
    torch.manual_seed(1)
    output, last = module(given, hx)
    if isinstance(given, PackedSequence):
        assert isinstance(output, PackedSequence)
        for before, after in zip(given[1:], output[1:], strict=True):
            assert before is after or torch.equal(before, after)
    made = numbers((output, last))
    generator = torch.Generator().manual_seed(2)
    slopes = [torch.randn(x.shape, generator=generator, dtype=F64).to(x) for x in made]
    gradients = torch.autograd.grad(made, [*numbers((given, hx)), *module.parameters()], slopes)
    return [x.detach() for x in (*made, *gradients)]


@dataclass(frozen=True)
class Drawn:
    """A module and what it is called with."""

    name: str
    options: dict[str, Any]
    lengths: list[int]
    packed: bool
    with_hx: bool

    def inputs(self, dtype: torch.dtype, device: str = "cpu", size: int = 3) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)

        batch, hidden = len(self.lengths), self.options["hidden_size"]
        layers = self.options["num_layers"] * (1 + self.options["bidirectional"])
        h = normal(layers, batch, self.options.get("proj_size") or hidden)
        hx = (h, normal(layers, batch, hidden)) if self.name == "LSTM" else h
        x = normal(max(self.lengths), batch, self.options["input_size"])
        if self.packed:
            ordered = sorted(self.lengths, reverse=True) == self.lengths
            packed = pack_padded_sequence(x, torch.tensor(self.lengths), enforce_sorted=ordered)
            return packed, hx if self.with_hx else None
        return x.transpose(0, 1) if self.options["batch_first"] else x, hx if self.with_hx else None


@st.composite
def drawn(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Drawn:
    name = draw(st.sampled_from(NAMES))
    hidden, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    options = {"input_size": draw(st.integers(1, 4)), "hidden_size": hidden, "num_layers": layers}
    options |= {key: draw(st.booleans()) for key in ("bias", "batch_first", "bidirectional")}
    if layers > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if name == "LSTM" and hidden > 1:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return Drawn(name, options, lengths, draw(st.booleans()), draw(st.booleans()))


_OPTIONS = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, "batch_first": False}


@given(drawn(), st.sampled_from(["auto", "loop"]))
@example(Drawn("LSTM", {**_OPTIONS, "proj_size": 2}, [2, 5, 1], packed=True, with_hx=True), "loop")
@example(Drawn("GRU", _OPTIONS, [2, 5, 1], packed=True, with_hx=True), "loop")
@example(Drawn("RNN", {**_OPTIONS, "nonlinearity": "relu"}, [5, 5, 1], packed=True, with_hx=False), "auto")
@settings(max_examples=60, deadline=None, derandomize=True)
def test_values_and_gradients_are_torchs(case: Drawn, backend: str) -> None:
    """On the CPU those of dropout too, whose numbers are drawn in the same order."""
    theirs, ours = both(case.name, **case.options, dtype=F64)
    ours.backend = backend  # type: ignore[assignment]
    inputs = case.inputs(F64)
    torch.testing.assert_close(outcome(ours, *inputs), outcome(theirs, *inputs))


def assert_as_exact(case: Drawn, dtype: torch.dtype, device: str = "cpu", factor: float = 1.5) -> None:
    """Every result's error against float64 is at most ``factor`` times PyTorch's in the dtype, or a few roundings."""
    theirs, ours = both(case.name, **case.options, dtype=F64)
    inputs = case.inputs(dtype, device)
    theirs, ours = theirs.to(device, dtype), ours.to(device, dtype)
    found, plain = outcome(ours, *inputs), outcome(theirs, *inputs)
    exact = outcome(copy.deepcopy(theirs).cpu().double(), *tree_map_only(Tensor, _exact, inputs))
    for mine, other, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == other.dtype == dtype
        assert mine.shape == other.shape
        norm = truth.norm().clamp_min(torch.finfo(F64).tiny)
        of_mine, of_other = (float((x.cpu().double() - truth).norm() / norm) for x in (mine, other))
        assert of_mine <= factor * of_other + 2 * torch.finfo(dtype).eps


def _exact(x: Tensor) -> Tensor:
    return x.cpu().double() if x.is_floating_point() else x.cpu()


@by_name
@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_as_exact_as_torchs(name: str, packed: bool) -> None:
    assert_as_exact(Drawn(name, {**_OPTIONS, "hidden_size": 24}, [9, 4, 6], packed, with_hx=True), torch.float32)


@by_name
def test_a_module_is_torchs_but_for_its_kernels(name: str) -> None:
    options: dict[str, Any] = {"num_layers": 2, "batch_first": True, "bidirectional": True, "dropout": 0.1}
    if name == "LSTM":
        options["proj_size"] = 2
    theirs, ours = both(name, 3, 4, **options)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RNNBase)
    torch.manual_seed(5)
    theirs.reset_parameters()
    torch.manual_seed(5)
    ours = getattr(elman.nn, name)(3, 4, **options)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    ours.flatten_parameters()
    x = torch.randn(2, 5, 3)
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    copies = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stored, weights_only=False))
    expected = outcome(ours, x)
    for each in (*copies, ours.double().float()):
        assert all(map(torch.equal, outcome(each, x), expected))


@by_name
def test_weights_may_be_others(name: str) -> None:
    """Replaced, given for one call, or computed, with none of them kept from before."""
    _, ours = both(name, 3, 4, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    other = {key: torch.randn_like(value) for key, value in ours.state_dict().items()}
    (given, _) = torch.func.functional_call(ours, other, (x,))
    normed = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(ours), "weight_hh_l0")
    torch.testing.assert_close(normed(x)[0], ours(x)[0])
    ours.weight_hh_l0 = torch.nn.Parameter(other.pop("weight_hh_l0"))
    ours.load_state_dict(other, strict=False)
    torch.testing.assert_close(ours(x)[0], given)


def failure(call: Callable[[], object]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


#: Keyword arguments beside a width of 3 and 4 units.
WRONG_OPTIONS: list[dict[str, Any]] = [
    {"hidden_size": 0},
    {"hidden_size": 4.0},
    {"input_size": 0},
    {"num_layers": 0},
    {"bias": 1},
    {"batch_first": "yes"},
    {"dropout": 2.0},
    {"dropout": True},
    {"nonlinearity": "gelu"},
    {"proj_size": 4},
    {"proj_size": -1},
    {"size": 3},
]


@by_name
@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=str)
def test_wrong_options_raise_as_torchs(name: str, options: dict[str, Any]) -> None:
    given = {"input_size": 3, "hidden_size": 4, **options}
    expected = failure(lambda: getattr(torch.nn, name)(**given))
    assert expected is not None
    assert failure(lambda: getattr(elman.nn, name)(**given)) is expected


def _h(*shape: int, **options: Any) -> Callable[[str], Any]:
    """A state of this shape, for the LSTM two."""
    return lambda name: (torch.zeros(*shape, **options),) * 2 if name == "LSTM" else torch.zeros(*shape, **options)


#: Of modules of 3 inputs and 4 units in one layer.
WRONG_INPUTS: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "one axis": (torch.zeros(3), lambda name: None),
    "four axes": (torch.zeros(2, 2, 2, 3), lambda name: None),
    "inputs": (torch.zeros(5, 2, 4), lambda name: None),
    "dtype": (torch.zeros(5, 2, 3).double(), lambda name: None),
    "integers": (torch.zeros(5, 2, 3).long(), lambda name: None),
    "no steps": (torch.zeros(0, 2, 3), lambda name: None),
    "no tensor": ([1.0], lambda name: None),
    "hx of another batch": (torch.zeros(5, 2, 3), _h(1, 3, 4)),
    "hx of another width": (torch.zeros(5, 2, 3), _h(1, 2, 5)),
    "hx of another depth": (torch.zeros(5, 2, 3), _h(2, 2, 4)),
    "hx of one sequence": (torch.zeros(5, 2, 3), _h(1, 4)),
    "hx of a batch": (torch.zeros(5, 3), _h(1, 1, 4)),
    "hx of another dtype": (torch.zeros(5, 2, 3), _h(1, 2, 4, dtype=F64)),
    "hx of another form": (torch.zeros(5, 2, 3), lambda name: _h(1, 2, 4)("GRU" if name == "LSTM" else "LSTM")),
    "packed, hx of another batch": (pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)]), _h(1, 3, 4)),
    "packed, inputs": (pack_sequence([torch.zeros(5, 2), torch.zeros(2, 2)]), lambda name: None),
}


@by_name
@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_inputs_raise_as_torchs(name: str, wrong: str) -> None:
    given, hx = WRONG_INPUTS[wrong]
    theirs, ours = both(name, 3, 4)
    expected = failure(lambda: theirs(given, hx(name)))
    assert expected is not None
    assert failure(lambda: ours(given, hx(name))) is expected


@pytest.mark.parametrize("states", [1, 2, 3])
def test_an_lstm_wants_no_tensor_for_two_states_of_packed_sequences(states: int) -> None:
    given, hx = pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)]), torch.zeros(states, 2, 4)
    theirs, ours = both("LSTM", 3, 4)
    with pytest.raises(TypeError):
        theirs(given, hx)
    with pytest.raises(TypeError, match=r"hx is a tensor \(., 2, 4\): give hx=\(h, c\)"):
        ours(given, hx)


@pytest.mark.parametrize("states", [1, 3])
def test_an_lstm_wants_two_states_as_torchs_does(states: int) -> None:
    given, hx = torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4),) * states
    theirs, ours = both("LSTM", 3, 4)
    expected = failure(lambda: theirs(given, hx))
    assert expected is not None
    assert failure(lambda: ours(given, hx)) is expected


@by_name
def test_another_device_is_named(name: str) -> None:
    ours = getattr(elman.nn, name)(3, 4)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same device: meta and cpu"):
        ours(torch.zeros(5, 2, 3, device="meta"))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device: cpu and meta"):
        ours(torch.zeros(5, 2, 3), _h(1, 2, 4, device="meta")(name))


@by_name
def test_shapes_alone(name: str) -> None:
    theirs, ours = both(name, 3, 4, num_layers=2, bidirectional=True, device="meta")
    for mine, other in zip(
        *(outcome(module, torch.zeros(5, 2, 3, device="meta")) for module in (ours, theirs)), strict=True
    ):
        assert mine.is_meta
        assert mine.shape == other.shape


@by_name
def test_an_empty_batch(name: str) -> None:
    for theirs, ours in (both(name, 3, 4, num_layers=2, bidirectional=True), both(name, 3, 4, bias=False)):
        x = torch.zeros(5, 0, 3)
        torch.testing.assert_close(outcome(ours, x), outcome(theirs, x))


@by_name
def test_one_sequence(name: str) -> None:
    theirs, ours = both(name, 3, 4, batch_first=True, bidirectional=True, dtype=F64)
    x, hx = torch.randn(5, 3, dtype=F64), tree_map(Tensor.normal_, _h(2, 4, dtype=F64)(name))
    torch.testing.assert_close(outcome(ours, x, hx), outcome(theirs, x, hx))


@by_name
def test_autocast_runs_in_its_dtype(name: str) -> None:
    _, ours = both(name, 3, 4, num_layers=2)
    x = torch.randn(5, 2, 3, requires_grad=True)
    for inputs in (x, pack_padded_sequence(x, torch.tensor([5, 2]))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, last = ours(inputs, _h(2, 2, 4)(name))
        made = numbers((output, last))
        assert all(each.dtype == torch.bfloat16 for each in made)
        gradients = torch.autograd.grad(made, [x, *ours.parameters()], [torch.ones_like(each) for each in made])
        assert all(each.dtype == torch.float32 for each in gradients)
        expected, _ = ours(inputs, _h(2, 2, 4)(name))
        torch.testing.assert_close(made[0].float(), numbers(expected)[0], rtol=0.03, atol=0.03)


@by_name
def test_torch_compile_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    options: dict[str, Any] = {"proj_size": 2} if name == "LSTM" else {}
    _, ours = both(name, 3, 4, num_layers=2, bidirectional=True, batch_first=True, dtype=F64, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, dtype=F64)
    torch.testing.assert_close(outcome(compiled, x), outcome(ours, x))


@pytest.fixture(scope="module")
def module_db() -> ModuleType:
    """What PyTorch's own tests of its modules are made of, which its package holds."""
    pytest.importorskip("expecttest")
    # It would keep all tests of this process from setting PyTorch's flags.
    with mock.patch("torch.backends.disable_global_flags"):
        from torch.testing._internal import common_modules
    return common_modules


@by_name
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of PyTorch's own
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_inputs_of_pytorchs_own_tests(module_db: ModuleType, name: str, dtype: torch.dtype) -> None:
    """``ModuleInfo``'s: values, gradients, and the reference it brings for one sequence."""
    (info,) = (info for info in module_db.module_db if info.module_cls is getattr(torch.nn, name))
    samples = functools.partial(info.module_inputs_func, info, device="cpu", dtype=dtype, requires_grad=False)
    packed = {"with_packed_sequence": True} if name != "LSTM" else {}
    count = 0
    for training in (False, True):
        for sample in samples(training=training, **packed):
            theirs, ours = both(name, *sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
            theirs.train(training), ours.train(training)
            inputs = sample.forward_input.args
            torch.testing.assert_close(outcome(ours, *inputs), outcome(theirs, *inputs))
            if sample.reference_fn is not None and isinstance(inputs[0], Tensor):
                expected = sample.reference_fn(ours, *inputs)
                torch.testing.assert_close(ours(*inputs), expected)
            count += 1
    assert count >= 32


@by_name
def test_the_wrong_inputs_of_pytorchs_own_tests(module_db: ModuleType, name: str) -> None:
    """``ErrorModuleInput``'s, whose messages are those too."""
    (info,) = (info for info in module_db.module_db if info.module_cls is getattr(torch.nn, name))
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    for each in found:
        build = each.module_error_input.constructor_input
        make = functools.partial(getattr(elman.nn, name), *build.args, **build.kwargs)
        if each.error_on is module_db.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(each.error_type, match=each.error_regex):
                make()
        else:
            given = each.module_error_input.forward_input
            with pytest.raises(each.error_type, match=each.error_regex):
                make()(*given.args, **given.kwargs)
    assert len(found) > 5


LARGE = {"input_size": 128, "hidden_size": 256, "num_layers": 2, "bidirectional": False, "batch_first": False}
ON_GPU = [
    Drawn(name, {**LARGE, **more}, lengths, packed, with_hx=True)
    for name, more in (("RNN", {}), ("LSTM", {}), ("GRU", {}), ("LSTM", {"proj_size": 128, "bidirectional": True}))
    for lengths, packed in (([40] * 64, False), ([40 - i // 2 for i in range(64)], True))
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: f"{case.name}-{case.packed}-{case.options.get('proj_size')}")
def test_a_gpu_is_as_exact_as_cudnn(case: Drawn, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And our kernels run: those of all steps where they can."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    with torch.backends.cudnn.flags(allow_tf32=False), record_backends() as used:
        assert_as_exact(case, dtype, "cuda", factor=2.0)
    # What is judged first is ours; PyTorch's in float64 and on a GPU notes nothing.
    assert set(used) == {"loop" if dtype == torch.float32 else "persistent"}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu"}], ids=["tanh", "relu"])
def test_a_gpu_runs_both_nonlinearities(options: dict[str, Any]) -> None:
    """Relu's slope jumps: half types round some units across it, so that float32 alone is compared with gradients."""
    assert_as_exact(Drawn("RNN", {**LARGE, **options}, [40] * 64, False, with_hx=False), torch.float32, "cuda", 2.0)


@pytest.mark.gpu
@by_name
def test_a_cuda_graph_gives_the_same(name: str) -> None:
    _, ours = both(name, 64, 128, num_layers=2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(20, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def passes() -> list[Tensor]:
        output, last = ours(x)
        made = [output, *tree_leaves(last)]
        return [*made, *torch.autograd.grad(made, [x, *ours.parameters()], [torch.ones_like(y) for y in made])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Without what autograd keeps of this stream, which is not the captured one.
        expected = [each.detach().clone() for each in passes()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = passes()
    graph.replay()
    for mine, plain in zip(found, expected, strict=True):
        assert (mine - plain).float().norm() <= 0.02 * plain.float().norm()


def test_every_cell_has_what_holds_it() -> None:
    """Also at the largest numbers that a type has: no NaN, the memory the same bits, no gradient of what is held."""
    for (cell, signs), dtype in itertools.product(elman.nn._HOLD.items(), (torch.float16, torch.bfloat16, F64)):
        rule = elman.nn.CELLS[cell]
        assert len(signs) == rule.gates
        pre = (torch.tensor(signs).to(dtype) * (torch.finfo(dtype).max / 4)).view(-1, 1)
        memory = torch.tensor([0.3], dtype=dtype)
        rec = torch.randn(rule.products, 1, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
        states, saved = rule.forward(pre.unbind(0), rec.unbind(0), memory)
        assert all(state.isfinite().all() for state in states)
        assert rule.backward is not None
        dpre, drec, dmemory = rule.backward(saved, memory, torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))
        assert all((each == 0).all() for each in (*dpre, *drec))
        if rule.reads_memory:
            assert torch.equal(states[-1], memory)
            assert torch.equal(dmemory, torch.ones(1, dtype=dtype))
