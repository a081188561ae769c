"""Plain text is used whole: long documents become rows that give them back, and each token but the first is predicted once."""

from __future__ import annotations

import json
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf.config.parse import parse
from rlhf.config.schema import SftData
from rlhf.data.collate import pack, sft_batch
from rlhf.data.examples import SftExample, sft_examples, split
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError

BOS, EOS, PAD = 0, 1, 2
# No two tokens of these documents are alike, so a token names its place.
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 40, 41, 42)
DOCUMENTS = [list(range(start, start + length)) for start, length in zip(range(3, 453, 45), LENGTHS, strict=True)]


@pytest.fixture
def template() -> Template:
    """Words are numbers; the tokenizer adds its BOS."""
    backend = Tokenizer(
        WordLevel({"<s>": BOS, "</s>": EOS, "<pad>": PAD, **{str(n): n for n in range(3, 500)}}, unk_token="<pad>")
    )
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return Template(tokenizer, "plain", [EOS])


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(map(str, document))}) + "\n" for document in DOCUMENTS))
    return str(file)


def whole(rows: list[list[int]]) -> list[int]:
    """The document that rows overlapping by one token stand for."""
    return rows[0] + [token for row in rows[1:] for token in row[1:]]


def predicted(rows: list[list[int]]) -> list[int]:
    """What a causal model is trained to predict: all but the first token of each row."""
    return [token for row in rows for token in row[1:]]


@pytest.mark.parametrize("limit", [2, 3, 7, 41, 42, 100])
def test_rows_give_the_document_back_and_predict_each_token_once(limit):
    for document in DOCUMENTS:
        rows = [document[part] for part in split(len(document), limit)]
        assert whole(rows) == document
        assert predicted(rows) == document[1:]
        assert all(len(row) == limit for row in rows[:-1])
        assert len(rows[-1]) <= limit


def test_rows_without_an_overlap_leave_tokens_out():
    """What the test above tells apart from a plain cut, and from a longer overlap."""
    document = list(range(10))
    assert predicted([document[:4], document[4:8], document[8:]]) == [1, 2, 3, 5, 6, 7, 9]
    assert predicted([document[:4], document[2:6], document[4:8], document[6:]]) != document[1:]
    assert predicted([document[part] for part in split(10, 4)]) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_file_of_documents(template, path):
    found = sft_examples(path, SftData(train=path, json_key="text", max_length=7), template)
    closed = [[BOS, *document, EOS] for document in DOCUMENTS]
    assert [token for example in found.items for token in example.ids if token == BOS] == [BOS] * len(DOCUMENTS)
    starts = [i for i, example in enumerate(found.items) if example.ids[0] == BOS]
    groups = [found.items[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert [whole([example.ids for example in group]) for group in groups] == closed
    assert all(EOS not in example.ids[:-1] for example in found.items)
    assert all(len(example) <= 7 and all(example.trained) for example in found.items)
    # Lengths with BOS and EOS are 3 to 9, 42, 43 and 44; a row of 7 predicts 6: ceil(7/6) + ceil(8/6) + ceil(41, 42, 43 / 6)
    assert found.notes == ["5 documents longer than 7 tokens split into 26 rows"]
    fits = sft_examples(path, SftData(train=path, json_key="text", max_length=44), template)
    assert (len(fits.items), fits.notes) == (len(DOCUMENTS), [])


def test_packs_of_rows_carry_each_label_once(template, path):
    found = sft_examples(path, SftData(train=path, json_key="text", max_length=7), template)
    packs = pack(found.items, 7)
    batch = sft_batch(example for part in packs for example in part)
    expected = sorted(token for document in DOCUMENTS for token in [*document, EOS])
    assert sorted(batch.targets.tolist()) == expected
    assert all(sum(map(len, part)) <= 7 for part in packs)
    assert sum(sum(example.trained[1:]) for example in found.items) == len(expected)  # what schedule.unit tokens counts
    cut = sft_examples(path, SftData(train=path, json_key="text", max_length=7, too_long="truncate"), template)
    assert sorted(sft_batch(cut.items).targets.tolist()) != expected


def test_an_eos_within_a_document_ends_nothing(template):
    assert template.text("3 </s> 4 5") == [BOS, 3, EOS, 4, 5, EOS]
    assert template.text("3 </s>") == [BOS, 3, EOS]
    assert template.response("3", "4 </s> 5", "here")[1] == [4, EOS]  # a reply does end there


def test_other_rules_are_asked_for(template, path):
    def read(**more):
        return sft_examples(path, SftData(train=path, json_key="text", max_length=7, **more), template)

    assert len(read(too_long="skip").items) == 5
    cut = read(too_long="truncate")
    assert len(cut.items) == 10
    assert cut.notes[0].startswith("warning: 5 of 10 rows longer than 7 tokens truncated; --data.max_length N cuts less")
    assert cut.notes[1:] == ["data.too_long: split would use long documents whole"]
    with pytest.raises(DataError, match=r"documents.jsonl:6: 8 tokens, .*\(plain text: data.json_key\) split"):
        read(too_long="fail")


def test_only_plain_text_is_split():
    def data(*more: str) -> SftData:
        return parse("sft", ["--model=m", "--data=d", "--output=o", *more]).config.data

    assert data("--json-key=text").too_long == "split"
    assert data("--json-key=text", "--data.too-long=skip").too_long == "skip"
    assert data().too_long == "fail"
    with pytest.raises(ConfigError, match=r"^--data.too-long: .*plain text only.*data.json_key"):
        data("--data.too-long=split")
    with pytest.raises(ConfigError, match=r"data.max_length: given `1`, expected a whole number, at least 2"):
        data("--json-key=text", "--data.max-length=1")  # a row of one token predicts nothing
    for stage in (["rm", "--model=m"], ["ppo", "--actor=m", "--reward=count:a"]):
        with pytest.raises(ConfigError, match="given `split`, expected"):
            parse(stage[0], [*stage[1:], "--data=d", "--output=o", "--data.too-long=split"])


@pytest.mark.parametrize("lengths", [[50] * 50_000, [2 + n * 7919 % 49 for n in range(50_000)]], ids=["whole", "mixed"])
def test_packing_many_rows(lengths):
    """No row is lost, no pack too full, no two could be one; and the time is not that of a pass over all packs for each row."""
    rows = [SftExample([0] * length, [True] * length) for length in lengths]
    start = time.process_time()
    packs = pack(rows, 50)
    assert time.process_time() - start < 5  # takes 0.2 s; such a pass would take minutes
    assert sorted(id(row) for row in rows) == sorted(id(row) for some in packs for row in some)
    full = sorted(sum(map(len, some)) for some in packs)
    assert full[-1] <= 50
    assert len(full) == 1 or full[0] + full[1] > 50
