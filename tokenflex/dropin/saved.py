"""Files of saved conversions, which plain transformers must not take for stock models.

``config.json`` of a conversion names a model type of its own, so that transformers' Auto classes
refuse it where the stock class would get a random projector. With ``trust_remote_code=True`` they
find :class:`Conversion` by a module beside the weights, which imports the installed tokenflex.
Conversions of earlier versions have the stock model type, and load as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

from tokenflex.dropin.families import family_of
from tokenflex.dropin.variants import Variant, change_class
from tokenflex.files import excerpt, read_json
from tokenflex.models.auto_map import InstalledClass

MODEL_TYPE = "tokenflex_conversion"
STUB = "tokenflex_conversion.py"
_STUB_SOURCE = '''\
"""Find the classes of this conversion in the installed tokenflex: pip install 'tokenflex[hf]'."""

from tokenflex.dropin.saved import Conversion, ConversionConfig

__all__ = ["Conversion", "ConversionConfig"]
'''
_AUTO_CLASSES = {
    "AutoConfig": "ConversionConfig",
    "AutoModelForImageTextToText": "Conversion",
    "AutoModelForMultimodalLM": "Conversion",
}
# Not "model_type": a stock config class would take the dict that has it for its own values.
_STOCK_KEYS = {"stock_model_type": "model_type", "stock_architectures": "architectures"}


class ConvertedConfig(Variant):
    """Changes of the config class of a converted model, for the files that it writes."""

    _tokenflex_prefix = "Converted"

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, under the model type of conversions."""
        super().to_json_file(json_file_path, *args, **kwargs)
        path = Path(json_file_path)
        values = read_json(path)
        stock = {key: values.get(name) for key, name in _STOCK_KEYS.items()}
        module = STUB.removesuffix(".py")
        values |= {
            "model_type": MODEL_TYPE,
            "architectures": ["TokenFlexConversion"],
            "auto_map": {auto: f"{module}.{name}" for auto, name in _AUTO_CLASSES.items()},
            "tokenflex": {**values["tokenflex"], **stock},
        }
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_name(STUB).write_text(_STUB_SOURCE, encoding="utf-8")


class ConversionConfig(InstalledClass, PretrainedConfig):
    """The config of a saved conversion: loading it gives that of the stock model, marked."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the stock config of a conversion, with the options of its projector.

        Raises:
            ValueError: The values are not those of a conversion of a supported family.
        """
        options = config_dict.get("tokenflex")
        model_type = options.get("stock_model_type") if isinstance(options, dict) else None
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                "config of a conversion must have a stock_model_type in tokenflex, got "
                f"{excerpt(model_type)}"
            )
        assert isinstance(options, dict)
        values = {key: value for key, value in config_dict.items() if key != "auto_map"}
        values |= {name: options.get(key) for key, name in _STOCK_KEYS.items()}
        values["tokenflex"] = {k: v for k, v in options.items() if k not in _STOCK_KEYS}
        loaded = CONFIG_MAPPING[model_type].from_dict(values, **kwargs)
        mark_config(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class Conversion(InstalledClass):
    """The name of converted models in transformers' registries; loading gives the model.

    Attributes:
        load: ``load(path, config, **options)`` returns the model of a folder, and loading
            information. Both are set by :mod:`tokenflex.dropin.replace`.
        class_of: ``class_of(config)`` returns the class of a converted model.
    """

    config_class = ConversionConfig
    load: ClassVar[Callable[..., Any]]
    class_of: ClassVar[Callable[[Any], Any]]

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """Load as :func:`tokenflex.from_pretrained` does, without the processor."""
        with_info = kwargs.pop("output_loading_info", False)
        model, loading = cls.load(name_or_path, kwargs.pop("config"), **kwargs)
        return (model, loading) if with_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Return a converted model with new weights, for ``from_config`` of the Auto classes."""
        return cls.class_of(config)._from_config(config, **kwargs)


AutoConfig.register(MODEL_TYPE, ConversionConfig, exist_ok=True)


def mark_config(config: Any) -> None:
    """Let a config write the files of a conversion, and make its class known as one."""
    if isinstance(config, Variant):
        return
    family = family_of(config)
    change_class(config, family, ConvertedConfig)
    # Before transformers 5.23 the registry leaves out classes that say to be of its own modules.
    type(config).__module__ = __name__
    # The registry of transformers refuses a class whose config is another.
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class._model_mapping.register(type(config), Conversion, exist_ok=True)


def stock_config_class(config: Any) -> Any:
    """Return the class of transformers that a config, marked or not, is of."""
    return config._tokenflex_stock_class if isinstance(config, Variant) else type(config)
