"""``python -m evlgen serve``."""

from __future__ import annotations

import argparse
import os

from evlgen.commands.arguments import add_allow_downloads, add_common, add_options, positive

HELP = "answer requests over HTTP, in the form of OpenAI's chat completions"

#: The environment variable that holds the key clients have to send.
API_KEY = "EVLGEN_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="folder of a run, of a checkpoint or of save_pretrained (default: the bundled Shapes captioner)",
    )
    parser.add_argument("--cfg-path", help="project or model file; its model is served")
    add_allow_downloads(parser)
    add_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=port, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--name", help="what clients call the model (default: its folder's name)")
    parser.add_argument(
        "--prompt",
        help="what the text of a request is put into, with a slot (default: 'Question: {} Short answer:'), "
        "{}: texts are continued as they are",
    )
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="for a model that has learned conversations: a single message with one image is one, too",
    )
    parser.add_argument("--num-beams", type=positive, default=5, help="where a request does not say")
    parser.add_argument("--max-tokens", type=positive, default=256, help="new tokens of a text at most")
    parser.add_argument("--max-batch", type=positive, default=16, help="requests computed at once at most")
    parser.add_argument(
        "--max-wait",
        type=_not_negative,
        default=5.0,
        metavar="MS",
        help="milliseconds a request waits for others to share its batch (default: 5)",
    )
    parser.add_argument(
        "--queue", type=positive, default=64, help="requests that may wait; more are refused with 429"
    )
    parser.add_argument(
        "--time-limit",
        type=above_zero,
        default=60.0,
        metavar="S",
        help="seconds for an answer (default: 60)",
    )
    parser.add_argument(
        "--max-image-mb", type=above_zero, default=14.0, metavar="MB", help="of an image file (default: 14)"
    )
    parser.add_argument(
        "--max-megapixels", type=above_zero, default=32.0, metavar="MP", help="of an image (default: 32)"
    )
    parser.add_argument(
        "--allow-image-urls",
        action="store_true",
        help="download images from http(s) addresses in requests; only public addresses are read",
    )
    parser.add_argument(
        "--drain-time",
        type=above_zero,
        default=30.0,
        metavar="S",
        help="seconds for requests in progress after SIGTERM (default: 30)",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from evlgen.common.errors import ConfigError
    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.config.consent import ask_on_terminal

    try:
        from evlgen.serving.app import Service
        from evlgen.serving.fetching import Fetcher
        from evlgen.serving.limits import Limits
        from evlgen.serving.listening import bind
        from evlgen.serving.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "evlgen":
            raise
        raise ConfigError(f'serving needs the package {error.name}: pip install "evlgen[serve]"') from error

    api_key = _api_key()
    load_plugins(args.plugins, None)
    quiet_libraries()
    listening = bind(args.host, args.port)
    host, port = listening.getsockname()[:2]
    is_local = host in ("127.0.0.1", "::1")
    if not is_local and api_key is None:
        _warn_open(host)

    import torch

    from evlgen.models.zoo import load_model_of
    from evlgen.serving.answering import Answerer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    consent = args.allow_downloads or ask_on_terminal
    model = load_model_of(args.cfg_path, args.checkpoint, args.options, device, consent)
    image_bytes = int(args.max_image_mb * 1e6)
    limits = Limits(
        max_batch=args.max_batch,
        max_wait=args.max_wait / 1000,
        queue=args.queue,
        seconds=args.time_limit,
        max_tokens=args.max_tokens,
        texts=max(Limits.texts, args.num_beams),
        body_bytes=image_bytes * 4 // 3 + (1 << 20),  # as base64, and the rest
        image_pixels=int(args.max_megapixels * 1e6),
        drain_seconds=args.drain_time,
    )
    name = args.name or _name_of(args)
    service = Service(
        Answerer(model, args.prompt, args.conversations),
        name,
        limits,
        api_key,
        Fetcher(image_bytes) if args.allow_image_urls else None,
        args.num_beams,
        local_only=is_local and api_key is None,
    )
    shown = f"[{host}]" if ":" in host else host
    serve(
        service,
        listening,
        ready=lambda: print(f"serving {name} at http://{shown}:{port}/v1", flush=True),
    )
    return 0


def _api_key() -> str | None:
    """The key in the environment; none where the variable is not set."""
    from evlgen.common.errors import ConfigError

    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{API_KEY} is set and empty: give it a key, or unset it to serve without one.")
    return None if key is None else key.strip()


def _warn_open(host: str) -> None:
    import logging

    logging.getLogger(__name__).warning(
        "serving at %s without a key: whoever reaches this machine can use the model. Set %s.", host, API_KEY
    )


def _name_of(args: argparse.Namespace) -> str:
    """What the model is called where no name was given: its folder or file, else that of the bundled one."""
    path = args.checkpoint or args.cfg_path
    if path is None:
        return "shapes"
    name = os.path.basename(os.path.normpath(path))
    return name.removesuffix(".yaml") or "model"


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {text}")
    return number


def above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return number
