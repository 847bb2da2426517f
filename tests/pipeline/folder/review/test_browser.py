"""The page in a browser: answers by key and by mouse, what is kept, what is saved."""

import re

import numpy as np
import pytest

from tests.helpers.browser import open_browser
from tests.pipeline.folder.review.conftest import CLASSES, FILES
from trm_pipeline.folder.review.answers import read_answers
from trm_pipeline.folder.review.page import Question, write_review

NO_STORAGE = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }});"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """Opens pages in one profile, and looks for errors and requests at the end."""
    context, wrong = browser.new_context(), []

    def seen(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    context.on("request", seen)

    def open_tab(path, **size):
        page = context.new_page()
        if size:
            page.set_viewport_size(size)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(path.as_uri())
        return page

    open_tab.context = context
    yield open_tab
    context.close()
    assert not wrong


@pytest.fixture
def path(folder, questions, tmp_path):
    write_review(tmp_path / "review.html", questions, CLASSES, images=folder, title="Doubtful labels")
    return tmp_path / "review.html"


def question(page):
    return page.locator("#question").inner_text(), page.locator("#about").inner_text()


def answered(page):
    return page.locator("#progress").inner_text()


def saved(page, tmp_path):
    """The answers that the page downloads, read."""
    with page.expect_download() as download:
        page.keyboard.press("s")
    assert download.value.suggested_filename == "answers.csv"
    download.value.save_as(tmp_path / "answers.csv")
    return read_answers([tmp_path / "answers.csv"], CLASSES, FILES)


def test_answers_by_key_and_by_mouse_are_kept_and_saved(tab, path, tmp_path):
    page = tab(path)
    assert question(page) == ("Is “dog” in this picture?", "labelled absent · question 1 of 6 · model 73 %")
    assert page.get_by_role("img", name="Picture a.jpg").evaluate("image => image.decode().then(() => image.naturalWidth)") == 224
    assert page.locator("#picture canvas").count() == 1
    page.keyboard.press("h")
    assert page.locator("#picture canvas").count() == 0
    page.keyboard.press("p")
    assert question(page)[0] == f"Is “{CLASSES[1]}” in this picture?"
    page.get_by_role("button", name="Absent").click()
    assert page.locator("#file").inner_text() == FILES[1] and "labelled present" in question(page)[1]
    page.keyboard.press("u")
    page.keyboard.press("2")
    assert answered(page) == "4 of 6 answered: 1 present, 2 absent, 1 unsure"
    page.keyboard.press("z")
    page.get_by_role("button", name="Undo").click()
    assert answered(page) == "2 of 6 answered: 1 present, 1 absent" and "question 3 of 6" in question(page)[1]

    page.reload()
    assert answered(page) == "2 of 6 answered: 1 present, 1 absent" and "question 3 of 6" in question(page)[1]
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("button", name="Absent").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Previous").click()
    page.keyboard.press("a")  # another answer than before, and on to the next question
    assert "question 2 of 6" in question(page)[1]
    page.keyboard.press("o")
    for key in ("u", "p", "p"):
        page.keyboard.press(key)
    assert page.get_by_text("This picture cannot be read").count() == 1 and page.get_by_role("button", name="Where").is_disabled()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("heading", name="That was the last question").is_visible()
    page.get_by_role("button", name="Go to the first open question").click()
    page.keyboard.press("a")
    assert page.get_by_role("heading", name="All 6 questions are answered").is_visible()
    page.keyboard.press("p")  # there is nothing to answer
    assert saved(page, tmp_path) == {
        ("a.jpg", CLASSES[0]): 0,
        ("a.jpg", CLASSES[1]): 0,
        (FILES[1], CLASSES[0]): -1,
        (FILES[2], CLASSES[2]): 1,
        (FILES[3], CLASSES[1]): 1,
        ("broken.jpg", CLASSES[0]): 0,
    }
    assert page.get_by_text("6 answers saved as answers.csv").is_visible()
    page.get_by_text("The answers as text").click()
    page.wait_for_function("document.getElementById('csv').value !== ''")
    assert page.get_by_label("answers.csv").input_value() == (tmp_path / "answers.csv").read_text(encoding="utf-8")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Undo the last answer").click()
    assert answered(page).startswith("5 of 6")


def test_a_class_alone_and_a_name(tab, path, tmp_path):
    page = tab(path)
    assert page.locator("#filter option").all_inner_texts() == [
        "all classes (6)",
        *(f"{name} ({count})" for name, count in zip(CLASSES, (3, 2, 1), strict=False)),
    ]
    page.get_by_label("Class").select_option(label="dog (3)")
    page.get_by_label("Your name").fill('pat "a"')  # letters there are no answers
    page.keyboard.press("Enter")
    for _ in range(3):
        assert question(page)[0] == "Is “dog” in this picture?"
        page.keyboard.press("p")
    assert page.get_by_role("heading", name="All 3 questions about “dog” are answered").is_visible()
    assert "3 about other classes are open" in page.locator("#left").inner_text()
    assert set(saved(page, tmp_path).values()) == {1.0}
    assert (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()[1] == 'a.jpg,dog,present,"pat ""a"""'
    page.get_by_role("button", name="Show all classes").click()
    assert "question 2 of 6" in question(page)[1]
    page.get_by_label("Question", exact=True).fill("3")
    assert "question 4 of 6" in question(page)[1]
    page.get_by_text("Keys", exact=True).click()
    page.get_by_label("Keys answer questions").uncheck()
    page.keyboard.press("p")
    assert answered(page).startswith("3 of 6")


