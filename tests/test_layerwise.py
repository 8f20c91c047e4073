"""Products a layer at a time: the same numbers as from the whole graph, in less memory."""

import warnings
from contextlib import nullcontext

import menagerie
import pytest
import torch
from models import tiny_gpt2, tiny_llama, tiny_vit
from torch import nn

import blockspec
from blockspec import losses
from blockspec.model.containers import layer_modules
from blockspec.model.doubles import Doubles
from blockspec.products.curvature import Products
from blockspec.products.layerwise import TOGETHER
from blockspec.products.top import MOST

FAMILIES = [
    "GPT2", "Llama", "Gemma2", "Mamba", "Bert", "Albert", "ViT", "timm ViT", "Swin", "ResNet",
    "DenseNet", "T5", "TransformerEncoder",
]  # fmt: skip
LOW = {"Llama", "Gemma2", "T5", "Mamba"}  # their norms round to float32, whatever the model is in
UNCUT = "from the whole graph and not a layer at a time: "


def requests_of(objective, by="matrix", seed=0, **which):
    generator = torch.Generator().manual_seed(seed)
    return [
        (block, torch.randn(block.numel, generator=generator, dtype=torch.float64))
        for block in blockspec.partition(objective.model, by, **which)
    ]


def assert_same(found, truth):
    """Each product to 1e-12 of its norm; what is zero but for rounding, to that of the others."""
    scale = max(float(v.norm()) for v in truth)
    for one, other in zip(found, truth, strict=True):
        assert float((one - other).norm()) <= 1e-12 * max(float(other.norm()), 1e-3 * scale)


def all_cut(objective, curvature="hessian"):
    """An operator that goes a layer at a time, and holds none."""
    operator = Products(objective, curvature, guarded=False, products="layerwise")
    operator.way.top.wanted = False
    return operator


def both(objective, requests, curvature="hessian"):
    """Products in the two ways, and the operator that went a layer at a time."""
    whole = Products(objective, curvature, guarded=False, products="whole")
    layerwise = all_cut(objective, curvature)
    return layerwise.sweep(requests), whole.sweep(requests), layerwise


def tokens(shape=(2, 8), seed=0):
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(seed))


def causal(model, batch=None):
    batch = batch or {"input_ids": tokens()}
    return blockspec.Objective(model, [batch], losses.next_token)


class Net(nn.Module):
    """Layers ``block(x, **shared) -> x`` on numbers (B, 6), and a head; subclasses say what goes
    between the layers.
    """

    def __init__(self, block, layers=3):
        super().__init__()
        self.start = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def classified(build, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = (x, torch.arange(5) % 3)
    return blockspec.Objective(model, [batch], losses.classification, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_whole_graph(family):
    objective = menagerie.zoo()[family](torch.float64)
    with Doubles() if family in LOW else nullcontext():
        found, truth, operator = both(objective, requests_of(objective))
    assert_same(found, truth)
    assert operator.rebuilt > 0


@pytest.mark.parametrize("family", ["GPT2", "T5", "Swin"])
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "residual"])
def test_every_curvature_is_that_of_the_whole_graph(family, curvature):
    objective = menagerie.zoo()[family](torch.float64)
    with Doubles() if family in LOW else nullcontext():
        found, truth, operator = both(objective, requests_of(objective), curvature)
    assert_same(found, truth)
    assert operator.rebuilt > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by", ["tensor", "head", "neuron", "layer", "model"])
def test_blocks_of_every_kind(by, tied):
    objective = causal(tiny_gpt2(tie_word_embeddings=tied))
    requests = requests_of(objective, by)[:: 11 if by == "neuron" else 1]
    assert_same(*both(objective, requests)[:2])


