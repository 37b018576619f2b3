"""TokenFLEX as a chat model of lmms-eval, found through the entry point group ``lmms_eval.models``.

    lmms-eval --model tokenflex --model_args pretrained=DIR,tokens=144 --tasks mmstar

The count is an argument of the model, never of the benchmark: each run has one count.
"""

from __future__ import annotations

from typing import Any

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    raise ImportError(
        f"tokenflex.harnesses.lmms_eval needs {error.name}: pip install lmms-eval"
    ) from error
from accelerate import Accelerator

from tokenflex.harnesses.assistant import Assistant
from tokenflex.terminal import progress_bar

MAX_NEW_TOKENS = 1024  # for tasks that give no limit
MAX_ROUNDS = 64  # for tasks that never end


class TokenFlex(lmms):
    """The adapter, written against lmms-eval 0.7.3.

    Args:
        pretrained: Checkpoint folder.
        tokens: Vision tokens of each tile: ``64``, ``12x16`` or ``auto``; required.
        max_tiles: Most tiles of an image; the processor's default if None.
        batch_size: Questions per call of ``generate``.
        device: Used in a single process; several processes have one device each.
        max_batch_size: Ignored. lmms-eval may pass it to any model.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The checkpoint or the count is not valid.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        tokens: int | str | None = None,
        max_tiles: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if tokens is None:
            raise ValueError(
                "model_args must name the count, such as tokens=64, tokens=12x16 or tokens=auto"
            )
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        is_single = self._world_size == 1
        self.device = device if is_single and device else self.accelerator.device
        self.batch_size = int(batch_size)
        self.assistant = Assistant(pretrained, tokens, max_tiles=max_tiles, device=self.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer each request, and count the tokens of its prompt (vision included) and answer.

        ``until`` is ignored, as in the other chat models of lmms-eval: by default the harness sets
        it to an empty line, which would cut answers into paragraphs.
        """
        results: list[Any] = []
        bar = progress_bar("answering", len(requests), unit="question", shown=self.rank == 0)
        for batch in self._batches(requests):
            conversations = []
            for request in batch:
                _, doc_to_messages, _, doc_id, task, split = request.args
                document = self.task_dict[task][split][doc_id]
                conversations.append(_messages(doc_to_messages(document)))
            options = batch[0].args[2]
            replies = self.assistant.reply(conversations, **_generation(options))
            for request, reply in zip(batch, replies, strict=True):
                counts = TokenCounts(
                    input_tokens=reply.prompt_tokens, output_tokens=reply.new_tokens
                )
                results.append(GenerationResult(text=reply.text, token_counts=counts))
                key = (request.args[0], options)
                self.cache_hook.add_partial("generate_until", key, reply.text)
                bar.update()
        bar.close()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer all rounds of each request; the task gives the next question, or ends."""
        return [self._rounds(request) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval's chat tasks only generate."""
        raise NotImplementedError(
            "tokenflex answers generate_until and generate_until_multi_round tasks, not "
            "loglikelihood ones"
        )

    def _rounds(self, request: Instance) -> list[str]:
        _, doc_to_messages, options, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        answers: list[str] = []
        messages, info = doc_to_messages(document), None
        for _ in range(MAX_ROUNDS):
            reply = self.assistant.reply([_messages(messages)], **_generation(options))[0]
            answers.append(reply.text)
            following = doc_to_messages(
                document,
                round_idx=len(answers),
                previous_output=list(answers),
                previous_round_info=info,
            )
            if not isinstance(following, tuple) or len(following) != 4 or following[1]:
                return answers
            messages, _, _, info = following
        raise RuntimeError(f"task {task} does not end after {MAX_ROUNDS} rounds")

    def _batches(self, requests: list[Instance]) -> list[list[Instance]]:
        """Group neighbouring requests with the same options."""
        batches: list[list[Instance]] = []
        for request in requests:
            same_options = batches and batches[-1][-1].args[2] == request.args[2]
            if same_options and len(batches[-1]) < self.batch_size:
                batches[-1].append(request)
            else:
                batches.append([request])
        return batches


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert lmms-eval's messages to transformers' layout; the assistant refuses other parts."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": part["url"]} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """Convert a task's ``generation_kwargs`` to options of ``generate``."""
    chosen = {
        "max_new_tokens": options.get("max_new_tokens") or MAX_NEW_TOKENS,
        "num_beams": options.get("num_beams") or 1,
    }
    if temperature := options.get("temperature"):
        chosen |= {"do_sample": True, "temperature": temperature}
        if options.get("top_p") is not None:
            chosen["top_p"] = options["top_p"]
    return chosen
