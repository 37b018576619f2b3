"""The few names of lmms-eval and VLMEvalKit that our adapters use, as those packages have them.

Written from lmms-eval 0.7.3 (api/instance.py, api/model.py, models/registry_v2.py,
tasks/__init__.py) and VLMEvalKit's
vlmeval/vlm/base.py (commit 23757c4). Tests run on these, and also on what is installed.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.arguments


class CacheHook:
    def add_partial(self, attr, req, res) -> None: ...


class lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = (pair.split("=", 1) for pair in arg_string.split(","))
        given = {key: int(value) if value.isnumeric() else value for key, value in pairs}
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given, **more)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class TaskManager:
    """Has a few names, and that of each ``NAME.yaml`` below an included folder."""

    def __init__(self, verbosity="INFO", include_path=None, include_defaults=True, model_name=None):
        own = [path.stem for folder in include_path or () for path in Path(folder).rglob("*.yaml")]
        self.all_tasks = sorted(["mmstar", "mmmu", "mmmu_val", "ai2d", "failing", *own])


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self) -> None:
        self.dump_image_func = None

    def use_custom_prompt(self, dataset) -> bool:
        return False

    @abc.abstractmethod
    def generate_inner(self, message, dataset=None): ...

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(message, dataset)


def modules() -> dict[str, ModuleType]:
    """Return the stand-in modules by name, for ``sys.modules``."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "TokenCounts": TokenCounts,
            "GenerationResult": GenerationResult,
            "Instance": Instance,
        },
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.tasks": {"TaskManager": TaskManager},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
        "vlmeval.config": {"supported_VLM": {}},
    }
    made = {}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes)
    return made
