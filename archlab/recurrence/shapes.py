"""Whether the arguments of a recurrence fit together."""


def check_shapes(letters: str, **arrays) -> None:
    """ValueError naming the first array whose shape is not what its letters say.

    letters: a word for each array, a letter for each dimension. The first array that has a letter says its size. Shapes
      are known while a program is traced, so that this costs nothing when it runs.
    """
    sizes = {}
    for word, (name, array) in zip(letters.split(), arrays.items(), strict=True):
        shape = getattr(array, "shape", None)
        if shape is None or len(shape) != len(word) or any(sizes.get(x, n) != n for x, n in zip(word, shape)):
            found = type(array).__name__ if shape is None else shape
            wanted = ", ".join(str(sizes.get(x, x)) for x in word)
            raise ValueError(f"{name} is {found}: must be [{', '.join(word)}] = ({wanted})")
        sizes.update(zip(word, shape))