def test_columns_reach_other_layers_and_are_symmetric():
    objective = causal(tiny_gpt2(layers=3))
    operator = Products(objective, guarded=False, products="layerwise")
    requests = requests_of(objective, "layer")
    columns = operator.columns(requests, [block for block, _ in requests])
    forms = torch.tensor(
        [
            [float(column @ v) for (_, v), column in zip(requests, row, strict=True)]
            for row in columns
        ]
    )
    torch.testing.assert_close(forms, forms.T, rtol=1e-11, atol=1e-14)
    assert forms.fill_diagonal_(0).abs().max() > 1e-4  # blocks of different layers are coupled
    whole = Products(objective, guarded=False, products="whole")
    truth = whole.columns(requests, [block for block, _ in requests])
    for row, other in zip(columns, truth, strict=True):
        assert_same(row, other)


def test_units_are_given_their_whole_products():
    objective = causal(tiny_gpt2())
    objective.micro_batch = 1
    requests, sums = requests_of(objective, "layer"), []
    for way in ("whole", "layerwise"):
        operator = Products(objective, guarded=False, products=way)
        targets = [block for block, _ in requests]
        _, units = operator.columns_by_unit(
            requests, targets, lambda number, parts: torch.cat(parts) * (1 + number)
        )
        sums.append([value for _, unit in units for value in unit.values])
        assert operator.products == 2 * len(requests)
    assert_same(*sums)


def test_layers_are_built_again_for_a_sweep_and_not_for_a_block():
    objective = causal(tiny_gpt2(layers=4))
    requests = requests_of(objective, include="*attn.c_attn.weight/query")
    operator = all_cut(objective)
    operator.sweep(requests)
    # The gradient by what leaves the layer of the lowest block: the three above. Up and down: all.
    assert operator.rebuilt == 3 + 4 + 4
    operator.sweep(requests * 3)
    assert len(requests) * 3 <= TOGETHER
    assert operator.rebuilt == 11 + 8
    operator.sweep(requests[3:])
    assert operator.rebuilt == 19 + 2
    assert operator.gradients == 1


