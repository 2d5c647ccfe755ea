"""lmms-eval takes BLIPren checkpoints: `lmms-eval --model blipren --model_args pretrained=FOLDER_OR_ID --tasks ...`.

The entry point `lmms_eval.models` names `manifest`. The model class is in `model.py`, which imports lmms-eval.
"""

from __future__ import annotations

MODEL_ID = "blipren"
CLASS_PATH = "blipren.training.evaluation.lmms.model.Blipren"


def manifest():
    """Return what lmms-eval's registry asks for (0.6 and newer)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
