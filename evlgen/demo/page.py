"""The page itself, of gradio's components."""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from evlgen.common.errors import EVLGenError
from evlgen.demo.exhibit import Caption, Exhibit
from evlgen.demo.uploads import read_upload
from evlgen.serving.limits import Limits
from evlgen.visualization.figure import describe_stage, draw_stage

CSS = """
.words {display: flex; flex-wrap: wrap; gap: .3rem .7rem; padding: 0; margin: 0 0 .8rem; list-style: none}
.words li {display: grid; align-content: start; text-align: center}
.words i {height: .3rem; border-radius: .2rem; background: var(--color-accent); opacity: .85}
.words small {color: var(--body-text-color-subdued)}
.problem {padding: .6rem .8rem; border-left: .3rem solid #c62828}
.seen img, .merging img {image-rendering: pixelated}
.answers > .wrapper {box-sizing: border-box; padding-top: 2rem}  /* messages begin below the label */
"""
_SEEN = 256  # pixels of an image's height on the page at least
_WIDEST = 2048  # of its width at most


def build_page(
    exhibits: Sequence[Exhibit], examples: Sequence[tuple[str, str]], limits: Limits, num_frames: int
) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        exhibits: the models, side by side.
        examples: (file, name) of images and videos to click.
        limits: of uploads and answers; see `Limits`.
        num_frames: of a video at most.
    """
    import gradio as gr

    read = lru_cache(maxsize=2)(lambda path: read_upload(path, limits, num_frames))
    merge = lru_cache(maxsize=16)(lambda place, path: exhibits[place].merging(read(path)))

    def show(path: str | None, num_beams: int, max_length: int, layer: int) -> Iterator[dict]:
        """Everything about a new file; where it cannot be read, why, and nothing else."""
        forgotten = dict(zip([history, *chats], _forgotten(exhibits), strict=True))
        yield {problem: "", seen: None, **dict.fromkeys(outputs), **forgotten}
        if path is None:
            return
        try:
            yield {seen: _beside(read(path))}
            yield from write(path, num_beams, max_length)
            yield draw(path, layer)
        except EVLGenError as error:
            yield {problem: _problem(error)}

    def write(path: str | None, num_beams: int, max_length: int) -> Iterator[dict]:
        """The captions."""
        for exhibit, (text, words) in zip(exhibits, captions, strict=True):
            if path is not None:
                try:
                    found = exhibit.captions(read(path), int(num_beams), int(max_length))
                except EVLGenError as error:
                    yield {problem: _problem(error)}
                    return
                yield {
                    text: "\n".join(one.text for one in found),
                    words: "<p>Probability of each word</p>" + "".join(map(_words, found)),
                }

    def draw(path: str | None, layer: int) -> dict:
        """The merging after a layer, by each model that merges."""
        found: dict[Any, Any] = {}
        for place, (title, drawing) in enumerate(drawings):
            if path is not None:
                try:
                    video = merge(place, path)
                    about, found[drawing] = describe_stage(video, int(layer)), draw_stage(video, int(layer))
                except EVLGenError as error:  # this model merges nothing
                    about, found[drawing] = str(error), None
                found[title] = html.escape(f"{exhibits[place].title}, {about}")
        return found

    def ask(path: str | None, text: str, past: list[list[dict]]) -> dict:
        """The answers to a question."""
        if path is None or not text.strip():
            return {problem: _problem("Choose an image or a video, and write a question.")}
        if len(text) > limits.text_chars:
            return {problem: _problem(f"The question is too long: at most {limits.text_chars} characters.")}
        try:
            answers = [
                exhibit.answer(read(path), turns, text) for exhibit, turns in zip(exhibits, past, strict=True)
            ]
        except EVLGenError as error:
            return {problem: _problem(error)}
        asked = {"role": "user", "content": text}
        past = [
            [*turns, asked, {"role": "assistant", "content": answer}]
            for turns, answer in zip(past, answers, strict=True)
        ]
        return {problem: "", question: "", history: past, **dict(zip(chats, past, strict=True))}

    with gr.Blocks(analytics_enabled=False, title="EVLGen", delete_cache=(600, 3600)) as page:
        history = gr.State([[] for _ in exhibits], time_to_live=3600)
        gr.Markdown("# EVLGen\nCaptions, answers, and which regions of an image became which soft prompt.")
        with gr.Row():
            with gr.Column(min_width=280):
                file = gr.File(
                    label="Image or video", file_types=["image", "video"], height=140, elem_id="file"
                )
                gallery = gr.Gallery(
                    [(path, name) for path, name in examples],
                    label="Examples",
                    show_label=False,
                    columns=4,
                    height=130 * math.ceil(len(examples) / 4),
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                beams = gr.Slider(1, limits.texts, 5, step=1, label="Beams", elem_id="beams")
                length = gr.Slider(
                    1, min(100, limits.max_tokens), 30, step=1, label="Longest caption, in tokens"
                )
                again = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(min_width=280):
                problem = gr.HTML("", elem_id="problem")
                seen = gr.Image(
                    label="Seen",
                    show_label=False,
                    interactive=False,
                    buttons=[],
                    elem_id="seen",
                    elem_classes="seen",
                )
        captions, drawings, chats = [], [], []
        with gr.Row():
            for exhibit in exhibits:
                with gr.Column(min_width=280):
                    text = gr.Textbox(
                        label=f"Caption by {exhibit.title}",
                        interactive=False,
                        lines=2,
                        elem_classes="caption",
                    )
                    words = gr.HTML("")
                    captions.append((text, words))
        last = _last_stage(exhibits, read(examples[0][0]))
        layer = gr.Slider(
            0,
            max(1, last),
            last,
            step=1,
            label="Merging: 0 is the image, the last step the soft prompts",
            visible=last > 0,
            elem_id="layer",
        )
        with gr.Row():
            for exhibit in exhibits:
                with gr.Column(min_width=280):
                    title = gr.HTML("")
                    drawing = gr.Image(
                        label=f"Merging by {exhibit.title}",
                        show_label=False,
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_classes="merging",
                    )
                    drawings.append((title, drawing))
        with gr.Row():
            question = gr.Textbox(label="Question", scale=4, min_width=200, max_lines=3, elem_id="question")
            send = gr.Button("Ask", scale=1, min_width=80)
        with gr.Row():
            for exhibit in exhibits:
                note = "" if exhibit.chats else " (each question alone)"
                chats.append(
                    gr.Chatbot(
                        label=f"Answers by {exhibit.title}{note}",
                        height=320,
                        buttons=[],
                        min_width=280,
                        render_markdown=False,
                        elem_classes="answers",
                    )
                )
        outputs = [part for pair in (*captions, *drawings) for part in pair]

        options: dict[str, Any] = {
            "api_visibility": "private",
            "concurrency_id": "model",
            "concurrency_limit": 1,
        }
        everything = [problem, seen, history, *outputs, *chats]
        file.change(show, [file, beams, length, layer], everything, **options)
        again.click(write, [file, beams, length], [problem, *outputs], **options)
        layer.change(draw, [file, layer], outputs, show_progress="hidden", **options)
        for event in (question.submit, send.click):
            event(ask, [file, question, history], [problem, question, history, *chats], **options)
        for chat in chats:
            chat.clear(lambda: _forgotten(exhibits), None, [history, *chats], api_visibility="private")
        gallery.select(_chosen(examples), None, file, api_visibility="private")
    refuse_addresses(file)
    return page.queue(max_size=limits.queue, default_concurrency_limit=1)


def refuse_addresses(component: Any) -> None:
    """Makes a component of gradio's take files that were uploaded, and download nothing."""
    import gradio as gr

    move = component.async_move_resource_to_block_cache

    async def checked(path: str | None) -> str | None:
        if path is not None and "://" in path:
            raise gr.Error("addresses are not read: upload a file.")
        return await move(path)

    component.async_move_resource_to_block_cache = checked


