"""`parallelize_model` beyond training: axes, rules, dropout, types, generation, another TP degree, names, refusals."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.parallelize import foreign, renamed, zoo
from tests.parallelize.twins import call, compare
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.layout.spec import stored_bytes
from shardwright.parallelize.model import make_plan, parallelize_model
from shardwright.parallelize.sharding import full_state_dict, load_full_state_dict, sharding_of
from shardwright.parallelize.trace import trace
from shardwright.testing.ranks import on_threads


def split(name: str, ranks: int, body: Any, **options: Any) -> list[Any]:
    """`body(part, inputs)` on each rank."""
    model, inputs = zoo.build(name)
    traced = trace(model, inputs)
    return on_threads(ranks, lambda group: body(parallelize_model(model, group, traced, **options), inputs))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("options", [{"split_axis": 0}, {"split_axis": 1}, {"rules": "classical"}])
def test_each_linear_by_itself(name: str, options: dict[str, Any]) -> None:
    """Output and state as the whole model's, calls as the plan says; float64, so 1e-12 is the order of sums."""
    model, inputs = zoo.build(name)
    traced, expected = trace(model, inputs), call(model, inputs)

    def body(group: Group) -> None:
        recording = RecordingGroup(group)
        part = parallelize_model(model, recording, traced, **options)
        torch.testing.assert_close(call(part, inputs), expected, rtol=1e-12, atol=1e-12)
        moves = sharding_of(part).plan.moves
        assert [(one.op, one.bytes) for one in recording.calls] == [(m.op, m.bytes[group.rank]) for m in moves]
        assert all(torch.equal(full_state_dict(part)[k], v) for k, v in model.state_dict().items())

    on_threads(3, body)


def test_classical_rule_looks_at_shapes_only() -> None:
    model, inputs = zoo.build("gpt2")
    cuts = {cut.parameter: cut.dim for cut in make_plan(model, trace(model, inputs), 2, rules="classical").cuts}
    assert cuts["transformer.wte.weight"] == 0  # by vocabulary
    assert cuts["transformer.h.0.mlp.c_fc.weight"] == 1  # [in, out], taller than wide as [out, in]: axis 0
    assert cuts["transformer.h.0.mlp.c_proj.weight"] == 0  # wider than tall: axis 1


def test_the_plain_column_form_can_stay_a_part() -> None:
    linear = nn.Linear(6, 7).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    parts = on_threads(3, lambda g: parallelize_model(linear, g, (x,), split_axis=0, gather_output=False)(x))
    assert torch.equal(torch.cat(parts, 1), linear(x))
    assert [part.shape[1] for part in parts] == [3, 2, 2]


def test_logits_can_stay_parts() -> None:
    """Without a gather each rank has its columns of the vocabulary."""
    model, inputs = zoo.build("llama")
    parts = split("llama", 3, call, gather_output=False)
    assert [part.shape[-1] for part in parts] == [18, 18, 17]
    torch.testing.assert_close(torch.cat(parts, -1), call(model, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_linear_is_split_and_gathered(dtype: torch.dtype) -> None:
    """The model is the product itself; ranks trace and run side by side. No sum is cut, but bfloat16 (2^-8) may round
    otherwise in a product of other sizes.
    """
    linear, x = nn.Linear(6, 7, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    for output in on_threads(3, lambda group: parallelize_model(linear, group, (x,))(x)):
        torch.testing.assert_close(output, linear(x), rtol=1e-2, atol=1e-2)


def test_what_contradicts_itself_is_refused() -> None:
    linear, x = nn.Linear(6, 7), torch.randn(3, 6)
    with pytest.raises(UsageError, match="gather_output=False: axis 1 gives every rank a partial sum"):
        parallelize_model(linear, SingleGroup(), (x,), split_axis=1, gather_output=False)
    with pytest.raises(UsageError, match="example_inputs=None: Linear has no dummy_inputs; pass example_inputs"):
        parallelize_model(linear, SingleGroup())
    with pytest.raises(UsageError, match="group=int: it is no group of ranks; pass SingleGroup"):
        parallelize_model(linear, 2, (x,))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="example_inputs=str: there is no tensor in it"):
        parallelize_model(linear, SingleGroup(), "x")
    with pytest.raises(UsageError, match="nothing flows through an empty tensor; pass tensors with something in them"):
        parallelize_model(linear, SingleGroup(), x[:0])
    with pytest.raises(UsageError, match=r"too many positional arguments; Linear.forward takes \(input"):
        parallelize_model(linear, SingleGroup(), (x, x))
    with pytest.raises(UnsupportedError, match="are on two devices"):
        parallelize_model(linear.to("meta"), SingleGroup(), (x,))
    with pytest.raises(UsageError, match="split_axis=2"):
        parallelize_model(linear, SingleGroup(), (x,), split_axis=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"split_axis": 0}, {"split_axis": 1}])
