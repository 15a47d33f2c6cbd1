"""An HTTP server of an engine that speaks OpenAI's protocol; needs the ``serve`` extra."""

from dsv3_jax.inference.server.app import ServerOptions, make_app

__all__ = ["ServerOptions", "make_app"]
