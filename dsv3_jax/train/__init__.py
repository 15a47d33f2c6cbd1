"""Training: losses, optimizer, schedules, the step, and the run around it.

Calling the package, ``ds.train(config, out)``, is calling :func:`dsv3_jax.train.trainer.train`: the name of the folder
and of the function are one, and importing any part of the folder would otherwise hide the function.
"""

import sys
import types
from typing import Any


class _Train(types.ModuleType):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from dsv3_jax.train.trainer import train

        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _Train
