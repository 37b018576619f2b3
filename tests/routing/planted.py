"""Graded questions whose right count is known, and routers that say what a test wants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.models.tiny import WIDTH
from tokenflex.routing import training
from tokenflex.routing.grading import Grades
from tokenflex.routing.router import Router

COUNTS = (4, 9, 16)


def planted_grades(samples: int = 60, seed: int = 0) -> Grades:
    """Four questions an image: coarse ones are right at every count, fine ones at 16 only, unless
    the image is easy (its first statistic is positive), then from 9 on. Two images of three are
    easy; every other question is fine."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 8, generator=generator)
    easy = torch.arange(samples) % 3 < 2
    images[:, 0] = torch.where(easy, 2.0, -2.0)
    owners = torch.arange(samples).repeat_interleave(4)
    fine = torch.arange(len(owners)) % 2 == 1
    questions = torch.randn(len(owners), 6, generator=generator)
    questions[:, 0] = torch.where(fine, 2.0, -2.0)
    right = torch.stack([~fine, ~fine | easy[owners], torch.ones_like(fine)], dim=1)
    return Grades(
        counts=COUNTS,
        right=right,
        confidence=torch.where(right, 0.9, 0.4),
        tiles=torch.ones(len(owners), dtype=torch.int64),
        samples=owners,
        kinds=tuple("fine" if one else "coarse" for one in fine.tolist()),
        images=images,
        questions=questions,
        pair_images=owners,
        pair_questions=torch.arange(len(owners)),
    )


def mark_some_right(monkeypatch: Any) -> None:
    """Let training of routers take every third answer of a random model for right."""
    graded = training.grade

    def grade(*args: Any, **options: Any) -> Grades:
        grades = graded(*args, **options)
        grades.right[::3] = True
        return grades

    monkeypatch.setattr(training, "grade", grade)


class FixedRouter(Router):
    """A router for the tiny models that gives these chances in turn, and notes its inputs."""

    def __init__(self, *chances, counts=COUNTS, penalty=0.0) -> None:
        super().__init__(counts, WIDTH, WIDTH, penalty=penalty)
        self.chances = np.array(chances, dtype=np.float64)
        self.seen = []

    def probabilities(self, images, questions):
        self.seen.append((images, questions))
        repeats = -(len(images) // -len(self.chances))
        return np.tile(self.chances, (repeats, 1))[: len(images)]
