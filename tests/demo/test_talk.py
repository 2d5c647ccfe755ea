"""Conversations of the demo: answers grow and stop, clips have maps, pictures with boxes; wrong use of the command."""

import pickle
import threading

import pytest

from blipren.training.cli import main
from blipren.training.conversation.conversation import Conversation
from blipren.training.demo.pictures import thumbnail
from blipren.training.demo.talk import Talk
from blipren.training.demo.visit import Limits, is_clip, read_uploads
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import Sampling, generate_answers
from tests.demo.conftest import make_pair
from tests.memory.tools import CAPTIONS, random_memory
from tests.tiny_models import random_image

GREEDY = Sampling()


def test_answers_grow_and_a_closed_iterator_stops_the_model(pair):
    talk = Talk()
    parts = list(talk.stream(*pair, "What is it?", [random_image(0)], GREEDY, max_new_tokens=24))
    assert len(set(parts)) > 3 and all(after.startswith(before) for before, after in zip(parts, parts[1:]))
    assert [word for word, _ in talk.words] == parts[-1].split()
    beams = list(talk.stream(*pair, "And?", [], GREEDY, max_new_tokens=8, num_beams=2))
    assert len(beams) == 1 and talk.messages[-1]["content"] == beams[0]

    threads = threading.active_count()
    talk = Talk()
    stream = talk.stream(*pair, "What is it?", [random_image(0)], GREEDY, max_new_tokens=250)
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    assert len(talk.messages[-1]["content"].split()) < 200


def test_a_conversation_between_turns_holds_no_model(pair):
    talk, whole = Talk(), Conversation(*pair, keep_cache=False)
    list(talk.stream(*pair, "What is it?", [random_image(0)], GREEDY, max_new_tokens=8))
    whole.ask("What is it?", [random_image(0)], max_new_tokens=8)
    held = pickle.dumps(talk)
    assert len(held) < 100_000 < sum(p.nbytes for p in pair[0].parameters())
    talk = pickle.loads(held)  # as between the processes of a machine that lends its GPU for each answer
    assert list(talk.stream(*pair, "And?", [], GREEDY, max_new_tokens=8))[-1] == whole.ask("And?", max_new_tokens=8)
    assert talk.word_picture(*pair, 0).size == (384, 384)


def test_an_empty_question_is_answered_by_the_memory():
    model, processor = make_pair()
    model.memory = random_memory(model, processor, seed=0)
    model.memory = model.memory.with_settings(copy_penalty=0.0)
    talk = Talk()
    parts = list(talk.stream(model, processor, None, [random_image(0)], GREEDY, max_new_tokens=24))
    wanted = generate_answers(model, processor, [random_image(0)], None, max_new_tokens=24)[0]["text"]
    assert parts == [wanted] and wanted in CAPTIONS
    assert len(talk.known) == 3 and all(set(one["captions"]) <= set(CAPTIONS) for one in talk.known)
    streamed = list(talk.stream(model, processor, "And?", [], GREEDY, max_new_tokens=8))
    assert len(streamed) > 1


@pytest.mark.parametrize("options", [{}, {"frame_tokens": True}, {"connector": "patches"}], ids=str)
def test_clips_are_answered_and_each_frame_has_a_map(options):
    count = 2 if options.get("connector") == "patches" else 3  # more do not fit into 256 tokens
    pair = make_pair(frames=count, **options)
    clips = [[random_image(10 * clip + frame) for frame in range(count)] for clip in range(2)]
    talk = Talk()
    (*_, answer) = talk.stream(*pair, "What moves?", clips[:1], GREEDY, max_new_tokens=8)
    assert answer == generate_answers(*pair, clips[:1], "What moves?", max_new_tokens=8)[0]["text"]
    word = talk.word_picture(*pair, 0)
    assert word.size == (count * 384 + (count - 1) * 8, 384)
    frames = [word.crop((number * 392, 0, number * 392 + 384, 384)).tobytes() for number in range(count)]
    assert len(set(frames)) == count
    if count == 3:
        list(talk.stream(*pair, "And here?", clips[1:], GREEDY, max_new_tokens=8))
        assert talk.word_picture(*pair, 0).size == (4 * 384 + 3 * 8, 2 * 384 + 8)  # six frames, four in a row
    with pytest.raises(UserError, match="images or videos, not both"):
        list(talk.stream(*pair, "And?", [random_image(0)], GREEDY))


def test_clips_are_read_where_the_model_takes_them(tmp_path):
    frames = [random_image(number) for number in range(4)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "notes.mp4").write_text("red, green and blue")
    (clip,) = read_uploads([str(tmp_path / "moving.gif")], Limits(), 4)
    assert len(clip) == 4 and thumbnail(clip).size == (4 * 48 + 3 * 8, 40)
    (picture,) = read_uploads([str(tmp_path / "moving.gif")], Limits())
    assert picture.size == frames[0].size
    with pytest.raises(UserError, match=r"^notes.mp4 cannot be used \(unreadable\): damaged"):
        read_uploads([str(tmp_path / "notes.mp4")], Limits(), 4)
    assert is_clip("a.MOV") and is_clip("a.webm") and not is_clip("a.jpg") and not is_clip("noname")


@pytest.mark.parametrize(
    "command, said",
    [
        (["nothing"], "no checkpoint at nothing"),
        (["a", "b", "c"], "give one checkpoint, or two different ones"),
        (["a", "a"], "give one checkpoint, or two different ones"),
    ],
)
def test_wrong_use(command, said, capsys):
    assert main(["demo", *command]) in (1, 2)
    assert said in capsys.readouterr().err
