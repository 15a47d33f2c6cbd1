"""Configuration: the schema, its presets, and what is refused."""

from dsv3_jax.config.loader import (
    cluster_names,
    differences,
    load_cluster,
    load_config,
    preset_folder,
    preset_names,
    to_toml,
)
from dsv3_jax.config.schema import (
    AxesConfig,
    ClusterConfig,
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
from dsv3_jax.config.supported import schedulable, supported
from dsv3_jax.config.validate import validate, validate_model

__all__ = [
    "AxesConfig",
    "ClusterConfig",
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
    "cluster_names",
    "differences",
    "load_cluster",
    "load_config",
    "preset_folder",
    "preset_names",
    "replace",
    "schedulable",
    "supported",
    "to_toml",
    "validate",
    "validate_model",
]
