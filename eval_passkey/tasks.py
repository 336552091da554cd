"""The tasks by the names that users type: `passkey`, `passkey:once`, `multi_key:16`, `variable_tracking:2:text`, ...

A name is a kind, and after colons what may be said about it: a wording of the pass key (paper, twice, once, or a
template file), how many needles or hops there are, and `text` for a haystack of the user's own texts. RULER's own tasks
have RULER's names, which say all of that.
"""

from dataclasses import dataclass

from eval_passkey.haystack import Filler, TextHaystack
from eval_passkey.needles import NeedlesTask
from eval_passkey.passkey import TEMPLATES, PasskeyTask, load_template
from eval_passkey.prompts import Encoder, Haystack, InputError, Task
from eval_passkey.records import KeyValueTask, LineRetrievalTask
from eval_passkey.ruler import NIAH, TRACKING, make_ruler_task
from eval_passkey.tracking import TrackingTask

# RULER's own, the defaults
COUNTS = {"multi_key": 4, "multi_value": 4, "multi_query": 4, "variable_tracking": 4, TRACKING: 4}
RECORDS = {"key_value": KeyValueTask, "line_retrieval": LineRetrievalTask}
RULER = (*NIAH, TRACKING)
KINDS = ("passkey", *COUNTS, *RECORDS, *NIAH)
TEXT = "text"


@dataclass(frozen=True)
class TaskName:
    """A name that was taken apart; `str()` of it is the name in the results, always the same for the same task."""

    kind: str
    wording: str = ""  # of the pass key; empty for the default
    count: int = 0
    text: bool = False

    @classmethod
    def parse(cls, name: str) -> "TaskName":
        """Takes a name apart; InputError with the choices if it is none."""
        kind, *options = name.split(":")
        if kind not in KINDS:
            raise InputError(f"--task {name}: there is no {kind!r}; choose from {', '.join(KINDS)}")
        if kind in RULER and TEXT in options:
            raise InputError(f"--task {name}: whether {kind} has a text is RULER's own; leave {TEXT!r} out")
        text = TEXT in options or kind in NIAH and NIAH[kind].text
        options = [option for option in options if option != TEXT]
        if len(options) > (kind not in (*RECORDS, *NIAH)):
            raise InputError(f"--task {name}: {':'.join(options)!r} says more than a task takes; see docs/pass_key.md")
        if kind == "passkey":
            wording = options[0] if options else ""
            if wording and wording not in TEMPLATES and not wording.endswith(".json"):
                raise InputError(
                    f"--task {name}: wording {wording!r} is neither {', '.join(TEMPLATES)} nor a .json file"
                )
            return cls(kind, "" if wording == "paper" else wording, text=text)
        if kind in RECORDS or kind in NIAH:
            return cls(kind, text=text)
        count = options[0] if options else str(COUNTS[kind])
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"--task {name}: {count!r} must be a whole number from 1, as in {kind}:{COUNTS[kind]}")
        return cls(kind, count=int(count), text=text)

    def __str__(self) -> str:
        options = [self.wording, str(self.count or ""), TEXT if self.text and self.kind not in NIAH else ""]
        return ":".join([self.kind, *(option for option in options if option)])


def make_task(
    name: str | TaskName, tokenizer_or_encoder, haystack: TextHaystack | None = None, template: str | None = None
) -> Task:
    """The task of that name, with a tokenizer or an `Encoder`.

    haystack: what tasks with `:text` read.
    template: a file with the wording of the pass key where the name has none; default: the paper's.
    InputError if the name, the template or the haystack cannot be used.
    """
    name = name if isinstance(name, TaskName) else TaskName.parse(name)
    encoder = tokenizer_or_encoder
    if not isinstance(encoder, Encoder):
        encoder = Encoder(encoder)
    if name.text and haystack is None:
        raise InputError(f"--task {name}: needs a text, --haystack FILE")
    text = haystack if name.text else None
    if name.kind == "passkey":
        path = TEMPLATES.get(name.wording, name.wording) if name.wording else template or TEMPLATES["paper"]
        return PasskeyTask(str(name), encoder, load_template(path), text)
    noise = load_template().filler  # which RULER's is, too
    if name.kind in RULER:
        return make_ruler_task(str(name), encoder, text, noise, hops=name.count)
    stack: Haystack = text or Filler(encoder, noise)
    if name.kind in RECORDS:
        return RECORDS[name.kind](str(name), encoder, stack)
    if name.kind == "variable_tracking":
        return TrackingTask(str(name), encoder, stack, hops=name.count)
    return NeedlesTask(str(name), encoder, stack, kind=name.kind.removeprefix("multi_"), count=name.count)
