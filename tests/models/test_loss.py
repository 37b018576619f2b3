"""The head's loss in chunks: the numbers of the logits as a whole, in the memory of a chunk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import Cohere2Config, Gemma2Config, GraniteConfig

from tests.models.tiny import text_config, tiny_model, vision_config
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.models import loss as loss_module
from tokenflex.models.head import transform_logits
from tokenflex.models.loss import head_cross_entropy
from tokenflex_kernels import plan_packing

ROWS, WIDTH, VOCABULARY = 23, 8, 31


def arguments(dtype=torch.float64, bias=True, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    head_bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, head_bias, torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS)


def unchunked(hidden, weight, bias, targets, target_weights, transform=lambda logits: logits):
    logits = transform(F.linear(hidden, weight, bias)).float()
    if hidden.dtype == torch.float64:
        logits = transform(F.linear(hidden, weight, bias))
    return (F.cross_entropy(logits, targets, reduction="none") * target_weights).sum()


def value_and_gradients(function, inputs, *options):
    value = function(*inputs, *options)
    (3 * value).backward()
    return [value.detach(), *(one.grad for one in inputs[:3] if one is not None)]


@pytest.fixture(params=[1, 5, 23, 1000], ids=lambda rows: f"{rows} rows")
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", request.param * VOCABULARY)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_those_without_chunks(bias, dtype, tolerance):
    actual = value_and_gradients(head_cross_entropy, arguments(dtype, bias))
    expected = value_and_gradients(unchunked, arguments(dtype, bias))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    "config",
    [
        Cohere2Config(logit_scale=0.3),
        GraniteConfig(logits_scaling=3.0),
        Gemma2Config(final_logit_softcapping=0.7),
    ],
    ids=lambda config: config.model_type,
)
def test_what_a_family_does_to_its_logits_has_its_gradient(config):
    def transform(logits):
        return transform_logits(logits, config)

    actual = value_and_gradients(head_cross_entropy, arguments(), transform)
    expected = value_and_gradients(unchunked, arguments(), transform)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    plain = value_and_gradients(unchunked, arguments())
    assert not torch.allclose(actual[0], plain[0])


@pytest.mark.usefixtures("chunk")
def test_under_autocast_it_is_as_near_the_truth_as_without_chunks():
    truth = value_and_gradients(unchunked, arguments(torch.float64))
    inputs = [
        [None if one is None else one.detach().float().requires_grad_() for one in args[:3]]
        + list(args[3:])
        for args in (arguments(torch.float64), arguments(torch.float64))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        chunked = value_and_gradients(head_cross_entropy, inputs[0])
        whole = value_and_gradients(unchunked, inputs[1])
    for ours, theirs, exact in zip(chunked, whole, truth, strict=True):
        assert ours.dtype == torch.float32
        error, other = ((one - exact).abs().max() for one in (ours, theirs))
        assert error <= 2.5 * other + 1e-6  # sums of rounded chunks, where the whole rounds once
    assert not torch.allclose(chunked[0].double(), truth[0], rtol=1e-6)  # it was bfloat16


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {1, 2}])
def test_only_what_learns_has_a_gradient(frozen):
    inputs = arguments()
    for place in frozen:
        inputs[place].requires_grad_(False)
    head_cross_entropy(*inputs).backward()
    assert {place for place in range(3) if inputs[place].grad is None} == frozen


def test_without_targets_the_loss_is_zero_and_still_leads_to_every_weight():
    hidden, weight, bias, targets, target_weights = arguments()
    loss = head_cross_entropy(hidden[:0], weight, bias, targets[:0], target_weights[:0])
    loss.backward()
    assert loss.item() == 0
    for one in (hidden, weight, bias):
        assert torch.equal(one.grad, torch.zeros_like(one))


def test_a_second_backward_pass_says_that_the_gradients_are_gone():
    loss = head_cross_entropy(*arguments())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        loss.backward()


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, bias, targets, target_weights = arguments()
    with pytest.raises(ValueError, match=r"must be \[23\].*got \[22\] and \[23\]"):
        head_cross_entropy(hidden, weight, bias, targets[:-1], target_weights)


# ---- in the model


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_gives_the_loss_of_its_logits(tied):
    torch.manual_seed(0)
    ids = torch.randint(4, 60, (19,))
    plan = plan_packing([ids[:7], ids[7:]], [], 3)
    rows = torch.tensor([1, 2, 6, 9, 17])
    targets, target_weights = ids[rows], torch.rand(5)
    results = []
    for chunked in (True, False):
        config = TokenFlexConfig(
            vision_config(), text_config(tie_word_embeddings=tied), image_token_id=3
        )
        torch.manual_seed(1)
        model = TokenFlexForConditionalGeneration(config)
        call = {"plan": plan, "logits_to_keep": rows}
        if chunked:
            outputs = model(**call, targets=targets, target_weights=target_weights)
            assert outputs.logits is None
            loss = outputs.loss
        else:
            logits = model(**call).logits[0]
            each = F.cross_entropy(logits, targets, reduction="none")
            loss = (each * target_weights).sum()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_targets_are_in_place_of_labels():
    model, ids = tiny_model(), torch.tensor([[5, 6]])
    targets = ids[0]
    with pytest.raises(ValueError, match="targets come with target_weights"):
        model(ids, targets=targets)
    with pytest.raises(ValueError, match="in place of labels"):
        model(ids, targets=targets, target_weights=torch.ones(2), labels=ids)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="targets need a plain Linear"):
        model(ids, targets=targets, target_weights=torch.ones(2))


# ---- memory

_PEAK = """
import sys, torch
from tokenflex.models import loss
from tokenflex.models.loss import head_cross_entropy
loss.CHUNK_LOGITS = 2**23
rows, width, vocabulary = 512, 8, 150_000
hidden = torch.randn(rows, width, requires_grad=True)
weight = torch.randn(vocabulary, width, requires_grad=True)
targets, weights = torch.randint(vocabulary, (rows,)), torch.ones(rows)

def peak():  # of this program: getrusage's begins with what the parent held
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

# What is loaded at a first call is not the loss's.
few = torch.randn(2, width, requires_grad=True)
head_cross_entropy(few, weight[:5], None, targets[:2] % 5, weights[:2]).backward()
before = peak()
if sys.argv[1] == "chunks":
    loss = head_cross_entropy(hidden, weight, None, targets, weights)
else:
    each = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    loss = (each * weights).sum()
loss.backward()
print(peak() - before)
"""


def peak_memory(how: str) -> int:
    command = [sys.executable, "-c", _PEAK, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.slow
def test_peak_memory_is_that_of_chunks():
    """512 targets of 150 000 words are 307 MB of logits; a chunk of them is 34 MB.

    A bound with room: what a process holds includes what its allocator keeps.
    """
    logits = 512 * 150_000 * 4
    whole = peak_memory("whole")
    assert whole > 2 * logits
    assert peak_memory("chunks") < whole / 2
