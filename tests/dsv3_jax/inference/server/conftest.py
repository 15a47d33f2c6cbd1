"""A server of the engine that all tests share, on a port of this machine."""

import contextlib
import threading
import time
import types

import pytest


@pytest.fixture(scope="module")
def served(engine_of):
    """``(options, engine=None) -> context`` of a running server: ``url``, ``client``, ``engine``, ``worker``."""
    import openai
    import uvicorn

    from dsv3_jax.inference.server import ServerOptions, make_app

    @contextlib.contextmanager
    def serve(engine=None, **options):
        engine = engine or engine_of()
        app = make_app(engine, ServerOptions(**options))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=url + "/v1", api_key=options.get("api_key", "none"), max_retries=0)
        try:
            yield types.SimpleNamespace(
                url=url, port=port, client=client, engine=engine, worker=app.state.server.worker
            )
        finally:
            client.close()
            server.should_exit = True
            thread.join(30)

    return serve


@pytest.fixture(scope="module")
def server(served):
    with served() as running:
        yield running


@pytest.fixture(scope="session")
def settled():
    """``(running) -> None`` waits until no request is open, and finds no page held."""

    def wait(running):
        until = time.monotonic() + 30
        while (running.worker.open or running.engine.busy) and time.monotonic() < until:
            time.sleep(0.02)
        assert running.worker.open == 0
        assert running.engine.blocks.held == 0

    return wait
