"""Write easy-VQA (github.com/vzhou842/easy-VQA) as an image folder with questions: `python scripts/easy_vqa.py TAR OUT`.

TAR holds `train|test/images/ID.png` and `train|test/questions.json`, a list of `[question, answer, image number]`. One of
twenty training images is for validation.
"""

import argparse
import json
import tarfile
from pathlib import Path

VALIDATION = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tar", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows: dict[tuple[str, int], dict] = {}
    with tarfile.open(arguments.tar) as archive:
        for member in archive:
            path = Path(member.name)
            if path.name == "questions.json":
                part = path.parent.name
                for question, answer, image in json.load(archive.extractfile(member)):
                    split = "validation" if part == "train" and image % VALIDATION == 0 else part
                    new = {"file_name": f"{part}/{image}.png", "split": split, "questions": [], "answers": []}
                    row = rows.setdefault((part, image), new)
                    row["questions"].append(question)
                    row["answers"].append(answer)
            elif path.suffix == ".png":
                target = arguments.out / path.parent.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    lines = "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows))
    (arguments.out / "metadata.jsonl").write_text(lines, encoding="utf-8")
    print(
        f"{len(rows):,} images, {sum(len(row['questions']) for row in rows.values()):,} questions in {arguments.out}"
    )


if __name__ == "__main__":
    main()
