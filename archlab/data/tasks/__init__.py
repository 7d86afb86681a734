"""Synthetic tasks that decide between families of architectures: generators, seeded and without end.

A name stands for a task with its published settings; NAME-tiny for one that small models learn on a CPU in minutes.
"""

from archlab.data.tasks.arithmetic import Addition
from archlab.data.tasks.copying import Compression, Copying, Memorisation, SelectiveCopying
from archlab.data.tasks.recall import MQAR, FuzzyRecall, InContextRecall, InductionHeads
from archlab.data.tasks.task import Draws, Task, task_batches, test_batches
from archlab.data.tasks.text import ListOps, Needle, Phonebook
from archlab.data.tasks.tracking import ModularArithmetic, Parity, Tracking, WordProblem
from archlab.layers.config import near

TASKS: dict[str, Task] = {
    "parity": Parity(),
    "parity-tiny": Parity(every=True),
    "modular-arithmetic": ModularArithmetic(),
    "modular-arithmetic-brackets": ModularArithmetic(brackets=True),
    "s5": WordProblem(),
    "a5": WordProblem(group="A5"),
    "z60": WordProblem(group="Z60"),
    "mqar": MQAR(),  # figure 2 of the paper, by the length of a row
    "mqar-128": MQAR(length=128, pairs=8),
    "mqar-256": MQAR(length=256, pairs=16),
    "mqar-512": MQAR(length=512, pairs=64),
    "mqar-tiny": MQAR(symbols=64, length=32, pairs=8),
    "induction-heads": InductionHeads(),
    "induction-heads-tiny": InductionHeads(lengths=(512, 1024, 4096, 16384), marks=32),
    "selective-copying": SelectiveCopying(),
    "selective-copying-tiny": SelectiveCopying(symbols=10, length=32, tokens=6),
    "copying": Copying(),
    "copying-tiny": Copying(shortest=5, length=30),
    "reversing": Copying(backwards=True),
    "reversing-tiny": Copying(shortest=5, length=30, backwards=True),
    "addition": Addition(),
    "addition-tiny": Addition(length=6),
    "phonebook": Phonebook(),
    "phonebook-tiny": Phonebook(entries=6, questions=2),
    "mad-in-context-recall": InContextRecall(),
    "mad-noisy-recall": InContextRecall(symbols=32, noise_symbols=16, noise_share=0.2),
    "mad-fuzzy-recall": FuzzyRecall(),
    "mad-selective-copying": SelectiveCopying(length=256),
    "mad-compression": Compression(),
    "mad-memorisation": Memorisation(),
    "list-ops": ListOps(),
    "list-ops-tiny": ListOps(shortest=10, length=60, depth=5, arguments=8),
    "needle": Needle(length=1024),
    "needle-tiny": Needle(length=128),
}


def get_task(name: str) -> Task:
    """The task of that name. ValueError offers near names."""
    if name not in TASKS:
        raise ValueError(f"no task named {name!r}; {near(name, list(TASKS))}")
    return TASKS[name]


__all__ = [
    "Addition",
    "Compression",
    "Copying",
    "Draws",
    "FuzzyRecall",
    "InContextRecall",
    "InductionHeads",
    "ListOps",
    "MQAR",
    "Memorisation",
    "ModularArithmetic",
    "Needle",
    "Parity",
    "Phonebook",
    "SelectiveCopying",
    "TASKS",
    "Task",
    "Tracking",
    "WordProblem",
    "get_task",
    "task_batches",
    "test_batches",
]
