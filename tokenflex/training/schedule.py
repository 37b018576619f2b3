"""The learning rate over a stage: a pure function of how far it is, in steps or in tokens."""

from __future__ import annotations

import math

from tokenflex.training.config import StageConfig


def learning_rate_factor(stage: StageConfig, steps: int, tokens: int) -> float:
    """What the learning rates are multiplied by after so many steps and tokens of ``stage``.

    In steps it is transformers' schedule of the same name: a linear warm-up, then half a cosine to
    zero, or a constant. With a budget in tokens the same curve runs over the tokens; a warm-up in
    steps, of which nobody knows beforehand how many tokens they hold, then multiplies it.
    """
    budget, ramp = stage.budget, 1.0
    warm_up = stage.warmup_share * budget
    done = float(steps)
    if stage.tokens is not None:
        done = min(float(tokens), budget)
        if stage.warmup_steps:
            ramp = min(1.0, steps / stage.warmup_steps)
    elif stage.warmup_steps:
        warm_up = stage.warmup_steps
    if done < warm_up:
        return done / warm_up
    if stage.schedule == "constant":
        return ramp
    progress = (done - warm_up) / max(1.0, budget - warm_up)
    return ramp * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
