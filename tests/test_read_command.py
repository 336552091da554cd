"""`python -m landmark_llama.read`: texts of every kind, whole and with their places; killed at any moment."""

import io
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from byte_models import byte_tokenizer, save_dense, save_landmark, some_text
from checkpoints import flip_bit, refusal
from memories import files, start_reading
from transformers import AutoTokenizer

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM
from landmark_llama.memories import reader, texts
from landmark_llama.memories.models import load_model
from landmark_llama.memories.texts import Sources, tokenise
from landmark_llama.read import main
from landmark_llama.saved.folder import read_manifest, writing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return save_landmark(save_dense(folder / "dense"), folder / "landmark")


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CALL_POSITIONS", 64)


def read(model: Path, memory: Path, *names: object) -> None:
    main([str(model), *map(str, names), "--memory", str(memory), "--device", "cpu"])


def text_of(memory: Path) -> str:
    """All that a memory has read, as text."""
    tokens = read_manifest(memory).read(memory, "tokens")
    return byte_tokenizer().decode(tokens[:, 0].tolist(), skip_special_tokens=True)


def test_a_memory_goes_on_as_the_model_does_that_has_just_read_the_text(model: Path, tmp_path: Path) -> None:
    text = some_text(1, 500)
    (tmp_path / "novel.txt").write_text(text, "utf-8")
    read(model, tmp_path / "memory", tmp_path / "novel.txt")
    loaded, tokenizer = LandmarkLlamaForCausalLM.from_pretrained(model).eval(), byte_tokenizer()
    prompt, question = (tokenizer(x, return_tensors="pt").input_ids for x in (text, "abc"))
    question = question[:, 1:]  # BOS stands before the text
    cache = LandmarkCache.load(tmp_path / "memory", loaded)
    expected = loaded.generate(torch.cat([prompt, question], dim=1), max_new_tokens=8, do_sample=False)
    answer = loaded.generate(question, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(answer[:, question.shape[1] :], expected[:, prompt.shape[1] + question.shape[1] :])
    assert text_of(tmp_path / "memory") == text


@pytest.mark.usefixtures("small_calls")
def test_texts_that_are_added_later_make_the_memory_of_all_texts_together(model: Path, tmp_path: Path) -> None:
    names = []
    for i in range(3):
        names.append(tmp_path / f"{i}.txt")
        names[-1].write_text(some_text(i, 170), "utf-8")
    read(model, tmp_path / "at_once", *names)
    read(model, tmp_path / "added", *names[:2])
    before = read_manifest(tmp_path / "added").rows("tokens").count
    read(model, tmp_path / "added", *names)  # the first two are there already
    once, added = (read_manifest(tmp_path / x) for x in ("at_once", "added"))
    assert before < added.rows("tokens").count and added.sources == once.sources
    assert text_of(tmp_path / "added") == text_of(tmp_path / "at_once")
    loaded = LandmarkLlamaForCausalLM.from_pretrained(model).eval()
    question = torch.tensor([[70, 71, 72]])
    first, second = (
        loaded(question, past_key_values=LandmarkCache.load(tmp_path / x, loaded)).logits for x in ("at_once", "added")
    )
    # calls of other lengths round differently
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)
    untouched = files(tmp_path / "added")
    read(model, tmp_path / "added", *names)
    assert files(tmp_path / "added") == untouched


def test_folders_json_lines_and_standard_input_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "inner" / ".hidden").mkdir(parents=True)
    (tree / "b.py").write_text("b = 1\n")
    (tree / "inner" / "a.py").write_bytes("\ufeffa = 'é'\r\n".encode())  # a byte order mark
    (tree / "empty.py").write_text("")
    (tree / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (tree / "inner" / ".hidden" / "secret.txt").write_text("no")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "first row", "meta": 1}\n\n{"text": "second\\nrow"}\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    read(model, tmp_path / "memory", tree, rows, "-")
    manifest = read_manifest(tmp_path / "memory")
    assert [entry["name"] for entry in manifest.sources] == [
        str(tree / "b.py"), str(tree / "inner" / "a.py"), str(rows), "-"
    ]  # fmt: skip
    assert text_of(tmp_path / "memory") == (
        f"==> {tree / 'b.py'} <==\nb = 1\n==> {tree / 'inner' / 'a.py'} <==\na = 'é'\r\n"
        f"==> {rows} <==\nfirst row\n\nsecond\nrow==> - <==\nfrom a pipe"
    )


