"""Configuration: the schema, its presets, and what is refused."""

from dsv3_jax.config.loader import differences, load_config, preset_folder, preset_names, to_toml
from dsv3_jax.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    Schedule,
    Segment,
    TrainConfig,
    replace,
)
from dsv3_jax.config.validate import validate, validate_model

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "Schedule",
    "Segment",
    "TrainConfig",
    "differences",
    "load_config",
    "preset_folder",
    "preset_names",
    "replace",
    "to_toml",
    "validate",
    "validate_model",
]
