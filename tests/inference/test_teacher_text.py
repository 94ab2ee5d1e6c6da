"""Text that the teacher writes: the same however it was interrupted or shared, and read exactly as it was written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import TeacherTextConfig, TextConfig, TextSource
from layerpeel.data.batches import load_rows
from layerpeel.data.documents import mix_documents
from layerpeel.data.token_documents import find_token_text, read_token_documents
from layerpeel.data.tokenizing import read_tokens
from layerpeel.errors import InputError, RunError
from layerpeel.inference.sampling import Sampler
from layerpeel.inference.teacher_text import MOST_TOKENS, TeacherWriter, WrittenText, tokens_of
from tests.families import save_texts, tiny_model, tiny_texts, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}w9 {{ message.content }} </s> {% endfor %}{% if add_generation_prompt %}w8{% endif %}"
)


def write(
    folder: Path,
    *beside: TextSource,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 3000,
    teacher: str = "tiny",
    **options: Any,
) -> WrittenText:
    """What a tiny teacher writes of a list of sources, in documents of at most 24 tokens."""
    torch.set_num_threads(1)
    writer = TeacherWriter(
        tiny_model("llama"), tokenizer or tiny_tokenizer(), folder, teacher=teacher, length=24, tokens=999, seed=5
    )
    source = TeacherTextConfig(tokens=tokens, **options)
    resolved = writer.resolve([*beside, source])
    (written,) = writer.written.values()
    last = resolved[-1]
    assert isinstance(last, TextConfig) and last.path == str(written.folder) and last.weight == source.weight
    return written


def contents(written: WrittenText) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in written.folder.iterdir()}


def documents(written: WrittenText) -> list[list[int]]:
    return [document.tolist() for document in read_token_documents(written.folder)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [30, 90])
def test_text_that_was_interrupted_is_that_without_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    expected = contents(write(tmp_path / "whole"))
    assert len(expected) > 4
    sample, steps = Sampler.sample, [0]

    def killed(self: Sampler, beginnings: Any, numbers: Any, advance: Any) -> Any:
        def count(tokens: int) -> None:
            steps[0] += 1
            if steps[0] == after:
                raise Killed
            advance(tokens)

        return sample(self, beginnings, numbers, count)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", killed)
        with pytest.raises(Killed):
            write(tmp_path / "broken")
    (folder,) = (tmp_path / "broken").iterdir()
    assert find_token_text(folder) is None and len([*folder.iterdir()]) == (1 if after == 30 else 3)
    again = write(tmp_path / "broken")
    assert contents(again) == expected
    modified = {path: path.stat().st_mtime_ns for path in again.folder.iterdir()}
    assert write(tmp_path / "broken").tokens_per_second == 0  # all was there
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == modified


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    written = write(tmp_path)
    expected = contents(written)
    (written.folder / "00001.safetensors").write_bytes(expected["00001.safetensors"][:-5])
    with pytest.raises(RunError, match=r"00001\.safetensors: damaged or gone") as caught:
        documents(written)
    assert "run the same command again" in caught.value.hint
    assert contents(write(tmp_path)) == expected
    (written.folder / "00001.safetensors").unlink()
    assert contents(write(tmp_path)) == expected


@pytest.mark.slow
def test_two_processes_write_the_text_of_one(tmp_path: Path) -> None:
    from tests.launching import launch

    launch("-m", "tests.inference.test_teacher_text", str(tmp_path / "two"))
    alone = write(tmp_path / "one")
    (folder,) = (tmp_path / "two").iterdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents(alone)


def test_as_many_tokens_are_written_as_were_asked_for(tmp_path: Path) -> None:
    for tokens in (1, 24, 400, 5000):
        written = write(tmp_path, tokens=tokens)
        ids = documents(written)
        assert sum(map(len, ids)) == written.text.tokens and len(ids) == written.text.documents
        assert tokens <= written.text.tokens < tokens + 24
        assert all(document[0] == 1 and len(document) <= 24 for document in ids)
        assert len({*map(tuple, ids)}) > 0.9 * len(ids)


def test_it_is_read_into_rows_exactly_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path)
    source = TextConfig(path=str(written.folder), shuffle=0)
    read = read_tokens([source], tiny_tokenizer(), 0)
    assert [ids.tolist() for ids in read] == documents(written)
    rows = load_rows([source], tiny_tokenizer(), sequence_length=24, packing="none")
    assert [ids[mask].tolist() for ids, mask in zip(rows.input_ids, rows.mask, strict=True)] == documents(written)
    mixed = load_rows(
        [source.model_copy(update={"weight": 3.0}), TextConfig(path=str(save_texts(tmp_path / "a.jsonl")))],
        tiny_tokenizer(),
        sequence_length=40,
        packing="none",
        max_tokens=40 * 60,
    )
    of_teacher = {*map(tuple, documents(written))}
    count = sum(tuple(ids[mask].tolist()) in of_teacher for ids, mask in zip(mixed.input_ids, mixed.mask, strict=True))
    assert 0.5 < count / len(mixed) < 1


def test_token_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    written, other = write(tmp_path), tiny_tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(InputError, match="its token ids are of another tokenizer than the teacher's"):
        load_rows([TextConfig(path=str(written.folder))], other, sequence_length=24)


def test_other_options_or_another_teacher_are_another_text(tmp_path: Path) -> None:
    different: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_p": 0.5}, {"tokens": 400}, {"teacher": "other"}]
    folders = {write(tmp_path, **{"tokens": 300, **options}).folder for options in different}
    assert len(folders) == 5
    assert write(tmp_path, tokens=300, weight=2.0).folder in folders  # what has no part in it


def test_documents_begin_with_the_prompts(tmp_path: Path) -> None:
    texts = tiny_texts([3, 5, 4])
    path = save_texts(tmp_path / "prompts.jsonl", texts)
    written = write(tmp_path / "text", tokens=300, prompts=str(path))
    prompts = [tiny_tokenizer().encode(text) for text in texts]
    begun = [[document[: len(ids)] == ids for ids in prompts].index(True) for document in documents(written)]
    assert sorted(begun[:3]) == [0, 1, 2] and begun[3:9] == begun[:3] * 2
    assert len({*map(tuple, documents(written))}) > 0.9 * len(begun)


def test_chats_go_on_with_what_the_assistant_says(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "w10 w11"}],
        [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}],
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    written = write(tmp_path / "text", tokens=200, prompts=str(path), tokenizer=tokenizer)
    assert {tuple(document[:5]) for document in documents(written)} == {(9, 10, 11, 2, 8)}
    assert all(len(document) > 5 for document in documents(written))
    path.write_text(json.dumps({"messages": chats[1][1:]}))
    with pytest.raises(InputError, match="a chat without a message that an assistant could answer"):
        write(tmp_path / "other", prompts=str(path), tokenizer=tokenizer)
    path.write_text(json.dumps({"messages": chats[0]}))
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        write(tmp_path / "other", prompts=str(path))


def test_without_a_beginning_of_text_documents_open_as_those_beside_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    beside = TextConfig(path=str(save_texts(tmp_path / "a.jsonl")))
    openings = {tuple(tokenizer.encode(text)[:8]) for text in tiny_texts()}
    written = write(tmp_path / "text", beside, tokenizer=tokenizer, tokens=1500)
    assert {tuple(document[:8]) for document in documents(written)} == openings
    alone = write(tmp_path / "alone", tokenizer=tokenizer, tokens=200)
    assert {document[0] for document in documents(alone)} == {2}
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a beginning-of-text nor an end-of-text token") as caught:
        write(tmp_path / "none", tokenizer=tokenizer)
    assert "prompts" in caught.value.hint


def test_prompts_that_leave_no_room_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_texts(tmp_path / "prompts.jsonl", tiny_texts([40, 5, 30]))
    written = write(tmp_path / "text", tokens=100, prompts=str(path))
    assert len({tuple(document[:5]) for document in documents(written)}) == 1
    assert "2 prompts are left out" in capsys.readouterr().err
    save_texts(path, tiny_texts([40]))
    with pytest.raises(InputError, match="each prompt has 24 tokens or more") as caught:
        write(tmp_path / "text", prompts=str(path))
    assert "distill.sequence_length" in caught.value.hint


def test_a_source_gets_its_share_of_what_is_read() -> None:
    source = TeacherTextConfig(weight=3.0)
    assert tokens_of(source, [source, TextConfig(path="a")], 4000) == 3000
    assert tokens_of(source, [source], 10**9) == MOST_TOKENS
    assert tokens_of(TeacherTextConfig(tokens=10**9), [source], 5) == 10**9


@pytest.mark.parametrize("words", [3, 200])
def test_as_much_is_written_as_is_read_beside_shorter_and_longer_documents(tmp_path: Path, words: int) -> None:
    """Weights count documents, so of long ones more tokens are read."""
    corpus = save_texts(tmp_path / "corpus.jsonl", tiny_texts([words] * 2000))
    torch.set_num_threads(1)
    writer = TeacherWriter(
        tiny_model("llama"), tiny_tokenizer(), tmp_path, teacher="tiny", length=24, tokens=9000, seed=5
    )
    sources = writer.resolve([TextConfig(path=str(corpus)), TeacherTextConfig()])
    (written,) = writer.written.values()
    left, read = 9000, 0
    for (_, document), ids in zip(mix_documents(sources, 0), read_tokens(sources, tiny_tokenizer(), 0), strict=True):
        read += len(ids) * isinstance(document, torch.Tensor)
        left -= len(ids)
        if left <= 0:
            break
    assert left <= 0 and 0.6 * written.text.tokens < read < 1.3 * written.text.tokens


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_documents_beside_it_that_are_short_lend_what_they_have(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    beside = TextConfig(path=str(save_texts(tmp_path / "a.jsonl", ["w5 w6", "w7 w8 w9"])))
    written = write(tmp_path / "text", beside, tokenizer=tokenizer, tokens=300)
    assert {tuple(document[:2]) for document in documents(written)} == {(5, 6), (7, 8)}
