"""The page of the demo, made of Gradio's components."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import gradio as gr
from PIL import Image

from blipren.grounding_blipren import read_places
from blipren.training.demo.pictures import thumbnail
from blipren.training.demo.talk import Talk
from blipren.training.demo.visit import Limits, Visit, read_uploads
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import Sampling
from blipren.training.evaluation.report.places import draw_places

READY_QUESTIONS = ("What is in the picture?", "What colours are in it?", "How many things are in it?")
# words as buttons of a finger's size, without circles, in a box that scrolls
CSS = """
.words .wrap { max-height: 18rem; overflow-y: auto; gap: 4px }
.words label { min-height: 2.5rem; padding: 4px 10px }
.words label input { position: absolute; opacity: 0 }
.words label span { margin: 0 }
.words label:has(input:checked) { border-color: var(--color-accent); background: var(--color-accent-soft) }
.min_value, .max_value { color: var(--body-text-color) !important }
[aria-label="Share"] { display: none } /* it would send a picture to another host */
.map .image-container { padding-top: 2.25rem } /* below its label, which else covers the top of the picture */
.example img { width: 3rem; height: 3rem; border-radius: 4px }
.words label:focus-within { outline: 2px solid var(--color-accent) }
"""


# names for a screen reader where Gradio's components have none: each conversation, and the pictures that can be enlarged;
# and a word that a mouse rests on is chosen as if it were tapped, without taking the focus from the text box
SCRIPT = """() => {
    const name = () => {
        for (const log of document.querySelectorAll("[role=log]"))
            log.ariaLabel = log.closest(".block").querySelector("label").innerText.trim();
        for (const image of document.querySelectorAll("button:not([aria-label]) > .image-frame > img"))
            image.closest("button").ariaLabel = image.closest(".map") ? "Enlarge the map" : "Enlarge the picture";
    };
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
    let resting;
    document.addEventListener("pointermove", event => {
        clearTimeout(resting);
        const word = event.pointerType == "mouse" && event.target.closest(".words label");
        if (word) resting = setTimeout(() => word.querySelector("input").click(), 200);
    });
}"""
UNCHANGED = gr.skip()
READY_BOX = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
NO_WORDS, NO_MAP = gr.Radio(choices=[], value=None, visible=False), gr.Image(value=None, visible=False)


async def refuse_address(path: str) -> str:
    """Take the place of Gradio's move into its cache: files are there by the visitor's own upload, and nothing else is read."""
    if "://" in path or path.startswith("data:"):
        raise gr.Error("Only uploaded pictures are read.", print_exception=False)
    return path


def describe_known(known: list[dict]) -> str:
    """Return Markdown of similar pictures of a memory: their similarity and captions."""
    if not known:
        return "The captions of the pictures in the model's memory that are most similar to the last picture."
    rows = [f"- {one['similarity']:.2f}: {escape(' · '.join(one['captions']))}" for one in known]
    return "\n".join(rows)


def build_page(
    models: Sequence[tuple[str, object, object]],
    limits: Limits,
    examples: Sequence[Path] = (),
    on_device: Callable[[Callable], Callable] = lambda function: function,
) -> gr.Blocks:
    """Return the page of one model, or of two that answer side by side.

    Args:
        models: name, model and processor of each, as `load_model` returns them.
        examples: pictures that a visitor can have captioned at a touch; their names say what they show.
        on_device: decorates the functions that compute, where a device is lent for each call. They take and return no
            model, and what they return can be pickled.
    """
    takes = {processor.frames_per_video for _, _, processor in models}
    frames = takes.pop() if len(takes) == 1 and find_spec("av") else None

    @on_device
    def stream_answer(
        number: int, talk: Talk, question, pictures, sampling, options
    ) -> Iterator[tuple[str, Talk | None]]:
        """Yield the answer of a model so far, and at the end the conversation with it."""
        text = ""
        for text in talk.stream(*models[number][1:], question, pictures, sampling, **options):
            yield text, None
        yield text, talk

    @on_device
    def draw_map(number: int, talk: Talk, place: int) -> Image.Image:
        return talk.word_picture(*models[number][1:], place)

    def answer(message: dict, visit: Visit | None, tokens: int, beams: int, temperature: float) -> Iterator[list]:
        """Yield the messages, the state, the text box, the words and no map, again and again until the answers are there."""
        visit = visit or Visit([Talk() for _ in models])
        question, paths = (message["text"] or "").strip(), message["files"] or []
        if not question and not paths:
            yield [UNCHANGED] * len(outputs)
            return

        def shown(box=UNCHANGED, words: Sequence = (NO_WORDS,) * len(models)) -> list:
            known = [describe_known(talk.known) for talk in visit.talks]
            return [*visit.shown, visit, box, *words, *([NO_MAP] * len(models)), *known]

        try:
            pictures = read_uploads(paths, limits, frames)
            visit.check(pictures, limits)
        except UserError as error:
            visit.say("user", question or Path(paths[0]).name)
            visit.say("assistant", f"⚠ {error}")
            yield shown(gr.MultimodalTextbox({"text": question if paths else "", "files": []}))
            return
        visit.say("user", *(shown_picture(thumbnail(each), "uploaded picture") for each in pictures))
        visit.say("user", *([question] if question else []))
        visit.say("assistant", "…")
        yield shown(gr.MultimodalTextbox(None, submit_btn=False, stop_btn=True))
        sampling = Sampling(temperature, 0.95 if temperature else 1.0, 1.0, [0])
        options = {"max_new_tokens": min(int(tokens), limits.tokens), "num_beams": 1 if temperature else int(beams)}
        options["max_time"] = limits.seconds
        for number, messages in enumerate(visit.shown):
            given = number, visit.talks[number], question or None, pictures, sampling, options
            try:
                due = 0.0
                for text, talk in stream_answer(*given):
                    messages[-1]["content"] = text or "(an empty answer)"
                    visit.talks[number] = talk or visit.talks[number]
                    if talk or time.monotonic() >= due:  # ten times a second: more would keep the server busy
                        due = time.monotonic() + 0.1
                        yield shown()
                if drawn := drawn_places(visit.talks[number], text, question):
                    messages.append({"role": "assistant", "content": drawn})
            except UserError as error:
                messages[-1]["content"] = f"⚠ {error}"
            except Exception:  # the visitor gets no word of what went wrong inside
                logging.getLogger(__name__).exception("an answer failed")
                messages[-1]["content"] = "⚠ The model failed on this question. Try another one."
        choices = [[(word, place) for place, (word, _) in enumerate(talk.words)] for talk in visit.talks]
        yield shown(READY_BOX, [gr.Radio(choices=own, value=None, visible=bool(own)) for own in choices])

    def drawn_places(talk: Talk, text: str, question: str) -> dict | None:
        """Return the latest picture with the boxes and points of an answer, or None if it has none."""
        found, picture = read_places(text), talk.images[-1]
        if isinstance(picture, list) or not (found.boxes or found.points):
            return None
        return shown_picture(
            thumbnail(draw_places(picture, text, question), 640), "picture with the boxes of the answer"
        )

    def shown_picture(image: Image.Image, alt_text: str) -> dict:
        """Write a picture to a file of the page, once: a component would be written at every step."""
        path = Path(chats[0].GRADIO_CACHE) / uuid4().hex / "picture.jpg"
        path.parent.mkdir(parents=True)
        image.save(path, quality=90)
        chats[0].temp_files.add(str(path))  # deleted when it is old
        return {"path": str(path), "alt_text": alt_text}

    def look(number: int, place: int | None, visit: Visit | None) -> dict:
        """Return the map of a word over the pictures."""
        if place is None or visit is None or place >= len(visit.talks[number].words):
            return NO_MAP
        word = visit.talks[number].words[place][0]
        return gr.Image(
            draw_map(number, visit.talks[number], place), label=f"Where the model looked for “{word}”", visible=True
        )

    def forget(request: gr.Request) -> None:
        page.app.state_holder.delete_state(request.session_hash)

    names = [name for name, _, _ in models]
    title = " and ".join(names)
    kinds = "pictures" if frames is None else "pictures, or clips,"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        visit = gr.State(None, time_to_live=3600)
        gr.Markdown(
            f"# {title}\nAdd one or several {kinds} and ask. With an empty question the model writes a caption."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    labels = ["Conversation"] if len(models) == 1 else names
                    chats = [
                        gr.Chatbot(label=label, height=420, min_width=280, buttons=["copy"], feedback_options=None)
                        for label in labels
                    ]
                box = gr.MultimodalTextbox(
                    label="Picture and question", show_label=False, placeholder="Ask about a picture",
                    file_types=["image"] if frames is None else ["image", "video"], file_count="multiple",
                    elem_id="question", html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                )  # fmt: skip
                box.async_move_resource_to_block_cache = refuse_address
                with gr.Row():
                    ready = [gr.Button(text, size="sm", min_width=120) for text in READY_QUESTIONS]
                with gr.Row():
                    touched = [
                        gr.Button(
                            path.stem.replace("-", " "), icon=path, size="sm", min_width=120, elem_classes="example"
                        )
                        for path in examples
                    ]
                new = gr.Button("New conversation", size="sm", variant="secondary")
                with gr.Accordion("Settings", open=False):
                    tokens = gr.Slider(
                        8, limits.tokens, min(64, limits.tokens), step=8, label="Longest answer (tokens)"
                    )
                    beams = gr.Slider(1, 5, 1, step=1, label="Beams (without temperature)")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 takes the likeliest words)")
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("## What it looked at\nPoint at a word of the last answer, or tap it.")
                maps, words = [], []
                for name in names:
                    whose = "the last answer" if len(models) == 1 else f"the last answer of {name}"
                    words.append(gr.Radio([], label=f"Words of {whose}", visible=False, elem_classes="words"))
                    maps.append(  # below the words, which therefore stay where they are when it appears
                        gr.Image(
                            visible=False, interactive=False, buttons=["fullscreen"], format="jpeg", elem_classes="map"
                        )
                    )
                lists = []
                for name, model, _ in models:
                    with gr.Accordion(
                        "Similar known pictures" if len(models) == 1 else f"Similar known pictures of {name}",
                        open=False,
                        visible=model.memory is not None,
                    ):
                        lists.append(gr.Markdown(describe_known([])))
        outputs = [*chats, visit, box, *words, *maps, *lists]
        settings = [visit, tokens, beams, temperature]
        running = [box.submit(answer, [box, *settings], outputs, api_visibility="private")]
        messages = [{"text": text, "files": []} for text in READY_QUESTIONS]
        messages += [{"text": "", "files": [str(path)]} for path in examples]
        for button, message in zip(ready + touched, map(gr.State, messages)):
            running.append(button.click(answer, [message, *settings], outputs, api_visibility="private"))
        box.stop(lambda: READY_BOX, None, box, cancels=running, api_visibility="private")
        for number in range(len(models)):
            words[number].input(
                partial(look, number), [words[number], visit], maps[number],
                trigger_mode="always_last", api_visibility="private",
            )  # fmt: skip
        nothing = [
            *([] for _ in chats), None, READY_BOX, *([NO_WORDS] * len(chats)), *([NO_MAP] * len(chats)),
            *([describe_known([])] * len(chats)),
        ]  # fmt: skip
        for event in (new.click, *(chat.clear for chat in chats)):
            event(lambda: nothing, None, outputs, cancels=running, api_visibility="private")
        page.unload(forget)
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)
    return page


def launch(page: gr.Blocks, **options):
    """Start the server of a page. Nothing of this machine but the page and uploads of this run is served."""
    return page.launch(
        max_file_size="20mb", show_error=False, allowed_paths=[], ssr_mode=False, footer_links=[], css=CSS, js=SCRIPT,
        quiet=True, enable_monitoring=False, mcp_server=False, state_session_capacity=200, **options,
    )  # fmt: skip
