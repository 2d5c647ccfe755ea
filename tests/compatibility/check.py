"""Runs inside the environment of another transformers version, without our package (see prove.py)."""

import importlib.util
import json
import sys
from pathlib import Path

import huggingface_hub
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)


def main() -> None:
    if importlib.util.find_spec("blipren") is not None:
        raise AssertionError("our package is installed here: this would not test the checkpoint's own code")
    folder = Path(sys.argv[1])
    where, photo = str(folder / "checkpoint"), Image.open(folder / "photo.png")
    trusted = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(where, **trusted).model_type == "blipren"
    processor = AutoProcessor.from_pretrained(where, **trusted)
    inputs = processor(images=photo, text="What is it?", return_tensors="pt")
    result = {"huggingface_hub": huggingface_hub.__version__, "prompt": inputs["input_ids"][0].tolist(), "tokens": []}
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(where, **trusted)
        result["tokens"].append(model.generate(**inputs, max_new_tokens=6)[0].tolist())
    two = [[photo, photo.rotate(90)], [photo.rotate(180)]]  # prompts of two images and of one
    both = processor(images=two, text=["Which is it?", "What is it?"], padding=True, return_tensors="pt")
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    result["beams"] = model.generate(**both, **beams)[:, both["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        result["logits"] = model(**inputs).logits[0, -1].tolist()

    captioner = pipeline("image-to-text", model=where, **trusted)
    result["captions"] = [captioner(photo, max_new_tokens=6), captioner([photo] * 2, batch_size=2, max_new_tokens=6)]
    chat = pipeline("image-text-to-text", model=where, **trusted)
    message = [
        {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What is it?"}]}
    ]
    result["chat"] = chat(text=message, max_new_tokens=6, return_full_text=False)[0]["generated_text"]

    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for module in model.modules():  # dropout draws differently from version to version
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = inputs["input_ids"].clone()
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        result["loss"] = model(**inputs, labels=labels).loss.item()
    again = folder / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    loaded = AutoModel.from_pretrained(again, **trusted)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