def _chosen(examples: Sequence[tuple[str, str]]) -> Callable:
    import gradio as gr

    def chosen(event) -> str:
        return examples[event.index][0]

    chosen.__annotations__ = {"event": gr.SelectData, "return": str}
    return chosen


def _forgotten(exhibits: Sequence[Exhibit]) -> list:
    """The history of all chats, and what each of them shows, before anything was asked."""
    return [[[] for _ in exhibits], *([] for _ in exhibits)]


def _last_stage(exhibits: Sequence[Exhibit], frames: Sequence[Image.Image]) -> int:
    """The last of the stages of `draw_stage`, of the model that has most; 0 where none merges."""
    stages = [0]
    for exhibit in exhibits:
        with contextlib.suppress(EVLGenError):
            stages.append(len(exhibit.merging(frames[:1])[0].stages) - 1)
    return max(stages)


def _problem(error: object) -> str:
    return f'<p role="alert" class="problem">{html.escape(str(error))}</p>'


def _words(caption: Caption) -> str:
    """The words of a caption, each with its probability after those before it, as a bar and a number."""
    items = (
        f'<li><span>{html.escape(word)}</span><i style="width: {100 * chance:.0f}%"></i>'
        f"<small>{100 * chance:.0f} %</small></li>"
        for word, chance in caption.words
    )
    return f'<ul class="words">{"".join(items)}</ul>'


def _beside(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames side by side, small ones enlarged."""
    height = min(max(frames[0].height, _SEEN), 512)
    scales = [min(height / frame.height, _WIDEST / frame.width) for frame in frames]
    sizes = [
        (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
        for frame, scale in zip(frames, scales, strict=True)
    ]
    strip = Image.new("RGB", (sum(width for width, _ in sizes), max(height for _, height in sizes)))
    left = 0
    for frame, size in zip(frames, sizes, strict=True):
        strip.paste(frame.resize(size, Image.Resampling.NEAREST if frame.height < _SEEN else None), (left, 0))
        left += size[0]
    return strip
