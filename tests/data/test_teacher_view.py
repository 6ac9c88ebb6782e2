"""What a teacher sees of a sample: its questions, its system message and its images are changed, its answers never."""

import pytest
from PIL import Image, ImageDraw

from data.conversation import Conversation, answer_pieces
from data.teacher_view import View


def message(role, *parts, **more):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content, **more}


def texts(conversation):
    return [[part.get("text") for part in message["content"]] for message in conversation.messages]


TALK = Conversation(
    (
        message("user", None, "What is it?"),
        message("assistant", "<think>Whiskers.</think>A cat."),
        message("user", "Is ", None, " one too?"),
        message("assistant", "No."),
    ),
    images=("a", "b"),
)


def striped():
    image = Image.new("RGB", (16, 12), "white")
    ImageDraw.Draw(image).line((0, 0, 16, 12), fill="black")
    return image


def test_each_question_quotes_its_own_answer_and_its_images_keep_their_places():
    seen, images = View(question="Q: {question} (it is {answer})").of(TALK, [striped()] * 2)
    assert texts(seen)[0] == [None, "Q: What is it? (it is A cat.)"]
    assert texts(seen)[2] == ["Q: Is ", None, " one too? (it is No.)"]
    assert answer_pieces(seen.messages) == answer_pieces(TALK.messages)
    assert [image.tobytes() for image in images] == [striped().tobytes()] * 2


def test_an_answer_with_braces_is_quoted_as_it_is():
    talk = Conversation((message("user", "{answer}?"), message("assistant", "{question} {0}")))
    assert texts(View(question="{question} {answer}").of(talk, [])[0])[0] == ["{answer}? {question} {0}"]


def test_a_question_whose_answer_is_context_alone_stays_as_it_is():
    context = message("assistant", "A dog.", supervised=False)
    talk = Conversation((message("user", "a"), context, message("user", "b"), message("assistant", "c")))
    assert texts(View(question="{question} {answer}").of(talk, [])[0]) == [["a"], ["A dog."], ["b c"], ["c"]]


def test_a_question_of_an_image_alone_gets_a_text():
    talk = Conversation((message("user", None), message("assistant", "A cat.")), images=("a",))
    assert texts(View(question="{question}It is {answer}").of(talk, [striped()])[0])[0] == [None, "It is A cat."]


@pytest.mark.parametrize("own", [[], [message("system", "Be brief.")]])
def test_the_system_message_takes_the_place_of_the_samples(own):
    seen, _ = View(system="Be exact.").of(Conversation((*own, *TALK.messages)), [])
    assert [m["role"] for m in seen.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert texts(seen)[0] == ["Be exact."]


def test_images_are_dropped_or_degraded_in_their_own_size():
    seen, images = View(images="drop").of(TALK, [striped()] * 2)
    assert (seen.images, images, texts(seen)[0]) == ((), [], ["What is it?"])
    for view in (View(blur=2), View(downsample=4)):
        (worse,) = view.of(TALK, [striped()])[1]
        assert worse.size == (16, 12)
        assert max(worse.convert("L").get_flattened_data()) - min(worse.convert("L").get_flattened_data()) < 200


def test_a_prompt_quotes_the_answer_that_it_leaves_out():
    prompt, images = View(question="{question} {answer}").before_last_answer(TALK, [striped()] * 2)
    assert texts(prompt)[-1] == ["Is ", None, " one too? No."]
    assert (len(prompt.messages), len(images)) == (3, 2)
    prompt, images = View(question="{question} {answer}", images="drop").before_last_answer(TALK, [striped()] * 2)
    assert (texts(prompt)[-1], images, prompt.images) == (["Is ", " one too? No."], [], ())
