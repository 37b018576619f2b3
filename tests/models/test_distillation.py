"""Learning from a teacher's answers: the head's loss, and the model that is its own teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Cohere2Config, Gemma2Config, GraniteConfig

from tests.models.test_loss import value_and_gradients
from tests.models.tiny import picture, tiny_model
from tokenflex import TokenCounts
from tokenflex.data.packing import DrawnSample, PackedBatch, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.processor import digits_processor
from tokenflex.models import loss as loss_module
from tokenflex.models.head import transform_logits
from tokenflex.models.loss import head_cross_entropy, head_distillation


def unchanged(logits):
    return logits


def arguments(seed: int, dtype=torch.float64):
    """Of a shape that follows from ``seed``: five arguments of the loss, and the teacher's rows."""
    torch.manual_seed(seed)
    rows, width, vocabulary = (int(torch.randint(1, most, ())) for most in (40, 12, 50))

    def learned(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    bias = learned(vocabulary) if seed % 2 else None
    targets, weights = torch.randint(vocabulary, (rows,)), torch.rand(rows)
    head = learned(rows, width), learned(vocabulary, width), bias
    return [*head, targets, weights], torch.randn(rows, width, dtype=dtype)


def written_out(inputs, teacher_hidden, distillation, transform=unchanged):
    """(the loss, the sum of divergences) from the definition, all logits at once."""
    hidden, weight, bias, targets, target_weights = inputs
    with torch.no_grad():
        teacher = transform(F.linear(teacher_hidden, weight, bias)).softmax(-1)
    student = transform(F.linear(hidden, weight, bias)).softmax(-1)
    entropy = -student[range(len(targets)), targets].log()
    divergence = (teacher * (teacher.log() - student.log())).sum(-1)
    loss = ((entropy + distillation * divergence) * target_weights).sum()
    return loss, (divergence * target_weights).sum().detach()


def both(function, inputs, *options):
    """Return the result of ``function``, and the gradients of thrice its loss."""
    divergence = []

    def loss(*_):
        first, second = function(inputs, *options)
        divergence.append(second)
        return first

    return [*value_and_gradients(loss, inputs), *divergence]


def ours(inputs, teacher_hidden, distillation, transform=unchanged):
    return head_distillation(*inputs, teacher_hidden, distillation, transform)


@pytest.mark.parametrize("logits", [1, 150, 2**26])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("distillation", [0.3, 2.0])
def test_loss_and_gradients_are_those_of_the_definition(monkeypatch, logits, seed, distillation):
    """With chunks of one row, of a few, and one for all."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", logits)
    actual = both(ours, *arguments(seed), distillation)
    expected = both(written_out, *arguments(seed), distillation)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config",
    [
        Cohere2Config(logit_scale=0.3),
        GraniteConfig(logits_scaling=3.0),
        Gemma2Config(final_logit_softcapping=0.7),
    ],
    ids=lambda config: config.model_type,
)
def test_a_familys_logits_are_both_the_teachers_and_the_students(config):
    def transform(logits):
        return transform_logits(logits, config)

    actual = both(ours, *arguments(3), 0.7, transform)
    expected = both(written_out, *arguments(3), 0.7, transform)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_without_weight_it_is_the_cross_entropy_to_the_bit():
    inputs, teacher_hidden = arguments(5, torch.float32)
    plain = value_and_gradients(head_cross_entropy, arguments(5, torch.float32)[0])
    *actual, divergence = both(ours, inputs, teacher_hidden, 0.0)
    assert divergence > 0.1
    for one, expected in zip(actual, plain, strict=True):
        assert torch.equal(one, expected)


def test_the_teacher_has_no_gradient():
    inputs, teacher_hidden = arguments(1)
    teacher_hidden.requires_grad_(True)
    loss, divergence = head_distillation(*inputs, teacher_hidden, 1.0)
    loss.backward()
    assert teacher_hidden.grad is None
    assert not divergence.requires_grad


def test_a_teacher_that_says_the_same_is_no_distance_away():
    inputs, _ = arguments(1)
    loss, divergence = head_distillation(*inputs, inputs[0].detach(), 1.0)
    assert divergence == 0
    assert torch.equal(loss, head_cross_entropy(*inputs))


def test_under_autocast_it_is_near():
    (hidden, weight, bias, *rest), teacher = arguments(3)
    exact, apart = head_distillation(hidden, weight, bias, *rest, teacher, 1.0)
    single = [one.detach().float() for one in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        near = head_distillation(*single, *rest, teacher.float(), 1.0)
    torch.testing.assert_close(near, (exact.detach().float(), apart.float()), rtol=0.02, atol=0.02)
    assert abs(near[0].double() - exact) > 1e-6  # it was bfloat16


def test_rows_of_a_teacher_that_do_not_fit_are_refused():
    inputs, teacher_hidden = arguments(2)
    with pytest.raises(ValueError, match=r"teacher_hidden must be \[\d+, \d+\] as hidden, got"):
        head_distillation(*inputs, teacher_hidden[1:], 1.0)


# ---- in the model

SHOWN = [4, 9, 16]


def batch_of(counts: list[int], teacher: int | None, share_prefix: bool = True) -> PackedBatch:
    """A sample at each of ``counts`` with two questions, and one without an image."""

    def asked(name: str, image: int | None) -> Sample:
        turns = [(Turn("user", text), Turn("assistant", "3 5")) for text in ("odd", "count")]
        pictures = () if image is None else (picture(image),)
        return Sample(name, pictures, tuple(map(Conversation, turns)))

    samples = [asked(str(index), index) for index in range(len(counts))] + [asked("none", None)]
    collator = PackingCollator(
        digits_processor(),
        TokenCounts((4, 9, 16), (1, 1, 1)),
        share_prefix=share_prefix,
        teacher_count=teacher,
    )
    return collator(
        [
            DrawnSample(index, 0, one, count)
            for index, (one, count) in enumerate(zip(samples, [*counts, 4], strict=True))
        ]
    )


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


def learned(vision: str, share_prefix: bool = True, autocast: bool = False):
    """(loss, divergence, gradients) of a model that is its own teacher."""
    model = tiny_model(vision=vision)
    batch = batch_of(SHOWN, 16, share_prefix)
    weights = torch.linspace(0.2, 1, len(batch.targets))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(
            **batch.model_inputs(),
            targets=batch.targets,
            target_weights=weights,
            teacher=batch.teacher.model_inputs(),
            distillation=0.7,
        )
    assert outputs.logits is None
    outputs.loss.backward()
    return outputs.loss.detach(), outputs.distillation_loss, gradients_of(model)


def by_hand(vision: str, share_prefix: bool = True):
    """The same from two plain forward passes, of batches that know of no teacher."""
    model = tiny_model(vision=vision)
    student, teacher = batch_of(SHOWN, None, share_prefix), batch_of([16] * 3, None, share_prefix)
    assert torch.equal(student.targets, teacher.targets)
    weights = torch.linspace(0.2, 1, len(student.targets))
    with torch.no_grad():
        truth = model(**teacher.model_inputs()).logits[0].double().log_softmax(-1)
    logits = model(**student.model_inputs()).logits[0].double().log_softmax(-1)
    divergence = (truth.exp() * (truth - logits)).sum(-1)
    entropy = F.nll_loss(logits, student.targets, reduction="none")
    loss = ((entropy + 0.7 * divergence) * weights).sum()
    loss.backward()
    return loss.detach(), (divergence * weights).sum().detach(), gradients_of(model)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_the_teacher_is_the_model_at_the_largest_count(vision, share_prefix):
    loss, divergence, gradients = learned(vision, share_prefix)
    expected, apart, others = by_hand(vision, share_prefix)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence) == pytest.approx(float(apart), rel=1e-4)
    assert float(divergence) > 0.01
    assert gradients.keys() == others.keys()
    for name, one in others.items():
        torch.testing.assert_close(gradients[name], one, rtol=1e-3, atol=1e-5, msg=name)


def test_under_autocast_every_weight_has_the_gradient_it_has_without():
    _, _, exact = learned("siglip")
    _, _, near = learned("siglip", autocast=True)
    assert near.keys() == exact.keys()
    for name, one in exact.items():
        # The gradient of a key's bias is nothing but rounding.
        error = (near[name] - one).norm() / one.norm().clamp(min=1.0)
        assert error < 0.1, (name, error)


def test_the_encoder_runs_once_and_the_rest_twice_in_the_mode_it_is_in():
    model = tiny_model().train()
    passes: dict[str, list[tuple[bool, bool]]] = {"vision_model": [], "projector": [], "text": []}
    inner = model.model
    for name, part in zip(
        passes, (inner.vision_model, inner.projector, inner.language_model), strict=True
    ):
        part.register_forward_hook(
            lambda part, *_, seen=passes[name]: seen.append(
                (part.training, torch.is_grad_enabled())
            )
        )
    batch = batch_of(SHOWN, 16)
    weights = torch.ones(len(batch.targets))
    teacher = batch.teacher.model_inputs()
    model(**batch.model_inputs(), targets=batch.targets, target_weights=weights, teacher=teacher)
    assert passes == {
        "vision_model": [(True, True)],
        "projector": [(True, False), (True, True)],
        "text": [(True, False), (True, True)],
    }


def test_no_weight_that_is_cast_for_the_teacher_is_kept_for_the_student():
    """In older PyTorch it would have no gradient there."""
    model, batch, cached = tiny_model(), batch_of(SHOWN, 16), []
    model.model.language_model.register_forward_hook(
        lambda *_: cached.append(torch.is_autocast_cache_enabled())
    )
    options = {"targets": batch.targets, "target_weights": torch.ones(len(batch.targets))}
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch.model_inputs(), **options, teacher=batch.teacher.model_inputs())
    assert cached == [False, True]


def test_a_teacher_needs_targets():
    batch = batch_of(SHOWN, 16)
    with pytest.raises(ValueError, match="a teacher is for targets"):
        tiny_model()(**batch.model_inputs(), teacher=batch.teacher.model_inputs())
