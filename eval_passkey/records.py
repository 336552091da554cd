"""Texts that are nothing but records, one of which is asked for: a JSON object of UUIDs, and lines with a number each.

The first is from "Lost in the Middle" (arXiv 2307.03172), the second is LongEval's. There are as many records as the
length holds; the haystack fills what is left, less than one record, before them.
"""

import random
import uuid
from collections.abc import Iterator

from eval_passkey.names import draw_key, names, pool
from eval_passkey.prompts import Hidden, Task


class RecordsTask(Task):
    """What the two have in common: drawing records until the length is full, and asking for one of them."""

    before_records: tuple[str, ...] = ()
    after_records: tuple[str, ...] = ()

    def describe(self) -> dict:
        """The wordings it draws from."""
        return {**super().describe(), "wordings": pool(self.kind)}

    def records(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Different names with their values, without end."""
        raise NotImplementedError

    def line(self, wording: dict, name: str, value: str, last: bool) -> str:
        """A record in the text."""
        raise NotImplementedError

    def hide(self, rng: random.Random, length: int, depth: float | None) -> Hidden:
        """As many records as `length` tokens hold, at least two; the one at the share `depth` of them is asked for."""
        wording = rng.choice(pool(self.kind))
        share = rng.random() if depth is None else depth
        stream = self.records(rng)
        asked = next(stream)
        tokens = self.encoder.fixed_length(self._hidden(wording, [asked], 0))
        others: list[tuple[str, str]] = []
        for record in stream:
            tokens += len(self.encoder.cached("\n" + self.line(wording, *record, last=False), False))
            if tokens > length and others:
                break
            others.append(record)
        place = min(int(share * (len(others) + 1)), len(others))
        return self._hidden(wording, [*others[:place], asked, *others[place:]], place)

    def _hidden(self, wording: dict, records: list[tuple[str, str]], place: int) -> Hidden:
        last = len(records) - 1
        lines = [self.line(wording, *record, last=i == last) for i, record in enumerate(records)]
        name, value = records[place]
        return Hidden(
            [wording["opening"], None, *self.before_records, *lines, *self.after_records],
            wording["question"].format(name=name),
            wording["answer_start"].format(name=name),
            (value,),
            cuts=[],
            before=0,
            depth=place / max(last, 1),
        )


class KeyValueTask(RecordsTask):
    """A JSON object whose keys and values are random UUIDs."""

    kind = "key_value"
    before_records = ("{",)
    after_records = ("}",)

    def records(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        while True:
            key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
            yield key, value

    def line(self, wording: dict, name: str, value: str, last: bool) -> str:
        return f'"{name}": "{value}"' + ("" if last else ",")


class LineRetrievalTask(RecordsTask):
    """Lines in the same words, each with a name and a number of five digits."""

    kind = "line_retrieval"

    def records(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        for name in names(rng, separator="-"):
            yield name, draw_key(rng)

    def line(self, wording: dict, name: str, value: str, last: bool) -> str:
        return wording["record"].format(name=name, value=value)