def test_hooks_of_modules_that_are_replaced_still_see_their_outputs(options: dict[str, Any]) -> None:
    """Two blocks side by side, whose sums would travel together, and a head: each output is the whole model's."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2))
            self.head = nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.blocks[0](x) + self.blocks[1](x)).softmax(-1))

    torch.manual_seed(8)
    model, x = Beside().double(), torch.randn(4, 6, dtype=torch.float64)

    def seen(whole: nn.Module, split: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        outputs: list[Tensor] = []
        copy: Any = deepcopy(whole)
        for module in (copy.blocks[0][2], copy.blocks[1][2], copy.head):
            module.register_forward_hook(lambda module, given, made: outputs.append(made.detach()))
        part = split(copy)
        outputs.clear()
        part(x)
        return outputs

    expected = seen(model, lambda whole: whole)
    for outputs in on_threads(3, lambda g: seen(model, lambda whole: parallelize_model(whole, g, (x,), **options))):
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_a_module_already_split_is_refused() -> None:
    part = parallelize_model(nn.Sequential(nn.Linear(6, 7)), SingleGroup(), (torch.randn(3, 6),))
    with pytest.raises(UnsupportedError, match="split already; build the model anew"):
        parallelize_model(nn.Sequential(part), SingleGroup(), (torch.randn(3, 6),))


def test_shapes_that_depend_on_values_are_refused() -> None:
    class Picking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0] * 2 if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match=r"depend on values .*; trace the part without them"):
        trace(Picking(), (torch.randn(4),))


class Doubled(torch.autograd.Function):
    """A function of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class WithFunction(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = self.down(Doubled.apply(y) if self.inside else y.relu())
        return self.norm(y if self.inside else Doubled.apply(y))


def test_a_custom_function_over_a_split_dimension_is_refused_and_one_over_a_whole_is_not() -> None:
    x = torch.randn(3, 6)
    with pytest.raises(UnsupportedError, match="Doubled: a custom autograd function over a dimension"):
        parallelize_model(WithFunction(inside=True), SingleGroup(), (x,))
    part = parallelize_model(WithFunction(inside=False), SingleGroup(), (x,))
    assert len(sharding_of(part).plan.chains) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "attention"])
def test_names_mean_nothing(name: str) -> None:
    """Every class, attribute and parameter renamed: the same plan but for the names."""
    model, inputs = (foreign if name == "attention" else zoo).build(name)
    plain = make_plan(model, trace(model, inputs), 3)
    other, table = renamed.rename(deepcopy(model))
    again = make_plan(other, trace(other, inputs), 3)
    assert [(table[cut.parameter], cut.dim, cut.ranges) for cut in plain.cuts] == [
        (cut.parameter, cut.dim, cut.ranges) for cut in again.cuts
    ]
    assert plain.moves == again.moves
    assert [*map(len, plain.settings.values())] == [*map(len, again.settings.values())]


def test_dropout_is_the_same_at_every_split() -> None:
    """Three training steps of a torch encoder with dropout, against the same replacement on one rank."""
    torch.manual_seed(2)
    model = foreign.encoder(dropout=0.3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)

    def alone(whole: nn.Module) -> nn.Module:
        return parallelize_model(whole, SingleGroup(), (x,))

    compare(model, (x,), 3, 1e-9, twin=alone)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_dropout_by_function_is_the_same_at_every_split(name: str, training: bool) -> None:
    """Inside attention, fused, and by `F.dropout`; traced in training or not. The reference: the same at one rank."""
    model, inputs = zoo.build(name)
    for attribute in ("dropout", "attention_dropout", "attn_pdrop", "resid_pdrop"):
        for module in model.modules():
            for holder in (module, getattr(module, "config", None)):
                if isinstance(getattr(holder, attribute, None), float):
                    setattr(holder, attribute, 0.3)
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    traced = trace(model.train(training), inputs)

    def body(group: Group) -> tuple[Tensor, Tensor, str]:
        part = parallelize_model(model, group, traced).train()
        return call(part, inputs), call(part, inputs), str(sharding_of(part).plan)

    ((first, second, plan),) = on_threads(1, body)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, call(model.eval(), inputs))
    assert "torch's generator" not in plan
    for parts in on_threads(4, body):
        torch.testing.assert_close(parts[:2], (first, second), rtol=1e-10, atol=1e-10)


