"""Show a model in the browser: pictures, a chat, and where it looked."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from blipren.training.arguments import check_checkpoint
from blipren.training.errors import UserError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class DemoSettings(Settings):
    """`blipren demo`: a page in the browser."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen at."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""


def run(settings: DemoSettings) -> None:
    """Serve the page until Ctrl-C."""
    check_checkpoint(settings.model)
    if find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install blipren[demo]")

    from blipren.training.demo.page import build_page, launch
    from blipren.training.demo.visit import Limits
    from blipren.training.evaluation.generation import load_model

    model, processor = load_model(settings.model, settings.device)
    page = build_page(model, processor, Path(settings.model).name, Limits())
    try:
        _, address, _ = launch(page, server_name=settings.host, server_port=settings.port, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"port {settings.port} is taken: give another --port") from error
    print(f"the demo of {settings.model} is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
