"""The judge of drawn scenes, which `blipren evaluate` finds by the entry point `blipren.judges` and the column `scene`."""

from blipren.training.evaluation.judges import CaptionVerdict
from blipren.training.quickstart.scenes import Scene
from blipren.training.quickstart.truth import judge_caption


class SceneJudge:
    """Judges captions of drawn scenes by the scene, as the column `scene` of `metadata.jsonl` holds it."""

    basis = "the scenes themselves"

    def judge_caption(self, caption: str, content: str) -> CaptionVerdict:
        """Check a caption against a scene as JSON."""
        return judge_caption(caption, Scene.from_json(content))

    def list_objects(self, content: str) -> list[str]:
        """Return the colour and shape of each object of a scene as JSON: "red circle", ..."""
        return sorted({f"{o.colour} {o.shape}" for o in Scene.from_json(content).objects})
