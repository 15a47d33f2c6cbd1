"""Kernels that are lowered once for each set of shapes, however often a program calls them."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def once(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """``function(*arrays, **fixed)`` under a ``jax.jit`` of its own, the same one in every call.

    A kernel takes a third of a second to lower and as long to compile. Called by way of one ``jit``, it is one function
    of the program for all layers, and for the forward and backward pass, that use it with the same shapes; called
    directly, every call is lowered anew, and differs from the others in the lines of Python that it names.

    Args:
        function: of arrays.
        fixed: what is not an array, hashable.
    """

    def call(*arrays: Any, **more: Any) -> Any:
        return function(*arrays, **more, **fixed)

    call.__name__ = function.__name__
    return jax.jit(call)
