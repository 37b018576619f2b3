"""``tokenflex play``: a page that answers one question at several counts, side by side.

:mod:`~tokenflex.serving.playground.asking` answers, :mod:`~tokenflex.serving.playground.cells`
draws what each vision token sees, and :mod:`~tokenflex.serving.playground.page` is the gradio page
of both.
"""
