"""LoRA adapters of a model that is trained: PEFT's layers in the places of linear layers.

Only the layers change: the model stays of its class, so that batches, evaluation and states are
those of any other run. PEFT writes and reads the saved adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tokenflex.training.config import PeftConfig

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of an adapter, as PEFT names them."""

_NAME = "default"  # PEFT's name of an adapter without another one
_SAVED_PREFIX = "base_model.model."  # of names in PEFT's files


def check_adapter_folder(folder: Path) -> None:
    """Refuse to replace something that is no adapter.

    Raises:
        FileExistsError: It is a file, a link, or a folder with other files.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} must be a folder to be replaced by an adapter, move it")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILES[0]).is_file():
        raise FileExistsError(
            f"{folder} must be an adapter to be replaced by one, and it has no {FILES[0]}; move it"
        )


def check_peft(asked_by: str) -> None:
    """Raise ValueError where PEFT is not installed; ``asked_by`` names what needs it."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{asked_by} needs the package peft: pip install peft") from error


def linear_layers(
    model: nn.Module, parts: Sequence[nn.Module], head: nn.Module | None = None
) -> dict[str, nn.Module]:
    """Return the linear layers of some parts of a model by name, as adapters can change them.

    Left out are ``head``, whose weight is often that of the embedding, and the pooling head of a
    vision encoder, which no patch goes through.
    """
    candidates = {layer for part in parts for layer in part.modules() if type(layer) is nn.Linear}
    left_out = [head, *(getattr(part, "head", None) for part in parts)]
    for module in left_out:
        candidates -= {*(module.modules() if isinstance(module, nn.Module) else ())}
    return {name: layer for name, layer in model.named_modules() if layer in candidates}


def lora_config(
    names: Collection[str],
    *,
    r: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    modules_to_save: Collection[str] = (),
) -> Any:
    """Return PEFT's configuration of adapters for the layers with these full names.

    ``lora_alpha`` is 2 x ``r`` by default.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=sorted(names),
        modules_to_save=sorted(modules_to_save) or None,
    )


class Adapters:
    """The adapters of a model, which are put into it here.

    Args:
        model: The model, maybe on the meta device.
        settings: Which layers get adapters of which size.
        modules: The modules that the names "vision" and "text" stand for.
        head: The output layer of the language model, which gets no adapter.

    Raises:
        ValueError: PEFT is not installed, or a name in ``settings`` matches nothing.
    """

    def __init__(
        self,
        model: Any,
        settings: PeftConfig,
        modules: Mapping[str, Sequence[nn.Module]],
        head: nn.Module | None = None,
    ) -> None:
        check_peft("peft in the configuration")
        from peft import inject_adapter_in_model

        self.model = model
        self.modules = settings.modules
        parts = [module for name in settings.modules for module in modules[name]]
        inside = {layer for part in parts for layer in part.modules()}
        names = {name: layer for name, layer in model.named_modules() if layer in inside}
        whole = _matching(names, settings.modules_to_save, "modules_to_save")
        self._whole = {name: names[name] for name in whole}
        learned_whole = {layer for part in self._whole.values() for layer in part.modules()}
        layers = linear_layers(model, parts, head)
        if settings.target_modules is not None:
            chosen = _matching(layers, settings.target_modules, "target_modules")
            layers = {name: layers[name] for name in chosen}
        targets = [name for name, layer in layers.items() if layer not in learned_whole]
        if not targets:
            raise ValueError(
                f"peft must find a linear layer in {' or '.join(settings.modules)} to adapt, "
                f"beside modules_to_save {[*settings.modules_to_save]}, and there is none"
            )
        self.config = lora_config(
            targets,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
        )
        on_meta = any(weight.is_meta for weight in model.parameters())
        inject_adapter_in_model(self.config, model, adapter_name=_NAME, low_cpu_mem_usage=on_meta)
        model.requires_grad_(True)  # PEFT froze the rest; stages choose what learns

    @property
    def learned(self) -> set[nn.Parameter]:
        """The weights of adapters and of modules that are trained whole."""
        whole = {weight for module in self._whole.values() for weight in module.parameters()}
        return whole.union(
            weight for name, weight in self.model.named_parameters() if _is_of_adapter(name)
        )

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                yield name, layer

    def merged(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights of the model without adapters, which answers as it does with them.

        Args:
            weights: All weights of the model, by name.
        """
        layers = dict(self._layers())
        merged = {}
        for name, weight in weights.items():
            owner, _, rest = name.partition(".base_layer.")
            if owner in layers and rest:
                merged[f"{owner}.{rest}"] = weight
            elif not _is_of_adapter(name):
                merged[name] = weight
        with torch.no_grad():
            for name, layer in layers.items():
                merged[f"{name}.weight"] = _sum(layer).to(merged[f"{name}.weight"].device)
        return merged

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the model's weights, and put its own layers back into their places.

        The weights are those of :meth:`merged`, to the bit.
        """
        for name, layer in [*self._layers()]:
            layer.base_layer.weight.copy_(_sum(layer))
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base_layer)
        vars(self.model).pop("peft_config", None)

    def save(
        self,
        folder: Path,
        others: Sequence[nn.Module],
        weights: Mapping[str, torch.Tensor],
        base: str | None = None,
    ) -> None:
        """Save the adapters as PEFT does, with all else that was learned as ``modules_to_save``.

        ``PeftModel.from_pretrained(base, folder)`` then answers as the trained model does, where
        ``base`` is the model that training began with.

        Args:
            folder: A folder that exists.
            others: Modules without adapters that were trained.
            weights: All weights of the model, by name.
            base: Name of the model that training began with, if it has one.
        """
        names = {module: name for name, module in self.model.named_modules()}
        whole = sorted({*self._whole, *(names[module] for module in others)})
        saved = {
            name.replace(f".{_NAME}.", "."): weight
            for name, weight in weights.items()
            if _is_of_adapter(name)
        }
        for name in whole:
            saved |= {key: w for key, w in weights.items() if key.startswith(f"{name}.")}
        # Weights that share their memory are written one by one.
        saved = {_SAVED_PREFIX + key: weight.contiguous().clone() for key, weight in saved.items()}
        save_file(saved, folder / FILES[1], metadata={"format": "pt"})
        config = self.config
        config.modules_to_save, config.inference_mode = whole or None, True
        config.base_model_name_or_path = base
        config.save_pretrained(str(folder))


def _is_of_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _sum(layer: Any) -> torch.Tensor:
    """Return the weight of an adapted layer together with its adapter."""
    weight: torch.Tensor = layer.base_layer.weight
    return weight + layer.get_delta_weight(_NAME).to(weight.dtype)


def _matching(names: Collection[str], wanted: Sequence[str], key: str) -> list[str]:
    """Return the names that end with one of those wanted, as in PEFT.

    Raises:
        ValueError: One of those wanted is the end of no name.
    """
    chosen = []
    for end in wanted:
        matching = [name for name in names if name == end or name.endswith(f".{end}")]
        if not matching:
            known = dict.fromkeys(name.rpartition(".")[2] for name in names)
            shown = ", ".join(name for name in known if not name.isdecimal())
            raise ValueError(
                f"{key} of peft must name layers of the model, such as {shown}; got {end!r}"
            )
        chosen += matching
    return [*dict.fromkeys(chosen)]