def test_random_numbers_out_of_reach_are_said_to_be() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout1d(0.5), nn.Linear(9, 6), Noisy())
    plan = str(make_plan(model, trace(model, (torch.randn(4, 6),)), 2))
    assert "1 draws from torch's generator (feature_dropout): each rank draws for its part" in plan
    assert "3 draws from torch's generator (rand_like): seed all ranks alike" in plan


def test_dropout_modules_of_a_model_keep_their_masks() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 6), nn.Dropout(0.2)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    compare(model, (x,), 4, 1e-9, twin=lambda whole: parallelize_model(whole, SingleGroup(), (x,)))


def greedy(model: Any, inputs: Any) -> Tensor:
    return model.eval().generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", ["llama", "llama, uneven", "gpt2", "falcon", "t5"])
def test_generate_gives_the_same_tokens_on_every_rank(name: str) -> None:
    """Transformers' own `generate`, with its cache, greedy, against the whole model."""
    model, inputs = zoo.build(name)
    expected = greedy(model, inputs)
    for tokens in split(name, 2, greedy):
        assert torch.equal(tokens, expected)


def test_a_part_moves_between_types_and_saves_and_reloads_at_another_degree() -> None:
    model, inputs = zoo.build("qwen2")
    expected, state = call(model, inputs), model.state_dict()
    whole = split("qwen2", 3, lambda part, x: full_state_dict(part.to(torch.float32).to(torch.float64)))
    assert all(torch.equal(whole[0][k], whole[2][k]) for k in state)

    def reload(part: nn.Module, x: Any) -> Tensor:
        for parameter in part.parameters():
            parameter.data.zero_()
        load_full_state_dict(part, whole[0])
        return call(part, x)

    for output in split("qwen2", 5, reload):  # float32 in between: 6e-8 relative
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="missing there or unknown here"):
        split("qwen2", 1, lambda part, x: load_full_state_dict(part, {}))


def test_tables_cover_every_parameter_once() -> None:
    """Over all ranks the first holders' bytes are the model's."""
    model, inputs = zoo.build("llama")
    traced = trace(model, inputs)

    def tables(group: Group) -> Any:
        part = parallelize_model(model, group, traced)
        return sharding_of(part).specs(dict(part.named_parameters()), group.rank)

    total, copies = stored_bytes(on_threads(4, tables))
    assert total == sum(p.numel() * p.element_size() for p in model.parameters())
    assert copies > 0


def test_the_plan_is_plain_data() -> None:
    model, inputs = zoo.build("llama")
    plan = make_plan(model, trace(model, inputs), 3)
    data = json.loads(plan.to_json())
    assert data["bytes_per_forward"] == [plan.bytes_per_forward(rank) for rank in range(3)]
    text = str(plan)
    assert "split   6 parts: model.layers.0.self_attn.q_proj.weight (dim 0)" in text
    assert "whole   model.embed_tokens.weight (20,352 bytes on every rank): a lookup computes nothing" in text


def test_a_head_count_written_into_the_code_runs_the_graph_instead() -> None:
    """Nothing to set: the literal 6 would make heads of another size on a rank, without an error."""

    class Literal(foreign.Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(*x.shape[:2], 6, -1).transpose(1, 2)
            return self.o((q * q.softmax(-1)).transpose(1, 2).flatten(2))

    torch.manual_seed(4)
    module, x = Literal().double(), torch.randn(2, 7, 24, dtype=torch.float64)
    plan = compare(module, (x,), 2)
    assert "integer 2 of a view is 6 whatever its attributes" in plan.runs
