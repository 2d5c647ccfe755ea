"""Show a model in the browser: pictures, a chat, and where it looked."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from blipren.training.arguments import check_checkpoint
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class DemoSettings(Settings):
    """`blipren demo`: a page in the browser."""

    models: list[str] = positional()
    """Checkpoint folder or Hub id; with two of them, such as before and after training, both answer side by side."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen at."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(set(self.models)) == len(self.models) <= 2:
            raise UsageError(f"models are {', '.join(self.models)}; give one checkpoint, or two different ones")


def run(settings: DemoSettings) -> None:
    """Serve the page until Ctrl-C."""
    for model in settings.models:
        check_checkpoint(model)
    if find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install blipren[demo]")

    from blipren.training.demo.page import build_page, launch
    from blipren.training.demo.visit import Limits
    from blipren.training.evaluation.generation import load_model
    from blipren.training.hub.space import TEMPLATES

    names = [Path(model).name for model in settings.models]
    if len(set(names)) < len(names):
        names = settings.models
    models = [(name, *load_model(model, settings.device)) for name, model in zip(names, settings.models)]
    page = build_page(models, Limits(), sorted((TEMPLATES / "examples").glob("*.png")))
    try:
        _, address, _ = launch(page, server_name=settings.host, server_port=settings.port, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"port {settings.port} is taken: give another --port") from error
    print(f"the demo of {' and '.join(names)} is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
