"""``python -m evlgen chat``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from evlgen.commands.arguments import add_allow_downloads, add_common, add_options, positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELP = "talk with a model about images"
_COMMANDS = "/image PATH shows another image or video, /clear begins again, /exit (or Ctrl-D) leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files or addresses (or videos, for a model of videos), shown with the first message",
    )
    parser.add_argument("--cfg-path", help="project or model file; its model answers")
    parser.add_argument(
        "--checkpoint",
        help="folder of a run, of a checkpoint or of save_pretrained; with --cfg-path also a published .pth; "
        "without both the bundled model answers",
    )
    add_allow_downloads(parser)
    add_options(parser)
    parser.add_argument("--system", help="the system's turn, before the first message")
    parser.add_argument("--max-length", type=positive, help="new tokens of an answer at most; otherwise 256")
    parser.add_argument("--sample", action="store_true", help="sample answers instead of the likeliest one")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --sample")
    parser.add_argument("--frames", type=positive, default=4, help="of each video at most, evenly spaced")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from evlgen.common.logs import quiet_libraries
    from evlgen.common.plugins import load_plugins
    from evlgen.config.consent import ask_on_terminal
    from evlgen.models.protocols import Chats, offering
    from evlgen.models.zoo import load_model_of

    load_plugins(args.plugins, None)
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    allow = args.allow_downloads or ask_on_terminal
    model = load_model_of(args.cfg_path, args.checkpoint, args.options, device, allow)
    options: dict[str, Any] = {"max_length": args.max_length, "num_frames": args.frames}
    if args.sample:
        options |= {"use_nucleus_sampling": True, "temperature": args.temperature}
    chat = Chat(offering(model, Chats), args.system, options)
    for path in args.images:
        chat.show(path)
    print(_COMMANDS, flush=True)
    chat.hold(_lines(), lambda text: print(text, end="", flush=True))
    return 0


class Chat:
    """A conversation in a terminal.

    Args:
        model: whose `chat` answers.
        system: the system's turn, if there is one.
        options: of `VLM.chat`.

    Attributes:
        messages: the turns so far.
    """

    def __init__(self, model: Any, system: str | None = None, options: dict[str, Any] | None = None) -> None:
        self.model, self.options = model, options or {}
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self._shown: list[dict[str, Any]] = []  # images that the next message begins with

    def show(self, path: str) -> None:
        """Puts an image or a video before the next message. Raises `EVLGenError` where it cannot be read."""
        from evlgen.media.video import VIDEO_SUFFIXES
        from evlgen.models.chatting import pixels_of_visual
        from evlgen.models.protocols import reads_videos
        from evlgen.processors.turns import VisualPart

        suffixes = (*VIDEO_SUFFIXES, ".gif") if reads_videos(self.model) else tuple(VIDEO_SUFFIXES)
        kind = "video" if path.lower().endswith(suffixes) else "image"
        frames = self.options.get("num_frames", 4)
        pixels = pixels_of_visual(self.model, VisualPart(kind, path), frames)
        self._shown.append({"type": "image", "image": pixels})

    def hold(self, lines: Iterator[str], write: Callable[[str], None]) -> None:
        """Answers each line until there are no more. Ctrl-C stops an answer, which ends where it is."""
        from evlgen.common.errors import EVLGenError

        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            try:
                if word == "/clear":
                    self.messages, self._shown = list(self._start), []
                elif word == "/image":
                    self.show(rest.strip())
                elif word.startswith("/"):
                    write(f"{_COMMANDS}\n")
                elif word:
                    self._answer(line.strip(), write)
            except EVLGenError as error:
                write(f"{error}\n")

    def _answer(self, text: str, write: Callable[[str], None]) -> None:
        from evlgen.common.safe_text import printable

        asked: dict[str, Any] = {"role": "user", "content": [*self._shown, {"type": "text", "text": text}]}
        written = ""
        try:
            for piece in self.model.chat([*self.messages, asked], stream=True, **self.options):
                written += piece
                write("\n".join(map(printable, piece.split("\n"))))
            write("\n")
        except KeyboardInterrupt:
            write(" [stopped]\n")
        if written.strip():  # else it is as if nothing had been asked
            self.messages += [asked, {"role": "assistant", "content": written}]
            self._shown = []


def _lines() -> Iterator[str]:
    """What somebody types, until Ctrl-D; Ctrl-C before an answer says how to leave."""
    import sys

    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{_COMMANDS}", flush=True)
