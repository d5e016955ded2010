"""The heat map: what is read of a file, what the page shows, and a browser that opens it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hf_distill.__main__ import main
from hf_distill.monitoring.heat_map import TokenRow, read_token_rows, render_heat_map

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
ROWS = [
    TokenRow(0, ["<b>", "&", "'\""], {"loss": [0.0, 1.0, 0.5], "weight": [1.0, 1.0, None]}),
    TokenRow(3, ["\n"], {"loss": [2.0]}),
]


class Page(HTMLParser):
    """Collects tags, and of each token its text, colour and title."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not {"src", "href", "onclick"} & set(given)
        self._inside = tag == "span"
        if self._inside:
            self.tokens.append(["", given["style"].removeprefix("background:"), given["title"]])

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tokens[-1][0] += data


def test_tokens_are_escaped_and_coloured_by_each_name():
    page = Page()
    page.feed(render_heat_map(ROWS))
    by_loss, by_weight = page.tokens[:4], page.tokens[4:]
    assert [text for text, _, _ in by_loss] == ["<b>", "&", "'\"", "↵\n"]
    colours = ["rgb(255,255,255)", "rgb(255,168,168)", "rgb(255,211,211)", "rgb(255,80,80)"]
    assert [colour for _, colour, _ in by_loss] == colours
    # all known weights are equal: white; no value is a pale blue
    assert [colour for _, colour, _ in by_weight] == ["rgb(255,255,255)"] * 2 + ["#dde"] * 2
    assert by_loss[1][2] == "loss 1\nweight 1"
    assert not {"script", "link", "img", "b"} - {"b"} & set(page.tags)
    assert page.tags.count("b") == 4  # those of the steps: a token has made none


def test_rows_without_values_are_passed_over():
    lines = ['{"step": 0, "completion": "a"}', '{"step": 1, "tokens": ["a"], "values": {"x": [1]}}']
    assert read_token_rows(lines) == [TokenRow(1, ["a"], {"x": [1]})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 0', "line 1 is not JSON"),
        ('{"step": 0, "tokens": ["a", "b"], "values": {"x": [1]}}', "'x' for each of 2 tokens"),
    ],
)
def test_what_cannot_be_read_is_named(line: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_token_rows([line])


def test_no_row_is_an_error_that_says_how_to_get_them(tmp_path: Path):
    (tmp_path / "completions.jsonl").write_text('{"step": 0, "completion": "a"}\n')
    with pytest.raises(ValueError, match=r"log_completions=1, log_token_values=4"):
        main(["heatmap", str(tmp_path), "--out", str(tmp_path / "page.html")])
    with pytest.raises(ValueError, match="at least 1 rollout, got 0"):
        main(["heatmap", str(tmp_path), "--rows", "0"])


def write_page(folder: Path) -> Path:
    rows = [{"step": x.step, "tokens": x.tokens, "values": x.values} for x in ROWS]
    (folder / "completions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert main(["heatmap", str(folder), "--out", str(folder / "page.html"), "--rows", "2"]) == 0
    return folder / "page.html"


def test_the_command_writes_the_last_rows(tmp_path: Path, capsys: pytest.CaptureFixture):
    text = write_page(tmp_path).read_text()
    assert text == render_heat_map(ROWS)
    assert capsys.readouterr().out.endswith("page.html: 2 rollouts\n")
    assert main(["heatmap", str(tmp_path), "--out", str(tmp_path / "one.html"), "--rows", "1"]) == 0
    assert (tmp_path / "one.html").read_text() == render_heat_map(ROWS[1:])


def test_a_browser_shows_the_first_colouring_only(tmp_path: Path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    page, picture = write_page(tmp_path), tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(re.findall("<span ", shown.stdout)) == 8
    subprocess.run(
        [browser, *flags, f"--screenshot={picture}", page.as_uri()], timeout=60, check=True
    )
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(10**6)}
    assert (255, 80, 80) in colours  # of the greatest loss
    assert (221, 221, 238) not in colours  # of no weight, in the colouring that is not shown