def test_two_tabs_write_beside_each_other(tab, path, tmp_path):
    one, two = tab(path), tab(path)
    one.keyboard.press("p")
    two.get_by_text("question 2 of 6").wait_for()  # the first is not asked again
    two.keyboard.press("a")
    assert saved(one, tmp_path) == {("a.jpg", CLASSES[0]): 1, ("a.jpg", CLASSES[1]): 0}
    assert answered(one).startswith("2 of 6")
    for key in ("ArrowLeft", "ArrowLeft", "u"):  # another answer to the first
        two.keyboard.press(key)
    one.get_by_text("2 of 6 answered: 1 absent, 1 unsure").wait_for()
    one.keyboard.press("z")
    assert answered(one).startswith("2 of 6")


def test_other_questions_have_answers_of_their_own(tab, path, folder, questions):
    tab(path).keyboard.press("p")
    write_review(path, questions[::-1], CLASSES, images=folder)
    assert answered(tab(path)) == "0 of 6 answered"


def test_a_browser_that_keeps_nothing_warns(tab, path, tmp_path):
    tab.context.add_init_script(NO_STORAGE)
    page = tab(path)
    assert page.get_by_role("alert").inner_text().startswith("This browser keeps no answers")
    page.keyboard.press("p")
    with page.expect_event("dialog") as dialog:
        page.close(run_before_unload=True)
    assert dialog.value.type == "beforeunload"
    dialog.value.dismiss()
    assert saved(page, tmp_path) == {("a.jpg", CLASSES[0]): 1}
    with page.expect_event("close"):  # and no question now
        page.close(run_before_unload=True)


def test_the_outline_holds_half_of_the_map(tab, folder, tmp_path):
    heat = np.tile([1.0, 2.0, 3.0, 4.0], (3, 1))  # the right third holds half of it
    write_review(tmp_path / "review.html", [Question("a.jpg", "dog", 0.5, heat)], CLASSES, images=folder)
    page = tab(tmp_path / "review.html")
    shades = page.locator("#picture canvas").evaluate(
        """canvas => {
          const {width, height} = canvas, row = canvas.getContext("2d").getImageData(0, height / 2, width, 1).data;
          return [.1, .5, .62, .72, .9].map(share => row[4 * Math.round(share * width) + 3]);
        }"""
    )
    assert shades == [70, 70, 70, 0, 0]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_buttons_are_large(width, tab, path):
    page = tab(path, width=width, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Present", "Absent", "Unsure", "Undo", "Previous", "Next", "Save answers"):
        box = page.get_by_role("button", name=name, exact=False).bounding_box()
        assert box["height"] >= 44 and box["width"] >= 44
        assert box["y"] + box["height"] <= 740, "without scrolling"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme, tab, path):
    page = tab(path)
    page.emulate_media(color_scheme=scheme)
    pairs = page.evaluate(
        """() => ["question", "about", "present", "absent", "unsure", "next", "file"].map(id => {
          const style = getComputedStyle(document.getElementById(id)), body = getComputedStyle(document.body);
          return [style.color, style.backgroundColor === "rgba(0, 0, 0, 0)" ? body.backgroundColor : style.backgroundColor];
        })"""
    )
    for pair in pairs:
        high, low = sorted((luminance(color) for color in pair), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert (luminance(pairs[0][0]) > 0.5) == (scheme == "dark")


def luminance(color):
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
