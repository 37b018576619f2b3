"""The server of ``tokenflex serve``: requests to batches, and batches to answers.

A request is parsed (``chat_request``), read by the model's processor and encoder (``served``),
waits for the next batch (``batching``), and is written there as a row of one ``generate``
(``rows``). ``app`` has the HTTP side, ``metrics`` what it counts.
"""
