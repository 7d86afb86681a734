"""Text in, text out."""

from collections.abc import Iterator, Sequence

import numpy as np

from archlab.encoder_decoder import EncoderDecoder
from archlab.inference import generation
from archlab.layers.repeat import unstack
from archlab.model import Model


class TextModel:
    """A model with its tokenizer, and the settings with which it generates where nothing else is said.

        text = TextModel(model, ByteTokenizer(), temperature=0.5)
        text.generate("def ")                                      # what comes after it
        text.generate(["def ", "import "], max_new_tokens=20, rngs=nnx.Rngs(1))
        for piece in text.stream("def "): print(piece, end="", flush=True)

    The model may be used as it is, `text.model(ids)`; copies of a `Repeat` are taken apart.
    """

    def __init__(self, model: Model, tokenizer, max_length: int | None = None, **settings):
        """
        Args:
          tokenizer: has `vocab`, `encode`, `decode` and `stream`, as `ByteTokenizer` and `CheckpointTokenizer`.
          max_length: how long a prompt and its text may be together, where no `max_new_tokens` is given.
          settings: keywords of `archlab.generate`.
        """
        self.model, self.tokenizer, self.max_length, self.settings = unstack(model), tokenizer, max_length, settings
        self.reads = isinstance(model.config, EncoderDecoder)  # a prompt, to write a text of its own

    def generate(self, prompts: str | Sequence[str], **settings) -> list[str]:
        """What comes after each prompt, up to an EOS; what an encoder-decoder writes after it has read the prompt.

        Args: prompts: one or several, which are then run together. settings: keywords of `archlab.generate`, before
          those of this model.
        Raises: ValueError for a prompt without a token, and as `archlab.generate`.
        """
        prompts, given = self._prepare(prompts, settings)
        ids = np.asarray(generation.generate(self.model, **given))[:, -given["max_new_tokens"]:]
        return [self.tokenizer.decode(list(self._known(row, given)), after)
                for row, after in zip(ids, self._before(prompts))]

    def stream(self, prompt: str, **settings) -> Iterator[str]:
        """Yields the text of `generate` as it comes, in whole characters."""
        prompts, given = self._prepare(prompt, settings)
        tokens = (int(token[0]) for token in generation.stream(self.model, **given))
        yield from self.tokenizer.stream(self._known(tokens, given), self._before(prompts)[0])

    def _prepare(self, prompts, settings: dict) -> tuple[list[np.ndarray], dict]:
        """The ids of the prompts, and the keywords of `generate` for them: as one padded batch."""
        rows = [self.tokenizer.encode(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        if not rows or not all(map(len, rows)):
            raise ValueError(f"prompts = {prompts!r}: must be at least one, with at least one token each")
        width = max(map(len, rows))
        together = lambda rows: np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        given = self.settings | settings
        if "max_new_tokens" not in given:
            given["max_new_tokens"] = self._room(1 if self.reads else width)
        return rows, given | {"prompt_ids": together(rows), "segment_ids": together([np.ones_like(r) for r in rows])}

    def _room(self, length: int) -> int:
        """How many new tokens are asked for after `length`."""
        if self.max_length is None:
            return 64
        if self.max_length <= length:
            raise ValueError(f"max_length = {self.max_length} is no more than the {length} tokens of the prompt")
        return self.max_length - length

    def _before(self, prompts: list[np.ndarray]) -> list:
        """What each text goes on from."""
        return [()] * len(prompts) if self.reads else prompts

    def _known(self, ids, given: dict) -> Iterator[int]:
        """The ids before an EOS, without those that only the model has."""
        ends = np.atleast_1d([] if given.get("eos") is None else given["eos"])
        for index in ids:
            if index in ends:
                return
            if index < self.tokenizer.vocab:
                yield index
