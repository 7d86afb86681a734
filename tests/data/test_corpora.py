"""Corpora: what is found, how it is split, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest

from archlab.data import Corpus, load_corpus


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_stdlib_is_real_text_with_a_fixed_disjoint_split():
    corpus = load_corpus()
    assert corpus == load_corpus("stdlib") and corpus.name == "stdlib"
    everything = corpus.train + corpus.validation
    assert any(b"class JSONDecoder" in document for document in everything)
    assert any(b'The "assert" statement\n*****' in document for document in everything)  # a topic, not its literal
    assert not set(corpus.train) & set(corpus.validation)
    assert 0.01 < sum(map(len, corpus.validation)) / sum(map(len, everything)) < 0.15
    assert sum(map(len, corpus.train)) > 4_000_000
    for document in everything:
        assert document.decode()


def test_stdlib_leaves_out_tests_packages_and_what_names_the_machine(tmp_path, monkeypatch):
    kept = {"a.py": b"a", "sub/b.rst": b"b", "sub/c.txt": b"c", "pydoc_data/topics.py": b"# x\ntopics = {'if': 'help'}"}
    dropped = dict.fromkeys(["test/d.py", "site-packages/e.py", "_sysconfigdata_x.py", "config-3/f.py", "g.so"], b"no")
    write(tmp_path, kept | dropped | {"empty.py": b"", "latin.py": b"\xe9"})
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = load_corpus()
    assert sorted(corpus.train + corpus.validation) == [b"a", b"b", b"c", b"help"]


def test_documents_are_never_run(tmp_path, monkeypatch):
    write(tmp_path, {"a.py": b"raise SystemExit", "pydoc_data/topics.py": b"topics = {'if': open('x')}"})
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="malformed node"):
        load_corpus()


def test_split_depends_on_the_names_below_the_glob_alone(tmp_path):
    files = {f"{'ab'[n % 2]}/{n}.txt": f"document {n}".encode() for n in range(200)}
    write(tmp_path / "here", files)
    write(tmp_path / "there", dict(reversed(files.items())))
    here, there = (load_corpus(f"text:{tmp_path / place}/**/*.txt") for place in ("here", "there"))
    assert (here.train, here.validation) == (there.train, there.validation)
    assert sorted(here.train + here.validation) == sorted(files.values())
    assert 3 <= len(here.validation) <= 20
    few = load_corpus(f"text:{tmp_path}/here/a/1*.txt")  # a document keeps its side when the names stay what they are
    assert sorted(few.train + few.validation) == sorted(v for k, v in files.items() if k.startswith("a/1"))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_side_of_a_few_files_is_empty(tmp_path, count):
    for start in range(20):
        folder = tmp_path / str(start)
        write(folder, {f"{start}-{n}.txt": bytes([65 + n]) for n in range(count)})
        corpus = load_corpus(f"text:{folder}/*.txt")
        assert corpus.train and corpus.validation
        assert sorted(corpus.train + corpus.validation) == [bytes([65 + n]) for n in range(count)]


def test_one_file_is_cut_by_position_between_characters(tmp_path):
    write(tmp_path, {"ascii.txt": bytes(range(100)), "accents.txt": "é".encode() * 15})
    ascii_text = load_corpus(f"text:{tmp_path}/ascii.txt")
    assert ascii_text.train == (bytes(range(90)),) and ascii_text.validation == (bytes(range(90, 100)),)
    accents = load_corpus(f"text:{tmp_path}/acc*.txt")  # nine tenths of 30 bytes would be in mid-character
    assert (accents.train, accents.validation) == (("é".encode() * 14,), ("é".encode(),))


def test_links_out_of_the_glob_are_not_followed(tmp_path):
    write(tmp_path, {"in/a.txt": b"a", "in/b.txt": b"b", "out/secret.txt": b"secret"})
    (tmp_path / "in/link.txt").symlink_to(tmp_path / "out/secret.txt")
    (tmp_path / "in/folder").symlink_to(tmp_path / "out")
    (tmp_path / "in/again.txt").symlink_to(tmp_path / "in/a.txt")
    corpus = load_corpus(f"text:{tmp_path}/in/**/*.txt")
    assert sorted(corpus.train + corpus.validation) == [b"a", b"b"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("stdlb", "did you mean stdlib"),
        ("txt:*.py", "did you mean text"),
        ("text:", "text:GLOB"),
        ("text:{}/*.nothing", "no file under"),
        ("text:{}/empty*.txt", "empty: the 2 files"),
        ("text:{}/one.txt", "1 bytes, too few"),
    ],
)
def test_bad_specs_are_named(tmp_path, spec, message):
    write(tmp_path, {"empty1.txt": b"", "empty2.txt": b"", "one.txt": b"x"})
    with pytest.raises(ValueError, match=message):
        load_corpus(spec.format(tmp_path))


def test_a_corpus_has_no_empty_side_or_document():
    with pytest.raises(ValueError, match="validation has 0 documents"):
        Corpus("mine", (b"a",), ())
    with pytest.raises(ValueError, match="train has 2 documents, 1 of them empty"):
        Corpus("mine", (b"a", b""), (b"b",))


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    """A data directory with four datasets, written by TensorFlow Datasets itself in array_record format."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)

    def make(dataset, splits, features):
        class Lab(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = dataset
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain")]

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, download_manager):
                return {split: self._generate_examples(split, count) for split, count in splits.items()}

            def _generate_examples(self, split, count):
                for n in range(count):
                    yield n, {key: n if key == "n" else f"{key} {split} {n} é" for key in features}

        Lab(data_dir=tmp_path, file_format="array_record").download_and_prepare()

    make("lab_held_out", {"train": 6, "validation": 2, "test": 3}, {"text": text, "title": text, "n": number})
    make("lab_whole", {"train": 40}, {"story": text, "n": number})
    make("lab_two", {"train": 4}, {"question": text, "answer": text})
    make("lab_no_train", {"rest": 4}, {"text": text})
    return tmp_path


def test_tfds_is_read_without_tensorflow(tfds_dir):
    corpus = load_corpus("tfds:lab_held_out/plain")
    assert sorted(corpus.train) == [f"text train {n} é".encode() for n in range(6)]
    assert sorted(corpus.validation) == [f"text validation {n} é".encode() for n in range(2)]
    whole = load_corpus("tfds:lab_whole")  # its one string feature; no split to hold out
    assert len(whole.train) == 38 and len(whole.validation) == 2
    assert sorted(whole.train + whole.validation) == sorted(f"story train {n} é".encode() for n in range(40))
    for spec, message in [
        ("tfds:lab_two", "'answer', 'question'"),
        ("tfds:lab_no_train", "with a split 'train'"),
        ("tfds:imdb_reviws", "did you mean imdb_reviews"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_corpus(spec)
    code = "import sys; from archlab.data import load_corpus; load_corpus('tfds:lab_whole'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "tensorflow_datasets" in modules.stdout.split()
    assert not {"tensorflow", "torch"} & set(modules.stdout.split())
