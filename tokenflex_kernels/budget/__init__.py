"""An instruction budget: the kernels' machine code is counted and timed by a model, without a GPU.

``sass`` reads machine code; ``integers``, ``effects`` and ``state`` are what ``walk`` follows it
with, block by block; ``recording`` turns what a stage launches into something to walk; ``model``
predicts times; ``table`` holds the predictions against ``budgets.csv``; ``page`` writes them down.
"""