def test_directions_beyond_those_that_go_together_start_again():
    objective = causal(tiny_gpt2(layers=2))
    requests = requests_of(objective, include="*h.0.ln_1.bias") * (TOGETHER + 1)
    operator = all_cut(objective)
    found = operator.sweep(requests)
    assert operator.rebuilt == 1 + 2 * (2 + 2)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("family", ["GPT2", "Albert", "Swin", "T5", "Mamba"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_products_where_the_last_layers_are_held_are_those_of_the_whole_graph(family, curvature):
    objective = menagerie.zoo()[family](torch.float64)
    requests = requests_of(objective)
    with Doubles() if family in LOW else nullcontext():
        truth = Products(objective, curvature, guarded=False, products="whole").sweep(requests)
        operator = Products(objective, curvature, guarded=False, products="layerwise")
        assert_same(operator.sweep(requests), truth)
    assert operator.way.top.held == min(operator.way.top.calls // 2, MOST)
    assert operator.rebuilt > 0


def test_layers_that_are_held_are_not_built_again():
    objective = causal(tiny_gpt2(layers=4))
    requests = requests_of(objective, include="*attn.c_attn.weight/query")
    operator = Products(objective, guarded=False, products="layerwise")
    operator.sweep(requests)
    assert operator.way.top.held == 2
    held = "the graphs of the last 2 of 4 layers are held"
    assert operator.told == f"a layer at a time; {held}"
    assert operator.rebuilt == 1 + 2 + 2
    operator.sweep(requests[2:])
    assert operator.rebuilt == 5


def test_frozen_layers_are_not_built_again():
    model = tiny_gpt2(layers=3)
    for part in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
        part.requires_grad_(False)
    objective = causal(model)
    found, truth, operator = both(objective, requests_of(objective))
    assert_same(found, truth)
    assert operator.rebuilt == 2


class Shared(Net):
    """Hands values of the first layer on, by name and within containers, and mixes in the start."""

    def __init__(self):
        super().__init__(Sharing)
        self.scale = nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = start = self.start(x)
        values = None
        for block, scale in zip(self.blocks, self.scale, strict=True):
            x, (values, _) = block(x + scale * start, shared={"bias": self.bias, "first": [values]})
        return self.head(x + values)


class Sharing(Block):
    def forward(self, x, *, shared):
        values = self.inner(x)
        (first,) = shared["first"]
        first = values if first is None else first
        return x + torch.tanh(values * first + shared["bias"]), (first, "a remark")


def test_what_layers_share_comes_through():
    objective = classified(Shared)
    found, truth, operator = both(objective, requests_of(objective, "tensor"))
    assert_same(found, truth)
    assert operator.rebuilt == 3 + 3 + 3


def test_layers_that_are_called_twice_count_twice():
    class Twice(Net):
        def forward(self, x):
            return super().forward(super().forward(x) @ torch.ones(3, 6, dtype=x.dtype))

    objective = classified(lambda: Twice(Block))
    found, truth, operator = both(objective, requests_of(objective, "tensor"))
    assert_same(found, truth)
    assert operator.rebuilt == 6 + 6 + 6


def test_a_head_that_holds_weights_of_a_layer():
    def build():
        net = Net(Block)
        net.head = nn.Linear(6, 6)
        net.head.weight = net.blocks[1].inner.weight
        return net

    objective = classified(build)
    assert_same(*both(objective, requests_of(objective, "tensor"))[:2])


class Writing(Block):
    """Leaves its values where others find them."""

    last = None

    def forward(self, x):
        Writing.last = self.inner(x)
        return x + torch.tanh(Writing.last)


class Reading(Block):
    def forward(self, x):
        return super().forward(x) * Writing.last


class Listening(Net):
    def __init__(self):
        super().__init__(Reading)
        self.blocks[0] = Writing()


class Overheard(Net):
    def forward(self, x):
        return super().forward(x) + Writing.last[:, :3]


class Passed(Net):
    """A later layer is given what an earlier one has left."""

    def forward(self, x):
        x = self.blocks[0](self.start(x))
        return self.head(self.blocks[1](x + 2 * Writing.last))


class InPlace(Block):
    def forward(self, x):
        return super().forward(x.add_(1.0))


class ChangedBehind(Net):
    def forward(self, x):
        x = self.blocks[0](self.start(x))
        return self.head(self.blocks[1](x.relu_()))


class Counting(Block):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) * (1 + type(self).calls % 2)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Listening, "'blocks.1' takes a tensor from the inside of layer 'blocks.0'"),
        (lambda: Overheard(Writing), "takes a tensor from the inside of layer 'blocks.2'"),
        (lambda: Passed(Writing), "takes a tensor from the inside of layer 'blocks.0'"),
        (lambda: Net(InPlace), "'blocks.0' changes its input in place"),
        (lambda: ChangedBehind(Block), "changed in place"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), "no container of layers"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_cut_is_held_whole(build, why):
    objective = classified(build)
    requests = requests_of(objective, "tensor")
    truth = Products(objective, guarded=False, products="whole").sweep(requests)
    operator = Products(objective, guarded=False, products="layerwise")
    with pytest.warns(UserWarning, match=f"{UNCUT}.*{why}"):
        found = operator.sweep(requests)
    assert operator.rebuilt == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.sweep(requests)
    assert_same(found, truth)


def test_a_layer_that_is_not_a_function_of_its_arguments_is_not_cut():
    objective = classified(lambda: Net(Counting))
    operator = Products(objective, guarded=False, products="layerwise")
    with pytest.warns(UserWarning, match="gave something else when it was called again"):
        operator.sweep(requests_of(objective, "tensor"))


def test_hooks_of_the_user_run_and_count():
    objective = classified(lambda: Net(Block))
    seen = []
    model = objective.model
    model.blocks[0].register_forward_hook(lambda module, given, out: out * 2)
    model.blocks[1].register_forward_pre_hook(lambda module, given: (given[0] + 0.5,))
    model.blocks[2].inner.register_forward_hook(lambda *_: seen.append(1))
    found, truth, operator = both(objective, requests_of(objective, "tensor"))
    assert_same(found, truth)
    assert seen
    assert operator.rebuilt > 0


def test_checkpoints_that_the_user_switched_on_are_no_error():
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    objective = causal(model)
    with Doubles():
        found, truth, operator = both(objective, requests_of(objective))
    assert_same(found, truth)
    assert operator.rebuilt > 0


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_the_model_is_as_it_was_when_a_layer_fails_on_the_way(call):
    objective = classified(lambda: Net(Block))
    model = objective.model.train()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyError("on the way")

    handle = model.blocks[1].inner.register_forward_hook(failing)
    operator = Products(objective, guarded=False, products="layerwise")
    with pytest.raises(KeyError, match="on the way"):
        operator.sweep(requests_of(objective, "tensor"))
    handle.remove()
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())


