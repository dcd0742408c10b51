"""How the report shows texts and tokens, and the losses of tokens."""

import pytest
import tiny
import torch
from report_data import NumberTokenizer, page_of
from transformers import T5Config, T5ForConditionalGeneration

from hf_importance.report.examples import text_of
from hf_importance.report.texts import readable
from hf_importance.report.tokens import token_losses

# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ("plain", "plain"),
        ({"text": "one", "label": 3}, "one"),
        ({"question": "why", "context": "so"}, "question: why\ncontext: so"),
        ({"input_ids": [5, 6]}, "5+6"),
        ({"values": [1.0]}, ""),
        (7, ""),
        ({"text": "x" * 900}, "x" * 499 + "…"),
    ],
)
def test_text_of_an_example(example, text):
    assert text_of(example, NumberTokenizer()) == text


def test_tokens_are_shown_instead_of_strings():
    example = {"id": "train-17", "input_ids": torch.tensor([5, 6]), "labels": 1}
    assert text_of(example, NumberTokenizer()) == "5+6"
    assert text_of(example, None) == "train-17", "control: without a tokenizer the strings are shown"


def test_tokens_of_several_texts_are_decoded_separately():
    assert text_of({"input_ids": [[5, 6], [7]]}, NumberTokenizer()) == "5+6\n7"
    assert text_of({"input_ids": torch.tensor([[5, 6], [7, 8]])}, NumberTokenizer()) == "5+6\n7+8"


def test_long_texts_are_cut_and_unprintable_characters_replaced():
    assert len(text_of("x" * 10**7, None)) == 500
    long = {"input_ids": list(range(10**6))}
    assert len(text_of(long, NumberTokenizer())) == 500
    assert readable("a\ud83db") == "a�b"
    assert readable("\ud83d\ude00") == "😀", "a surrogate pair"
    assert readable("tab\tline\n\x00") == "tab\tline\n�"


# ---- losses of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifts", [False, True])
def test_token_losses_equal_the_cross_entropy(shifts):
    model, rows = tiny.token_bert(), tiny.token_rows(6)
    model.train()
    found = token_losses(model, rows, tiny.pad, lambda batch: batch, NumberTokenizer(), shifts, [4, 2])
    assert model.training
    assert list(found) == [4, 2]
    for i, tokens in found.items():
        ids, labels = rows[i]["input_ids"], rows[i]["labels"]
        logits = model.eval()(input_ids=ids[None]).logits[0].detach()
        expected = []
        for t, y in enumerate(labels):
            has_loss = y != -100 and t >= shifts
            loss = torch.nn.functional.cross_entropy(logits[t - shifts], y).item() if has_loss else -1.0
            expected.append(loss)
        assert [-1.0 if token.loss is None else token.loss for token in tokens] == pytest.approx(expected, rel=1e-4)
        assert max(token.share for token in tokens) == 1.0
        assert "".join(token.text for token in tokens) == NumberTokenizer().decode(ids.tolist())
        model.train()


def test_encoder_decoders_have_no_token_losses():
    """Their labels belong to other tokens than `input_ids`."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([8, 9, 1])}]
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9, 1]])}
    batch["decoder_input_ids"] = torch.tensor([[0, 8, 9]])  # added by the collator
    assert token_losses(model, rows, lambda _: dict(batch), lambda batch: batch, NumberTokenizer(), False, [0]) == {}


def test_page_highlights_tokens_by_loss(tmp_path, caplog):
    more = {"data_collator": tiny.pad, "processing_class": NumberTokenizer()}
    trainer = tiny.trained(tmp_path, tiny.token_bert(), tiny.token_rows(16), more=more, max_steps=4)
    page = page_of(trainer.importance_report())
    heats = [a["style"] for tag, a in page.tags if tag == "span" and a.get("class") == "token"]
    assert "--heat:100%" in heats
    assert "The redder a token" in page.text
    hidden = trainer.importance_report(examples=["(hidden)"] * 16).read_text()
    assert 'class="token"' not in hidden, "the given examples are shown instead of tokens"
    trainer.model.forward = lambda **_: 1 / 0
    assert 'class="token"' not in trainer.importance_report().read_text()
    assert "The report does not show token losses: ZeroDivisionError" in caplog.text
    more = {"processing_class": NumberTokenizer()}
    control = tiny.trained(tmp_path, tiny.bert(), tiny.texts(16), more=more, max_steps=4)
    assert 'class="token"' not in control.importance_report().read_text(), "control: one label per text"
