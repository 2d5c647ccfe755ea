"""The page of the demo, made of Gradio's components."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import gradio as gr
from PIL import Image

from blipren.training.conversation.conversation import Conversation
from blipren.training.demo.visit import Limits, Visit, read_uploads
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import Sampling

READY_QUESTIONS = ("What is in the picture?", "What colours are in it?", "How many things are in it?")
# words as buttons of a finger's size, without circles, in a box that scrolls
CSS = """
#words .wrap { max-height: 18rem; overflow-y: auto; gap: 4px }
#words label { min-height: 2.5rem; padding: 4px 10px }
#words label input { position: absolute; opacity: 0 }
#words label span { margin: 0 }
#words label:has(input:checked) { border-color: var(--color-accent); background: var(--color-accent-soft) }
#words label:focus-within { outline: 2px solid var(--color-accent) }
"""


READY_BOX = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
NOTHING = gr.Radio(choices=[], value=None, visible=False), gr.Image(value=None, visible=False)  # no words, no map


async def refuse_address(path: str) -> str:
    """Take the place of Gradio's move into its cache: files are there by the visitor's own upload, and nothing else is read."""
    if "://" in path or path.startswith("data:"):
        raise gr.Error("Only uploaded pictures are read.", print_exception=False)
    return path


def build_page(model, processor, title: str, limits: Limits) -> gr.Blocks:
    """Return the page of a model.

    Args:
        model, processor: as `load_model` returns them.
        title: name of the model.
    """

    def answer(message: dict, visit: Visit | None, tokens: int, beams: int, temperature: float) -> Iterator[tuple]:
        """Yield the messages, the state, the text box, the words and no map, again and again until an answer is there."""
        visit = visit or Visit(Conversation(model, processor, keep_cache=False))
        question, paths = (message["text"] or "").strip(), message["files"] or []
        if not question and not paths:
            yield (gr.skip(),) * 5
            return
        try:
            images = read_uploads(paths, limits)
            if not images and not visit.conversation.images:
                raise UserError("Add a picture first: drop it on the text box, paste it, or press the clip.")
        except UserError as error:
            visit.shown += [says("user", question or Path(paths[0]).name), says("assistant", f"⚠ {error}")]
            yield visit.shown, visit, gr.MultimodalTextbox({"text": question if paths else "", "files": []}), *NOTHING
            return
        visit.shown += [says("user", {"path": store(image), "alt_text": "uploaded picture"}) for image in images]
        visit.shown += [says("user", question)] if question else []
        visit.shown.append(says("assistant", "…"))
        yield visit.shown, visit, gr.MultimodalTextbox(None, submit_btn=False, stop_btn=True), *NOTHING
        sampling = Sampling(temperature, 0.95 if temperature else 1.0, 1.0, [0])
        options = {"max_new_tokens": min(int(tokens), limits.tokens), "num_beams": 1 if temperature else int(beams)}
        try:
            for text in visit.stream(question or None, images, limits, sampling, **options):
                visit.shown[-1] = says("assistant", text or "(an empty answer)")
                yield visit.shown, visit, gr.skip(), *NOTHING
        except UserError as error:
            visit.shown[-1] = says("assistant", f"⚠ {error}")
        except Exception:  # the visitor gets no word of what went wrong inside
            logging.getLogger(__name__).exception("an answer failed")
            visit.shown[-1] = says("assistant", "⚠ The model failed on this question. Try another one.")
        choices = [(word, place) for place, (word, _) in enumerate(visit.words)]
        words = gr.Radio(choices=choices, value=None, visible=bool(choices))
        yield visit.shown, visit, READY_BOX, words, NOTHING[1]

    def store(image: Image.Image) -> str:
        """Write a picture, made small, to a file of the page, once: a component would be written at every step."""
        small = image.copy()
        small.thumbnail((320, 320))
        path = Path(chat.GRADIO_CACHE) / uuid4().hex / "picture.jpg"
        path.parent.mkdir(parents=True)
        small.save(path, quality=90)
        chat.temp_files.add(str(path))  # deleted when it is old
        return str(path)

    def look(place: int | None, visit: Visit | None) -> dict:
        """Return the map of a word over the pictures."""
        if place is None or visit is None or not visit.words:
            return NOTHING[1]
        word = visit.words[place][0]
        return gr.Image(visit.word_picture(place), label=f"Where the model looked for “{word}”", visible=True)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        visit = gr.State(None, time_to_live=3600)
        gr.Markdown(
            f"# {title}\nAdd one or several pictures and ask. With an empty question the model writes a caption."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(label="Conversation", height=420, buttons=["copy"], feedback_options=None)
                box = gr.MultimodalTextbox(
                    label="Picture and question", show_label=False, placeholder="Ask about a picture",
                    file_types=["image"], file_count="multiple", elem_id="question",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                )  # fmt: skip
                box.async_move_resource_to_block_cache = refuse_address
                with gr.Row():
                    ready = [gr.Button(text, size="sm", min_width=120) for text in READY_QUESTIONS]
                new = gr.Button("New conversation", size="sm", variant="secondary")
                with gr.Accordion("Settings", open=False):
                    tokens = gr.Slider(
                        8, limits.tokens, min(64, limits.tokens), step=8, label="Longest answer (tokens)"
                    )
                    beams = gr.Slider(1, 5, 1, step=1, label="Beams (without temperature)")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 takes the likeliest words)")
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("### What it looked at\nTap a word of the last answer.")
                seen = gr.Image(visible=False, interactive=False, buttons=["fullscreen"], format="jpeg", elem_id="map")
                words = gr.Radio([], label="Words of the last answer", visible=False, elem_id="words")
        outputs = [chat, visit, box, words, seen]
        settings = [visit, tokens, beams, temperature]
        running = [box.submit(answer, [box, *settings], outputs, api_visibility="private")]
        for button in ready:
            message = gr.State({"text": button.value, "files": []})
            running.append(button.click(answer, [message, *settings], outputs, api_visibility="private"))
        box.stop(lambda: READY_BOX, None, box, cancels=running, api_visibility="private")
        words.input(look, [words, visit], seen, api_visibility="private")
        for event in (new.click, chat.clear):
            event(lambda: ([], None, READY_BOX, *NOTHING), None, outputs, cancels=running, api_visibility="private")
    page.queue(max_size=32, default_concurrency_limit=1, api_open=False)
    return page


def says(role: str, content) -> dict:
    """Return a message of the page."""
    return {"role": role, "content": content}


def launch(page: gr.Blocks, **options):
    """Start the server of a page. Nothing of this machine but the page and uploads of this run is served."""
    return page.launch(
        max_file_size="20mb", show_error=False, allowed_paths=[], ssr_mode=False, footer_links=[], css=CSS, quiet=True,
        enable_monitoring=False, mcp_server=False, **options,
    )  # fmt: skip
