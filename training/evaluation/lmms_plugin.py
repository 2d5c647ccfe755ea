"""lmms-eval takes BLIPren checkpoints: `lmms-eval --model blipren --model_args pretrained=FOLDER_OR_ID --tasks ...`.

The entry point `lmms_eval.models` names `manifest`; the model class lies in `lmms_model.py`, which needs lmms-eval.
"""

from __future__ import annotations

MODEL_ID = "blipren"
CLASS_PATH = "blipren.training.evaluation.lmms_model.Blipren"


def manifest():
    """What lmms-eval's registry asks for (0.6 and newer)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
