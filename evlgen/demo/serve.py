"""Serving the page: to this machine alone unless told otherwise, and with nothing from the internet."""

from __future__ import annotations

import os
import socket
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evlgen.serving.limits import Limits

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
#: What the browser may load: the page's own files.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def prepare(folder: str | os.PathLike) -> None:
    """Makes gradio, which must not be imported yet, keep uploads in a folder and send no statistics."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_SHARE"] = "False"


class _Guard:
    """Answers only requests addressed to ``hosts`` (None: any), and says what the browser may load."""

    def __init__(self, app: Any, hosts: Sequence[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and "headers" in scope:
            if host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"this page is for localhost only."})
                return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, receive, with_policy)


def make_app(page: Any, limits: Limits, local_only: bool) -> Any:
    """The HTTP application of a page.

    Args:
        page: of `page.build_page`.
        local_only: requests must be addressed to this machine by name, see `serving.app.Service`.
    """
    import fastapi
    import gradio as gr

    from evlgen.demo.page import CSS

    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(_Guard, hosts=_LOCAL_HOSTS if local_only else None)
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono),
        css=CSS,
    )


def run_app(app: Any, listening: socket.socket, limits: Limits) -> None:
    """Answers until SIGTERM or Ctrl+C."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def example_files(folder: Path) -> list[tuple[str, str]]:
    """(file, name) of what can be clicked: drawn images, a drawn video, and the first of Flickr8k's
    validation images where these are in the data root."""
    from PIL import Image

    from evlgen.datasets.shapes.videos import NUM_FRAMES, ShapesVideo, moving_scene
    from evlgen.datasets.shapes.world import draw, scene

    found = []
    for number in (1, 0, 3):
        path = folder / f"drawn-{number}.png"
        Image.fromarray(draw(scene("test", number))).save(path)
        found.append((str(path), f"drawn {number}"))
    path = folder / "drawn-video.gif"
    frames = [Image.fromarray(f) for f in ShapesVideo(moving_scene("test", 2)).frames(range(NUM_FRAMES))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, loop=0)
    return [*found, (str(path), "drawn video"), *_photographs(folder)]


def _photographs(folder: Path, count: int = 4) -> list[tuple[str, str]]:
    from evlgen.files.io import cache_root

    archive = cache_root() / "flickr8k" / "val.zip"
    if not archive.is_file():
        return []
    found = []
    with zipfile.ZipFile(archive) as file:
        for name in sorted(n for n in file.namelist() if n.endswith(".jpg"))[:count]:
            path = folder / Path(name).name
            path.write_bytes(file.read(name))
            found.append((str(path), "Flickr8k"))
    return found
