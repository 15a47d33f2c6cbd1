"""DeepSeek-V3 / R1 in JAX and Flax: the model, its training and its generation, on Hopper pods and on a laptop CPU.

>>> import dsv3_jax as ds
>>> config = ds.load_config("tiny")
>>> model = ds.DeepSeekV3(config.model, rngs=nnx.Rngs(0))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.config import Config, ConfigError, load_config, preset_names, replace
    from dsv3_jax.data import prepare_data
    from dsv3_jax.inference.generate import generate, generate_text
    from dsv3_jax.interop.convert import convert
    from dsv3_jax.interop.pretrained import Pretrained, from_pretrained, save_pretrained
    from dsv3_jax.model import DeepSeekV3, abstract_model
    from dsv3_jax.planning import count_parameters, flops_per_token
    from dsv3_jax.train.state import init_state, model_of
    from dsv3_jax.train.step import make_eval_step, make_train_step
    from dsv3_jax.train.trainer import Run, train

# Where each public name lives. They are imported when first used: `dsv3 --help` needs no JAX.
_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "DeepSeekV3": "model",
    "Pretrained": "interop.pretrained",
    "Run": "train.trainer",
    "abstract_model": "model",
    "convert": "interop.convert",
    "count_parameters": "planning",
    "flops_per_token": "planning",
    "from_pretrained": "interop.pretrained",
    "generate": "inference.generate",
    "generate_text": "inference.generate",
    "init_state": "train.state",
    "load_config": "config",
    "make_eval_step": "train.step",
    "make_train_step": "train.step",
    "model_of": "train.state",
    "prepare_data": "data",
    "preset_names": "config",
    "replace": "config",
    "save_pretrained": "interop.pretrained",
}

__all__ = [
    "Config",
    "ConfigError",
    "DeepSeekV3",
    "Pretrained",
    "Run",
    "abstract_model",
    "convert",
    "count_parameters",
    "flops_per_token",
    "from_pretrained",
    "generate",
    "generate_text",
    "init_state",
    "load_config",
    "make_eval_step",
    "make_train_step",
    "model_of",
    "prepare_data",
    "preset_names",
    "replace",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # The package of that name is callable: see its docstring.
        return importlib.import_module("dsv3_jax.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dsv3_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
