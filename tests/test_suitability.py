"""What cannot be measured is refused with the remedy that fits it, before anything expensive."""

import warnings

import pytest
import torch
import transformers
from problems import gpt2, tokens
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.model import suitability

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0, 1])
WORDS = torch.tensor([[1, 2], [3, 4], [0, 1], [2, 2]])


class Of(nn.Module):
    """A function of a few parameters or modules, which are its attributes."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def drawn(*shape, dtype=torch.float64):
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def linear(inputs=3, outputs=2):
    return nn.Linear(inputs, outputs).double()


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def connectionist(model, log_probabilities):
    lengths = torch.tensor([6]), torch.tensor([2])
    log_probabilities = model(log_probabilities).log_softmax(-1)
    loss = nn.functional.ctc_loss(log_probabilities, torch.tensor([[1, 1]]), *lengths)
    return loss, 1


def mixtral():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.MixtralConfig(vocab_size=12, **sizes, **heads)
    return transformers.AutoModelForCausalLM.from_config(config).double()


def with_cache():
    model = gpt2(n_positions=16).model
    cache = model(tokens(2, 3), use_cache=True).past_key_values
    return model, [{"input_ids": tokens(2, 3), "past_key_values": cache}], losses.next_token


def embedded(bag):
    parts = {"words": bag, "head": linear()}
    return Of(lambda self, x: self.head(self.words(x)), **parts)


CASES = {
    "stream": (
        lambda: (linear(), DataLoader(Stream(), batch_size=2), losses.classification),
        r"the DataLoader reads a stream \(IterableDataset\).*itertools\.islice",
    ),
    "sparse embedding": (
        lambda: (embedded(nn.EmbeddingBag(5, 3, sparse=True).double()), [(WORDS, Y)]),
        r"module 'words' \(EmbeddingBag\) makes sparse gradients.*sparse = False",
    ),
    "scaled by frequency": (
        lambda: (embedded(nn.EmbeddingBag(5, 3, scale_grad_by_freq=True).double()), [(WORDS, Y)]),
        r"module 'words' \(EmbeddingBag\) divides its gradient.*scale_grad_by_freq = False",
    ),
    "embedding bag": (
        lambda: (embedded(nn.EmbeddingBag(5, 3).double()), [(WORDS, Y)]),
        r"_embedding_bag.*embedding\(x\)\.sum\(1\)",
    ),
    "complex": (
        lambda: (
            Of(lambda self, x: (x + 0j @ self.phase).abs(), phase=drawn(3, 2, dtype=torch.cdouble)),
            [(X, Y)],
        ),
        r"'phase' is torch\.complex128.*view_as_complex",
    ),
    "distances": (
        lambda: (Of(lambda self, x: torch.cdist(x, self.centres), centres=drawn(2, 3)), [(X, Y)]),
        r"_cdist_backward.*square\(\)\.sum\(-1\)",
    ),
    "no parameters": (
        lambda: (Of(lambda self, x: x[:, :2]), [(X, Y)]),
        r"the model \(Of\) has no parameters.*nn\.Parameter",
    ),
    "connectionist loss": (
        lambda: (linear(3, 4), [torch.randn(6, 1, 3).double()], connectionist),
        r"ctc_loss.*torch\.logsumexp",
    ),
    "compiled model": (
        lambda: (Of(lambda self, x: self._orig_mod(x), _orig_mod=linear()), [(X, Y)]),
        r"the model is compiled.*model\._orig_mod",
    ),
    "cache": (with_cache, r"holds a cache \('past_key_values'\).*leave it out"),
    "experts": (
        lambda: (mixtral(), [{"input_ids": tokens(2, 4)}], losses.next_token),
        r"fused experts.*set_experts_implementation\('eager'\)",
    ),
    "without numbers": (
        lambda: (nn.Sequential(linear(), nn.Linear(2, 2, device="meta")), [(X, Y)]),
        r"'1\.weight' lies on the device 'meta'.*load the weights",
    ),
    "a buffer without numbers": (
        lambda: (nn.Sequential(linear(), nn.BatchNorm1d(2, affine=False, device="meta")), [(X, Y)]),
        r"'1\.running_mean' lies on the device 'meta'.*load the weights",
    ),
    "lazy": (
        lambda: (nn.Sequential(linear(), nn.LazyLinear(2)), [(X, Y)]),
        r"'1\.weight' has no shape yet: call the model with a batch once",
    ),
    "other types": (
        lambda: (nn.Sequential(linear(), nn.Linear(2, 2)), [(X, Y)]),
        r"different types \(.*must have the same dtype.*\): bring all to one",
    ),
    "exported": (
        lambda: (torch.export.export(linear(), (X,)).module(), [(X, Y)]),
        r"the model is exported.*Put the Python module",
    ),
    "traced": (lambda: (torch.jit.trace(linear(), X), [(X, Y)]), r"scripted or traced"),
    "traced part": (
        lambda: (nn.Sequential(torch.jit.trace(linear(), X), nn.Tanh()), [(X, Y)]),
        r"module '0' is scripted or traced.*Put the Python module",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("make", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_measured_is_refused_with_the_remedy(make, message):
    model, batches, *loss = make()
    with pytest.raises(ValueError, match=message) as error:
        estimate_spectra(
            Objective(model, batches, loss[0] if loss else losses.classification),
            partition(model) if list(model.parameters()) else (),
            num_probes=1,
            num_steps=2,
        )
    assert "attn_implementation" not in str(error.value)


def shared_memory(view):
    model = nn.Sequential(linear(3, 3), nn.Tanh(), linear(3, 3))
    model[2].weight = nn.Parameter(view(model[0].weight.data))
    return model


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w.view(-1)[3:]])
def test_parameters_in_the_same_memory_are_said(view):
    with pytest.warns(UserWarning, match=r"'0\.weight' and '2\.weight' share memory"):
        Objective(shared_memory(view), [(X, Y)], losses.classification)


def test_parameters_side_by_side_in_one_memory_are_none_of_these():
    model = shared_memory(torch.clone)
    flat = torch.randn(6, 3, dtype=torch.float64)
    for rows, layer in ((slice(3), model[0]), (slice(3, 6), model[2])):
        layer.weight = nn.Parameter(flat[rows])
    turned = nn.Sequential(*(Of(None, w=nn.Parameter(flat[:, [k]].T)) for k in range(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (model, turned):
            Objective(each, [(X, Y)], losses.classification)


def test_sparse_tensors_of_a_batch_are_measured():
    model = Of(lambda self, x: torch.sparse.mm(x, self.weight), weight=drawn(3, 2))
    matrices = []
    for x in (X, X.to_sparse()):
        objective = Objective(model, DataLoader([(x, Y)], batch_size=None), losses.classification)
        found = estimate_spectra(objective, partition(model), num_probes=1, num_steps=6)
        matrices.append(torch.tensor(found["weight"].nodes))
    torch.testing.assert_close(*matrices, rtol=1e-10, atol=1e-12)


def test_nested_tensors_have_a_remedy_of_their_own():
    text = (
        "The function '_nested_from_padded_tensor' is not differentiable with respect to argument"
    )
    assert "padded batches and a mask" in suitability.explanation(text)


def test_attention_keeps_its_own_remedy():
    text = suitability.explanation(
        "derivative for aten::_flash_attention_backward is not implemented"
    )
    assert "attn_implementation='eager'" in text
    assert suitability.explanation("something else") is None
    text = "torch.compile with aot_autograd does not currently support double backward"
    assert "force_eager" in suitability.explanation(text)
