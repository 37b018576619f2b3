"""The gradio page of a playground. It loads nothing from elsewhere and reports to nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenflex.serving.playground.replies import Playground, format_message, format_table

MOST_BYTES = 64 * 2**20
"""Largest file that can be uploaded."""
HOUR = 3600
FONTS = ["system-ui", "sans-serif"]
CODE_FONTS = ["ui-monospace", "monospace"]
STYLE = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.message { padding: 12px 16px; border-radius: 8px; border: 1px solid #d62728;
  background: #fdecec; color: #8c1a1a; font-weight: 600; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#windows .grid-wrap { height: auto; min-height: 0; max-height: none; padding: 0; }
#windows .grid-container { height: auto; }
#windows .gallery-item { border: 1px solid var(--border-color-primary); }
table.answers { width: 100%; border: none !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
table.answers tr { border: none !important; background: none !important; }
table.answers th, table.answers td { border: none !important; }
table.answers th { text-align: left; font-weight: 600; font-size: 13px; opacity: .7;
  padding: 6px 12px; box-shadow: inset 0 -2px var(--border-color-primary); }
table.answers td { padding: 9px 12px; box-shadow: inset 0 -1px var(--border-color-primary); }
table.answers td:nth-child(2) { font-size: 20px; font-weight: 700; overflow-wrap: anywhere; }
table.answers td:nth-child(7) { color: #b45309; font-size: 13px; }
.bar { display: inline-block; vertical-align: middle; margin-right: 8px; width: 64px; height: 8px;
  border-radius: 4px; background: linear-gradient(#1f77b4 0 0) 0 / var(--share) 100% no-repeat
  var(--border-color-primary); }
footer { display: none !important; }
"""
LEGEND = (
    "**Certainty** is the probability that the model gives the least certain token of its answer. "
    "**Times** are those of a call at this count alone: the picture is encoded once, and its time "
    "is part of each row."
)
WINDOWS = (
    "### What each token sees\n"
    "A coloured frame is what one vision token averages: its window of patches (thin grey lines). "
    "Windows overlap where the count does not divide the patches."
)
ACCURACY = "### Accuracy\nMeasured on other pictures, from the checkpoint's report."


def build_page(playground: Playground, name: str, accuracy: Path | None) -> Any:
    """Build the page.

    Args:
        playground: The model.
        name: Its name, for the title.
        accuracy: The accuracy curve of its report, a PNG file, or None.

    Returns:
        The ``gradio.Blocks``.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def show(
        path: str | None, question: str, ticked: list[str], side: int
    ) -> Iterator[tuple[Any, ...]]:
        for reply in playground.ask(path, question or "", ticked, int(side or 0)):
            has_answers = bool(reply.answers)
            yield (
                gradio.update(value=format_message(reply.message), visible=bool(reply.message)),
                gradio.update(value=format_table(reply.answers), visible=has_answers),
                gradio.update(value=reply.pictures, visible=has_answers),
            )

    with gradio.Blocks(
        title=f"TokenFLEX: {name}", analytics_enabled=False, delete_cache=(HOUR, HOUR)
    ) as page:
        gradio.Markdown(
            f"# TokenFLEX playground\n`{name}`, one picture or clip, any number of tokens"
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                picture = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    label="Picture, or a clip as GIF or WebP",
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="picture",
                )
                # Pillow would open any format here; the playground opens pictures itself.
                picture.preprocess = lambda payload: payload and payload.path
                question = gradio.Textbox(label="Question", lines=1, elem_id="question")
                ticked = gradio.CheckboxGroup(
                    playground.choices,
                    value=playground.ticked,
                    label="Vision tokens per picture, tile or frame",
                    elem_id="counts",
                )
                side = gradio.Slider(
                    *(0, playground.largest_side),
                    value=0,
                    step=1,
                    label="One more grid of n x n tokens",
                    info="0 for none",
                    elem_id="side",
                )
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column(scale=5, min_width=480):
                message = gradio.HTML(visible=False, elem_id="message")
                table = gradio.HTML(
                    "Give a picture and a question.", elem_id="answers", label="Answers"
                )
                gradio.Markdown(LEGEND)
                gradio.Markdown(WINDOWS)
                gallery = gradio.Gallery(
                    show_label=False,
                    columns=3,
                    height="auto",
                    buttons=["fullscreen"],
                    object_fit="contain",
                    format="png",
                    visible=False,
                    elem_id="windows",
                )
                if accuracy is not None:
                    gradio.Markdown(ACCURACY)
                    gradio.Image(
                        str(accuracy),
                        show_label=False,
                        buttons=["fullscreen"],
                        elem_id="accuracy",
                        format="png",
                        interactive=False,
                    )
        gradio.on(
            [button.click, question.submit],
            show,
            [picture, question, ticked, side],
            [message, table, gallery],
            api_name="ask",
        )
    return page


def launch_page(page: Any, host: str, port: int) -> str:
    """Start the server of a page in threads of its own; return its address.

    Raises:
        OSError: The port is taken.
    """
    import gradio

    page.queue(max_size=64)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        inbrowser=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=MOST_BYTES,
        theme=gradio.themes.Default(primary_hue="blue", font=FONTS, font_mono=CODE_FONTS),
        css=STYLE,
    )
    return str(address)