def test_tokens_know_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 40)
    text = "\n".join(some_text(i, 25).replace("\n", " ") for i in range(12))
    tokenizer = byte_tokenizer()
    tokens = torch.cat([rows for rows, _ in tokenise(texts.Source("x", (texts.Part(text),)), tokenizer)])
    assert tokenizer.decode(tokens[:, 0].tolist()) == text
    for _, character, line in tokens.tolist():
        assert line == 1 + text.count("\n", 0, character)
    assert tokens[:, 1].unique().tolist() == list(range(len(text)))  # a token a byte


def test_rows_of_json_lines_have_the_places_of_their_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n{"text": "c\\nd"}\n')
    source = Sources([str(tmp_path / "rows.jsonl")])[0]
    tokens = torch.cat([rows for rows, _ in tokenise(source, byte_tokenizer())])
    assert tokens[:, 1:].tolist() == [[0, 1], [1, 1], [2, 1], [3, 1], [0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("piece", [1 << 10, 1 << 14])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    piece: int, landmark_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "PIECE", piece)
    tokenizer = AutoTokenizer.from_pretrained(landmark_data / "tokenizers" / "llama")
    name = landmark_data / "books" / "1342_pride_and_prejudice.txt"
    source = Sources([str(name)])[0]
    text = source.parts[0].text[:120_000]
    tokens = torch.cat([rows for rows, _ in tokenise(texts.Source("x", (texts.Part(text),)), tokenizer)])
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens[:, 0].tolist() == whole


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(some_text(7, 1500), "utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(model: Path, long_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a memory that nothing happened to."""
    memory = tmp_path_factory.mktemp("undisturbed") / "memory"
    process = start_reading(model, long_text, memory)
    process.join(120)
    assert process.exitcode == 0
    return files(memory)


def tokens_read(memory: Path) -> int:
    try:
        return json.loads((memory / "memory.json").read_text())["files"]["tokens"]["count"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_reader_that_is_killed_ten_times_leaves_the_memory_of_one_that_was_not(
    model: Path, long_text: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    rng, memory = random.Random(0), tmp_path / "memory"
    total = json.loads(undisturbed["memory.json"])["files"]["tokens"]["count"]
    reached = []
    for number in range(10):
        process = start_reading(model, long_text, memory)
        deadline = time.monotonic() + 60
        while tokens_read(memory) < total * (number + 0.5) / 12 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(tokens_read(memory))
        loaded = LandmarkLlamaForCausalLM.from_pretrained(model)
        LandmarkCache.load(memory, loaded, verify=True)  # whatever the moment
    assert reached == sorted(reached) and 0 < reached[0] and reached[-1] < total
    process = start_reading(model, long_text, memory)
    process.join(120)
    assert process.exitcode == 0 and files(memory) == undisturbed


@pytest.mark.parametrize("step", ["append", "tail", "memory.json"])
def test_a_reader_killed_while_it_writes_leaves_the_state_before(
    step: str, model: Path, long_text: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    process = start_reading(model, long_text, memory, step)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and 0 < tokens_read(memory)
    LandmarkCache.load(memory, LandmarkLlamaForCausalLM.from_pretrained(model), verify=True)
    process = start_reading(model, long_text, memory)
    process.join(60)
    assert process.exitcode == 0 and files(memory) == undisturbed


def test_mistakes_end_in_one_sentence(model: Path, tmp_path: Path) -> None:
    memory, novel, other = tmp_path / "memory", tmp_path / "novel.txt", tmp_path / "other.txt"
    novel.write_text(some_text(1, 200), "utf-8")
    flags = ["--memory", memory, "--device", "cpu"]
    assert "nowhere: there is no such folder" in refusal(main, tmp_path / "nowhere", novel, *flags)
    assert "missing.txt: there is no such file" in refusal(main, model, tmp_path / "missing.txt", *flags)
    assert "has no landmarks" in refusal(main, model.parent / "dense", novel, *flags)
    for content, said in ((b"", "no text to read"), (b"\xff\xfe", "no text in UTF-8"), (b"a\0b", "a zero byte")):
        other.write_bytes(content)
        assert said in refusal(main, model, other, *flags)
    (tmp_path / "empty").mkdir()
    assert "empty: holds no text" in refusal(main, model, tmp_path / "empty", *flags)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    assert "bad.jsonl, line 2: no JSON object with a field 'text'" in refusal(
        main, model, tmp_path / "bad.jsonl", *flags
    )
    assert "num_retrieved_blocks=-1" in refusal(main, model, novel, *flags, "--num_retrieved_blocks", "-1")
    assert not (memory / "memory.json").exists()

    read(model, memory, novel)
    other.write_text("more", "utf-8")
    assert "was read with num_retrieved_blocks=2, not 1" in refusal(
        main, model, other, *flags, "--num_retrieved_blocks", "1"
    )
    with writing(memory):
        assert "another process is writing" in refusal(main, model, other, *flags)
    novel.write_text(some_text(2, 200), "utf-8")
    assert "novel.txt: has changed since" in refusal(main, model, novel, *flags)
    tokens = memory / "tokens.safetensors"
    flip_bit(tokens, -1)
    assert "tokens.safetensors: was changed after" in refusal(main, model, other, *flags, "--verify")
    flip_bit(tokens, -1)
    blocks = memory / "blocks.safetensors"
    blocks.write_bytes(blocks.read_bytes()[:-5])
    assert "blocks.safetensors: holds" in refusal(main, model, other, *flags)
    (tmp_path / "file").write_text("")
    assert "file" in refusal(main, model, other, "--memory", tmp_path / "file" / "memory", "--device", "cpu")


@pytest.mark.usefixtures("small_calls")
def test_a_text_that_was_begun_comes_first_and_must_be_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, novel, other = tmp_path / "memory", tmp_path / "novel.txt", tmp_path / "other.txt"
    text = some_text(1, 400)
    novel.write_text(text, "utf-8")
    other.write_text(some_text(2, 100), "utf-8")
    # the third call fails, as it would without memory
    calls = []
    forward = reader._Growing.read
    monkeypatch.setattr(
        reader._Growing, "read", lambda *given: calls.append(1) or forward(*given) or calls[2:] and 1 / 0
    )
    monkeypatch.setattr(reader, "SAVED_BYTES", 0)
    with pytest.raises(ZeroDivisionError):
        read(model, memory, novel)
    monkeypatch.setattr(reader._Growing, "read", forward)
    flags = ["--memory", memory, "--device", "cpu"]
    assert "novel.txt was not read to its end: give it first" in refusal(main, model, other, *flags)
    novel.write_text("Z" + text[1:], "utf-8")
    assert "novel.txt: is not the text that" in refusal(main, model, novel, *flags)
    novel.write_text(text[:20], "utf-8")
    assert "novel.txt: is not the text that" in refusal(main, model, novel, *flags)
    novel.write_text(text, "utf-8")
    read(model, memory, novel)
    assert text_of(memory) == text


@pytest.mark.usefixtures("small_calls")
def test_the_memory_is_the_same_whether_blocks_stay_on_the_device_or_go_to_the_disk(
    model: Path, long_text: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    loaded = load_model(str(model), device="cpu")
    reader.read_texts(*loaded, Sources([str(long_text)]), tmp_path / "memory", mapped=False, saved_every=0)
    assert files(tmp_path / "memory") == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.usefixtures("small_calls")
def test_a_full_disk_is_one_sentence_and_with_room_reading_goes_on(
    model: Path, long_text: Path, undisturbed: dict[str, bytes], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SAVED_BYTES", 0)
    memory = small_disk / "memory"
    said = refusal(main, model, long_text, "--memory", memory, "--device", "cpu")
    assert said.startswith("error: the disk is full: ") and str(memory) in said
    assert 0 < tokens_read(memory)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    read(model, memory, long_text)
    assert files(memory) == undisturbed
    shutil.rmtree(memory)
