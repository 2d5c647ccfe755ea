"""Captions on the screen, as a table, or with attention maps, for the command `caption` without OUT."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

from blipren.training.captioning.job import CaptionJob
from blipren.training.errors import UserError
from blipren.training.evaluation.results import csv_text
from blipren.training.files import write_atomically


def print_captions(job: CaptionJob) -> None:
    """Caption and print row by row. Rows without a caption are reported with their reasons.

    Raises:
        UserError: no row has a caption.
    """
    s, rows, skipped = job.settings, [], Counter()
    source = job.source.rows()
    size = job.engine.rows_per_batch
    for batch, prepared in job.prepared(iter(lambda: list(itertools.islice(source, size)), [])):
        for one in job.caption(batch, prepared):
            if one.rejected is not None:
                reason, value = one.rejected["reason"], one.rejected["value"]
                skipped[reason] += 1
                print(f"skipped {one.row.id} ({reason}): {value}", file=sys.stderr)
                continue
            for column, answers in zip(job.columns, one.answers):
                for answer in answers:
                    rows.append({"file": one.row.id, "caption": answer.text})
                    if s.json:
                        figures = {"num_tokens": answer.num_tokens, "ended_by_eos": answer.ended}
                        figures |= {"mean_logprob": answer.mean_logprob}
                        if answer.matching_score is not None:
                            figures["matching_score"] = answer.matching_score
                        line = {"image": one.row.id, "prompt": column.prompt, "text": answer.text} | figures
                        print(json.dumps(line, ensure_ascii=False))
                    else:
                        print(answer.text if job.source.num_rows == 1 else f"{one.row.id}: {answer.text}")
    if not rows:
        raise UserError(f"there is no image in {', '.join(s.images)}")
    if skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
        captioned = len({row["file"] for row in rows})
        print(
            f"{captioned:,} images have a caption, {skipped.total():,} files were skipped: {reasons}", file=sys.stderr
        )
    if s.csv is not None:
        write_atomically(Path(s.csv), csv_text(rows))
        print(f"captions of {len(rows):,} images are in {s.csv}", file=sys.stderr)
    if s.attention is not None:
        from blipren.training.evaluation.attention import explain
        from blipren.training.evaluation.report.pictures import attention_picture

        image = next(iter(job.source.rows())).load()
        explained = explain(job.model, job.processor, image, s.prompt, rows[0]["caption"])
        attention_picture(Path(s.attention), explained)
        print(f"the attention maps of {len(explained.words)} words are in {s.attention}", file=sys.stderr)
    if s.out_image is not None:
        from blipren.training.evaluation.report.places import draw_places

        image = next(iter(job.source.rows())).load()
        draw_places(image, rows[0]["caption"], s.prompt).save(s.out_image)
        print(f"the picture with boxes and points is in {s.out_image}", file=sys.stderr)
