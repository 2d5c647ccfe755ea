"""Train the two small towers that `blipren quickstart` joins. Their weights are committed beside this file.

    python -m blipren.training.quickstart.train_towers --part all --out first --seed 0
    python -m blipren.training.quickstart.train_towers --part llm --start first/llm --out second --seed 1 \
        --llm-steps 2500 --shuffled 0.7
    python -m blipren.training.quickstart.train_towers --part llm --start second/llm --out training/quickstart/towers \
        --seed 2 --llm-steps 8000 --shuffled 0.7 --crowded
    cp -r first/vision training/quickstart/towers/
    python -m blipren.training.quickstart.train_towers --part llm --start first-boxes/llm --out find --seed 1 \
        --llm-steps 500 --batch 48 --shuffled 0.7 --boxes find    # first-boxes: see below
    python -m blipren.training.quickstart.train_towers --part llm --start find/llm --out boxes --seed 13 \
        --llm-steps 400 --shuffled 0.7 --boxes all
    python -m blipren.training.quickstart.train_towers --part llm --start boxes/llm --out numbers --seed 14 \
        --llm-steps 120 --shuffled 0.7 --boxes all
    python -m blipren.training.quickstart.train_towers --part llm --start numbers/llm --out longer --seed 15 \
        --llm-steps 3000 --batch 96 --shuffled 0.7 --crowded --boxes all --device cuda --workers 3
    cp -r longer/llm training/quickstart/towers/boxes-llm
    python -m blipren.training.quickstart.train_towers --part vision --places --start training/quickstart/towers/vision \
        --out places --seed 1 --vision-steps 6000 --device cuda --workers 1
    cp -r places/vision training/quickstart/towers/boxes-vision
    python -m blipren.training.quickstart.train_towers --part vision --glyphs --start training/quickstart/towers/vision \
        --out glyphs --seed 0 --vision-steps 3500
    cp -r glyphs/vision training/quickstart/towers/glyphs-vision
    python -m blipren.training.quickstart.train_towers --part llm --glyphs --start training/quickstart/towers/llm \
        --out glyphs --seed 3 --llm-steps 2000 --shuffled 0.7 --crowded  # stopped at step 1000
    python -m blipren.training.quickstart.train_towers --part llm --glyphs --start glyphs/llm --out digits --seed 4 \
        --llm-steps 1500
    cp -r digits/llm training/quickstart/towers/glyphs-llm
    python -m blipren.training.quickstart.train_towers --part llm --start training/quickstart/towers/llm --out turns \
        --seed 30 --llm-steps 4535 --batch 192 --shuffled 0.7 --crowded --conversations --device cuda --workers 2
    cp -r turns/llm training/quickstart/towers/conversations-llm

write `vision/` (a SigLIP image tower) and `llm/` (a Llama with its tokenizer), in float16, in about 70 minutes on one core,
and variants of both: image towers that also read digits, or tell the box of each object, and language models that say
digits, directions and order, or have read texts with boxes, or texts of several turns and about two scenes. `--device cuda`
takes four to six minutes on an H200 that others used. (Digits get new embeddings at the start of each run with `--glyphs`.
The first one was made without this, and its model never learned to say one: see `train_llm`. `first-boxes` is the boxes'
model of an earlier version, `towers/boxes-llm` of commit e646f6a: it said boxes, but did not read them. `find` and `boxes`
were made with commit 063036a, in whose loss a comma counted ten times as much as a third digit.) The language model is
trained in three runs: on notes in the order in which a caption names the objects, then on notes in any order, then mostly on
scenes of three objects, whose words the model of the second run still confused. Neither tower is trained on a held-out
combination of colour and shape (see `scenes.py`): the image tower is trained on scenes of the group "seen" only, the
language model on text about such scenes and never on an image.

- Image tower (`train_vision.py`): a linear head on every patch predicts colour, shape, size and place of the object there.
- Language model (`train_llm.py`): captions and answers behind the prompts that the processor writes. Most texts begin with
  notes that list a scene's objects, so that the model learns to use what stands before the prompt.
"""

import argparse
import json
from pathlib import Path

from blipren.training.quickstart.train_llm import Course, train_llm
from blipren.training.quickstart.train_vision import train_vision


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "vision", "llm"), default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder for vision/ and llm/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--llm-steps", type=int, default=4500)
    parser.add_argument("--start", type=Path, help="tower to continue from")
    parser.add_argument("--glyphs", action="store_true", help="train the tower on digits too, and on clips")
    parser.add_argument("--shuffled", type=float, default=0.1)
    parser.add_argument("--crowded", action="store_true")
    parser.add_argument(
        "--boxes", choices=("find", "all"), default="", help="notes hold boxes, and questions ask for them"
    )
    parser.add_argument("--places", action="store_true", help="train the image tower to tell the box of each object")
    parser.add_argument("--conversations", action="store_true", help="texts about two scenes, and of several turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw, or write texts")
    args = parser.parse_args()
    course = Course(args.shuffled, args.crowded, args.boxes, args.glyphs, args.conversations)
    print(json.dumps({k: str(v) for k, v in vars(args).items()}))
    if args.part in ("all", "vision"):
        train_vision(
            args.out / "vision",
            args.seed,
            args.vision_steps,
            args.batch,
            args.glyphs,
            args.places,
            args.start,
            args.device,
            args.workers,
        )
    if args.part in ("all", "llm"):
        train_llm(
            args.out / "llm", args.seed, args.llm_steps, args.batch // 2, course, args.start, args.device, args.workers
        )


if __name__ == "__main__":
    main()
