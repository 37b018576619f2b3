"""Comparison of packed and unpacked rows of a model: logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokenflex.dropin.packing import pack_inputs
from tokenflex.dropin.variants import unwrapped

LEAST_COSINE = {torch.float32: 0.99999, torch.float64: 0.99999}
"""Of the gradients of all trained parameters. Rounding in half precision allows :data:`_HALF`."""

_HALF = 0.99
_LOGITS = {torch.float32: 1e-4, torch.float64: 1e-7}
_HALF_LOGITS = 0.1


@dataclass(frozen=True)
class PackingReport:
    """Differences between a packed row and the padded batch that it was made of.

    Attributes:
        logits_error: The largest difference of a logit, over the largest logit.
        loss: Of the packed row.
        unpacked_loss: Of the padded batch.
        gradient_cosine: Of the gradients of all parameters that are trained, vision encoder
            included, as one vector; None if they were not compared.
        least_cosine: The smallest of a single parameter; None likewise.
        least_parameter: Its name; "" likewise.
    """

    logits_error: float
    loss: float
    unpacked_loss: float
    gradient_cosine: float | None = None
    least_cosine: float | None = None
    least_parameter: str = ""


def verify(model: Any, batch: Any, *, gradients: bool = True) -> PackingReport:
    """Compare packed and unpacked rows of a model on some samples.

    The model is in evaluation mode meanwhile, so that dropout does not count as a difference.

    Args:
        model: A model whose rows may be packed: converted, or after
            :func:`tokenflex.packing.enable`.
        batch: A padded batch of at least two samples of different lengths, with ``labels``. Padding
            on the right leaves positions alone.
        gradients: Also compare the gradients of all parameters that are trained. This takes memory
            for two copies of them.

    Returns:
        The differences.

    Raises:
        ValueError: They are larger than rounding explains: samples see each other, or lose their
            positions. The message has the figures.
    """
    mask = batch["attention_mask"]
    if len(mask) < 2 or batch.get("labels") is None:
        raise ValueError(
            f"batch must hold at least two samples and labels, got {len(mask)} samples and labels "
            f"{'None' if batch.get('labels') is None else 'given'}"
        )
    whole = unwrapped(model)
    with _evaluation(whole):
        unpacked = _outcome(model, {**batch, "use_cache": False}, gradients)
        packed = _outcome(model, pack_inputs(model, batch), gradients)
    expected = unpacked.logits[mask.bool()]
    scale = float(expected.abs().max())
    error = float((packed.logits[0] - expected).abs().max()) / max(scale, 1e-30)
    report = PackingReport(error, packed.loss, unpacked.loss)
    if gradients:
        names = [name for name, p in whole.named_parameters() if p.requires_grad]
        report = _with_cosines(report, names, packed.gradients, unpacked.gradients)
    _check(report, expected.dtype)
    return report


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    loss: float
    gradients: list[torch.Tensor]


def _outcome(model: Any, inputs: dict[str, Any], gradients: bool) -> _Outcome:
    """Return what a forward gives, with the loss as the mean over all targets."""
    labels = inputs["labels"]
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.set_grad_enabled(gradients):
        logits = model(**others).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    grads: list[torch.Tensor] = []
    if gradients:
        parameters = [p for p in unwrapped(model).parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [
            torch.zeros_like(p) if grad is None else grad
            for p, grad in zip(parameters, found, strict=True)
        ]
    return _Outcome(logits.detach(), float(loss.detach()), grads)


def _with_cosines(
    report: PackingReport,
    names: list[str],
    packed: list[torch.Tensor],
    unpacked: list[torch.Tensor],
) -> PackingReport:
    products = torch.tensor(
        [
            [float((a.double() * b.double()).sum()) for a, b in ((p, u), (p, p), (u, u))]
            for p, u in zip(packed, unpacked, strict=True)
        ]
    ).double()
    if not len(products):
        raise ValueError("model must have a parameter that is trained to compare gradients of")
    both, of_packed, of_unpacked = products.T
    norms = (of_packed * of_unpacked).sqrt()
    # A gradient of rounding errors alone, such as that of a key's bias, has no direction.
    floor = 1e-10 * float(products.sum(0)[1:].max())
    known = torch.maximum(of_packed, of_unpacked) > floor
    cosines = torch.where(known, both / norms.clamp(min=1e-300), 1.0)
    totals = products.sum(0)
    least = int(cosines.argmin())
    return PackingReport(
        report.logits_error,
        report.loss,
        report.unpacked_loss,
        float(totals[0] / (totals[1] * totals[2]).sqrt().clamp(min=1e-300)),
        float(cosines[least]),
        names[least],
    )


def _check(report: PackingReport, dtype: torch.dtype) -> None:
    cosine = report.gradient_cosine
    differs = not report.logits_error <= _LOGITS.get(dtype, _HALF_LOGITS)
    if cosine is not None:
        differs |= not cosine >= LEAST_COSINE.get(dtype, _HALF)
    if differs:
        gradients = "" if cosine is None else f", gradients a cosine of {cosine:.6f}"
        raise ValueError(
            "packed rows of this model are not what its samples give alone: logits differ by "
            f"{report.logits_error:.1e} of the largest, the loss is {report.loss:.6f} and "
            f"{report.unpacked_loss:.6f} unpacked{gradients}"
        )


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