def test_an_estimate_is_the_same_in_both_ways():
    objective = blockspec.Objective(
        tiny_vit(), [(torch.randn(4, 3, 8, 8).double(), torch.arange(4))], losses.classification
    )
    blocks = blockspec.partition(objective.model, include="*fc1.weight")
    found = [
        blockspec.estimate_spectra(
            objective, blocks, num_probes=2, num_steps=5, products=way, check=way == "layerwise"
        )
        for way in ("whole", "layerwise")
    ]
    for name, spectrum in found[0].items():
        torch.testing.assert_close(
            torch.from_numpy(found[1][name].nodes), torch.from_numpy(spectrum.nodes)
        )
    assert found[1].cost.check == "passed"


def test_a_way_that_there_is_not_is_refused():
    objective = classified(lambda: Net(Block))
    with pytest.raises(ValueError, match=r"products is one of .*'auto'.*got 'layers'"):
        blockspec.estimate_spectra(objective, objective.partition(), products="layers")


def test_an_operator_makes_its_own_products():
    operator = blockspec.FunctionOperator(lambda v: 2 * v, 3)
    with pytest.raises(ValueError, match="products='layerwise' goes with the name of a matrix"):
        blockspec.estimate_spectra(None, operator.block(), curvature=operator, products="layerwise")


def test_layers_are_found_by_name_or_by_likeness():
    assert list(layer_modules(tiny_gpt2())) == ["transformer.h.0", "transformer.h.1"]

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Sequential(Block(), Block())
            self.mixed = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    assert list(layer_modules(Own())) == ["stack.0", "stack.1"]


class Pair(nn.Module):
    """Two calls, one after the other, of what nobody calls as one."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for first, second in self.layers:
            x = second(torch.tanh(first(x)))
        return x


def linear():
    return nn.Linear(6, 6)


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        # a layer of two operations is one layer, wherever its container stands
        (
            lambda: nn.Sequential(*(nn.Sequential(linear(), linear()) for _ in range(2))),
            ["0", "1"],
        ),
        (
            lambda: nn.Sequential(Block(), nn.Sequential(linear(), linear())),
            ["1.0", "1.1"],  # of other classes: the outer container holds no layers
        ),
        # stages: their layers count, and a stage of one layer is that layer
        (
            lambda: nn.Sequential(
                nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block(), Block())
            ),
            ["0.0", "0.1", "1.0", "1.1", "1.2"],
        ),
        # lists cannot be called: what is within them is, by likeness and by name
        (
            lambda: nn.Sequential(
                Pair(nn.ModuleList(nn.ModuleList([linear(), linear()]) for _ in range(2)))
            ),
            ["0.layers.0.0", "0.layers.0.1", "0.layers.1.0", "0.layers.1.1"],
        ),
    ],
)
def test_containers_within_containers(build, paths):
    model = nn.Sequential(build(), nn.Linear(6, 3))
    assert list(layer_modules(build())) == paths
    objective = classified(lambda: nn.Sequential(*model))
    found, truth, operator = both(objective, requests_of(objective, "tensor"))
    assert_same(found, truth)
    assert operator.rebuilt > 0
