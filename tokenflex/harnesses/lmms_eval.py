"""TokenFLEX as a chat model of lmms-eval, found through the entry point group ``lmms_eval.models``.

    lmms-eval --model tokenflex --model_args pretrained=DIR,tokens=144 --tasks mmstar

The count is an argument of the model, never of the benchmark: one run is one count.
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
from tqdm import tqdm

from tokenflex.harnesses.assistant import Assistant, Reply

MAX_NEW_TOKENS = 1024  # where a task does not say
MAX_ROUNDS = 64  # a task without an end of its own would be asked for ever


class TokenFlex(lmms):
    """The adapter, written against lmms-eval 0.7.3.

    Args:
        pretrained: checkpoint folder.
        tokens: vision tokens of each tile: ``64``, ``12x16`` or ``auto``; must be given.
        max_tiles: images are cut into at most so many; the processor's own if None.
        batch_size: questions of one call of ``generate``.
        device: as lmms-eval gives it; with several processes each has its own.
        max_batch_size: not used; lmms-eval may give it to any model.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint or the count is not valid.
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
        alone = self._world_size == 1
        self.device = device if alone and device else self.accelerator.device
        self.batch_size = int(batch_size)
        self.assistant = Assistant(pretrained, tokens, max_tiles=max_tiles, device=self.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request, with the tokens it read (vision included) and wrote.

        ``until`` is passed over, as lmms-eval's other chat models do: the harness sets it to an
        empty line for every task that says nothing, which would cut answers into paragraphs.
        """
        results: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for places in self._batches(requests):
            conversations = []
            for place in places:
                _, doc_to_messages, options, doc_id, task, split = requests[place].args
                conversations.append(
                    _messages(doc_to_messages(self.task_dict[task][split][doc_id]))
                )
            options = requests[places[0]].args[2]
            replies = self.assistant.reply(conversations, **_generation(options))
            for place, reply in zip(places, replies, strict=True):
                results[place] = _result(reply)
                context = requests[place].args[0]
                self.cache_hook.add_partial("generate_until", (context, options), reply.text)
                bar.update()
        bar.close()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request; the task says what is asked next, and ends."""
        return [self._rounds(request) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval's chat tasks only generate."""
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

    def _batches(self, requests: list[Instance]) -> list[list[int]]:
        """Places of requests that are generated together: neighbours with the same options."""
        batches: list[list[int]] = []
        for place, request in enumerate(requests):
            same = batches and requests[batches[-1][0]].args[2] == request.args[2]
            if same and len(batches[-1]) < self.batch_size:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages in transformers' layout; other parts are refused by the assistant."""
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
    """A task's ``generation_kwargs`` as ``generate`` takes them: greedy unless it samples."""
    chosen = {
        "max_new_tokens": options.get("max_new_tokens") or MAX_NEW_TOKENS,
        "num_beams": options.get("num_beams") or 1,
    }
    if temperature := options.get("temperature"):
        chosen |= {"do_sample": True, "temperature": temperature}
        if options.get("top_p") is not None:
            chosen["top_p"] = options["top_p"]
    return chosen


def _result(reply: Reply) -> GenerationResult:
    counts = TokenCounts(input_tokens=reply.prompt_tokens, output_tokens=reply.new_tokens)
    return GenerationResult(text=reply.text, token_counts=counts)
