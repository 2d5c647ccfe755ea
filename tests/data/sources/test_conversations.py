"""Conversations in every form that is read, and the reasons for which one is refused."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from blipren.training.data.sources.conversations import ConversationColumns, ConversationError, read_conversation
from blipren.training.data.sources.open_rows import open_rows
from tests.data.tools import encoded, picture, write_folder

A, B = b"first image", b"second image"


def image_parts(count):
    return [{"type": "image"}] * count


def text(words):
    return {"type": "text", "text": words}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


MESSAGES = ConversationColumns(messages="messages")
FORMS = {
    "plain text and an image: in front of the first user turn": (
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": " A cat. "}]},
        MESSAGES, A,
        [turn("user", *image_parts(1), text("What?")), turn("assistant", text("A cat."))], [A],
    ),
    "typed parts, a system message, two images": (
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "or"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        ], "images": [A, B]},
        ConversationColumns(messages="messages", images="images"), None,
        [turn("system", text("Be brief.")), turn("user", {"type": "image"}, text("or"), {"type": "image"}),
         turn("assistant", text("The first."))], [A, B],
    ),
    "images in the typed parts themselves": (
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "path": "b.png"}]},
            {"role": "assistant", "content": "two"},
        ]},
        MESSAGES, None,
        [turn("user", {"type": "image"}, text("?")), turn("assistant", text("one")),
         turn("user", text("and"), {"type": "image"}), turn("assistant", text("two"))], [A, "b.png"],
    ),
    "LLaVA: a placeholder at the end is moved to the front": (
        {"conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A dog."}]},
        ConversationColumns(messages="conversations"), A,
        [turn("user", {"type": "image"}, text("What is it?")), turn("assistant", text("A dog."))], [A],
    ),
    "LLaVA: images between words, as JSON text": (
        {"conversations": json.dumps([
            {"from": "human", "value": "Compare <image> with <image>."}, {"from": "gpt", "value": "The <image> tag."},
        ])},
        ConversationColumns(messages="conversations"), [A, B],
        [turn("user", text("Compare "), {"type": "image"}, text(" with "), {"type": "image"}, text(".")),
         turn("assistant", text("The <image> tag."))], [A, B],
    ),
    "the_cauldron and FineVision": (
        {"texts": [{"user": "Colour?", "assistant": "Red.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}],
         "images": [A]},
        ConversationColumns(messages="texts", images="images"), None,
        [turn("user", {"type": "image"}, text("Colour?")), turn("assistant", text("Red.")),
         turn("user", text("Sure?")), turn("assistant", text("Yes."))], [A],
    ),
    "prompt and completion as text": (
        {"prompt": "What?", "completion": "A cat."},
        ConversationColumns(prompt="prompt", completion="completion"), A,
        [turn("user", {"type": "image"}, text("What?")), turn("assistant", text("A cat."))], [A],
    ),
    "prompt and completion as messages, without an image": (
        {"prompt": [{"role": "user", "content": "2 < 3 <image> ?"}], "completion": [{"role": "assistant", "content": "yes"}]},
        ConversationColumns(prompt="prompt", completion="completion"), None,
        [turn("user", text("2 < 3 <image> ?")), turn("assistant", text("yes"))], [],
    ),
    "a trace of its own": (
        {"messages": [{"role": "user", "content": "2+2"},
                      {"role": "assistant", "content": "4", "reasoning_content": "It is four."}]},
        MESSAGES, None,
        [turn("user", text("2+2")), turn("assistant", text("<think>\nIt is four.\n</think>\n\n4"))], [],
    ),
    "a question with choices": (
        {"question": "Which?", "choices": ["red", "blue"], "answer": 1},
        ConversationColumns(question="question", choices="choices", answer="answer"), A,
        [turn("user", {"type": "image"}, text(
            "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
        )), turn("assistant", text("B"))], [A],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_messages(form):
    record, columns, image, messages, images = FORMS[form]
    found = read_conversation(record, columns, image)
    assert found.messages == messages and found.images == images


PAIR = ConversationColumns(prompt="prompt", chosen="chosen", rejected="rejected")


def test_preferences_with_and_without_a_prompt_of_their_own():
    user = {"role": "user", "content": "What?"}
    good, bad = ({"role": "assistant", "content": words} for words in ("a cat", "a dog"))
    records = [
        {"prompt": "What?", "chosen": "a cat", "rejected": "a dog"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": None, "chosen": [user, good], "rejected": [user, bad]},
    ]
    for record in records:
        found = read_conversation(record, PAIR, A)
        assert found.messages == [turn("user", {"type": "image"}, text("What?")), turn("assistant", text("a cat"))]
        assert found.rejected == "a dog" and found.images == [A]


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


REFUSED = [
    ("empty_turn", chat(("user", "a"), ("assistant", " ")), None),
    ("empty_turn", chat(("user", None), ("assistant", "b")), None),
    ("roles", chat(("user", "a"), ("user", "b"), ("assistant", "c")), None),
    ("roles", chat(("user", "a"), ("assistant", "c"), ("user", "b")), None),
    ("roles", chat(("assistant", "c")), None),
    ("roles", chat(("user", "a"), ("tool", "c")), None),
    ("image_missing", chat(("user", "<image>\na"), ("assistant", "b")), None),
    ("image_missing", chat(("user", "<image>\n<image>\na"), ("assistant", "b")), [A]),
    ("image_not_mentioned", chat(("user", "<image>\na"), ("assistant", "b")), [A, B]),
    ("image_not_mentioned", chat(("user", [text("a"), {"type": "image"}]), ("assistant", "b")), [A, B]),
    ("image_in_answer", chat(("user", "a"), ("assistant", [text("b"), {"type": "image"}])), [A]),
    ("part", chat(("user", [{"type": "audio"}]), ("assistant", "b")), None),
    ("turns", {"messages": [{"speaker": "a"}]}, None),
    ("turns", {"messages": [1, 2]}, None),
]


@pytest.mark.parametrize("reason, record, image", REFUSED)
def test_what_is_wrong_is_refused_with_its_reason(reason, record, image):
    with pytest.raises(ConversationError) as error:
        read_conversation(record, MESSAGES, image)
    assert error.value.reason == reason and error.value.detail


@pytest.mark.parametrize("record", [
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "a", "chosen": "b", "rejected": None},
    {"prompt": None, "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "c"}]},
])  # fmt: skip
def test_a_pair_that_is_none(record):
    with pytest.raises(ConversationError) as error:
        read_conversation(record, PAIR, None)
    assert error.value.reason == "pair"


def test_choices_by_number_letter_and_text():
    columns = ConversationColumns(question="question", choices="choices", answer="answer")
    for answer, letter in ((0, "A"), ("B", "B"), ("blue", "B"), ("red ", "A")):
        record = {"question": "?", "choices": ["red", "blue"], "answer": answer}
        assert read_conversation(record, columns, A).messages[-1] == turn("assistant", text(letter))
    for answer, choices in ((2, ["red", "blue"]), ("green", ["red", "blue"]), (0, ["red"]), (0, ["red", "red"])):
        with pytest.raises(ConversationError, match="choices"):
            read_conversation({"question": "?", "choices": choices, "answer": answer}, columns, A)


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


def test_llava_json_beside_a_folder_of_images(tmp_path):
    write_folder(tmp_path, [], {f"train2017/{i}.jpg": encoded(picture(i)) for i in range(2)})
    rows = [
        {"id": "a", "image": "0.jpg", "conversations": TURNS},
        {"id": "b", "image": "0.jpg", "conversations": TURNS * 2},
        {"id": "c", "image": ["0.jpg", "1.jpg"], "conversations": [{"from": "human", "value": "<image><image>Both?"}, TURNS[1]]},
        {"id": "d", "conversations": [{"from": "human", "value": "Hello"}, TURNS[1]]},
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    source = open_rows(str(tmp_path / "llava.json"))
    found = list(source)
    assert [row.id for row in found] == ["a", "b", "c", "d"] and source.has_conversations
    assert [row.conversation_error and row.conversation_error[0] for row in found] == [
        None,
        "image_missing",
        None,
        None,
    ]
    assert found[2].conversation.images == ["0.jpg", "1.jpg"] and found[3].conversation.images == []
    assert found[0].load().size == (48, 40) and not found[0].answers


def test_parquet_with_lists_of_images_and_without_any(tmp_path):
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()),
         "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")})}
    )  # fmt: skip
    data = datasets.Dataset.from_dict(
        {"images": [[picture(0), picture(1)], []], "texts": [[{"user": "a", "assistant": "b"}]] * 2}, features=features
    )
    data.to_parquet(tmp_path / "cauldron.parquet")
    for streaming in (True, False):
        rows = list(open_rows(str(tmp_path / "cauldron.parquet"), streaming=streaming))
        assert [len(row.conversation.images) for row in rows] == [2, 0]
        assert isinstance(rows[0].conversation.images[0]["bytes"], bytes)  # not decoded yet
    pyarrow.parquet.write_table(
        pa.table({"messages": [chat(("user", "a"), ("assistant", "b"))["messages"]], "text": ["a b"]}),
        tmp_path / "text.parquet",
    )
    (row,) = open_rows(str(tmp_path / "text.parquet"))
    assert row.conversation.images == [] and row.answers == [] and row.image is None
