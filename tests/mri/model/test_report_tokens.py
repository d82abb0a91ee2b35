"""Reports as tokens: a document as the backbone learned them, and labels for the report alone."""

from types import SimpleNamespace

import pytest
import torch

from nirvana import InputError
from nirvana.data.tokenizer import load_tokenizer
from nirvana.model.backbone import backbone_folder
from nirvana.mri.model.report_tokens import LENGTHS, ReportTokens, report_entropy
from nirvana.ops.cross_entropy import IGNORE

CPU = torch.device("cpu")
REPORTS = ["No focal lesion.", "One hyperintense mass in the left frontal lobe, measuring 12 mm."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(backbone_folder())


def test_a_report_is_read_as_a_document_of_the_training(tokenizer):
    """The tokens are those of the whole text: nothing is torn where prompt and report meet."""
    ids, labels = ReportTokens(tokenizer)(REPORTS, CPU)
    assert ids.shape == labels.shape
    assert ids.shape[1] % LENGTHS == 0
    for row, report in enumerate(REPORTS):
        document = tokenizer(f"Report: {report}").input_ids
        assert document[0] == tokenizer.bos_token_id
        assert ids[row, : len(document)].tolist() == document


def test_labels_are_the_next_tokens_of_the_report_and_its_end(tokenizer):
    tokens = ReportTokens(tokenizer)
    ids, labels = tokens(REPORTS, CPU)
    for row, report in enumerate(REPORTS):
        labelled = (labels[row] != IGNORE).nonzero().flatten()
        assert labelled[0] == len(tokens.before) - 1
        assert tokenizer.decode(labels[row, labelled]) == f" {report}{tokenizer.eos_token}"
        assert torch.equal(labels[row, labelled[:-1]], ids[row, labelled[1:]])


def test_prompt_and_length_may_be_chosen(tokenizer):
    whole, _ = ReportTokens(tokenizer, "Findings are:")(REPORTS, CPU)
    ids, labels = ReportTokens(tokenizer, "Findings are:", longest=3)(REPORTS, CPU)
    assert tokenizer.decode(ids[0]).startswith(f"{tokenizer.bos_token}Findings are: No")
    labelled = labels != IGNORE
    assert (labelled.sum(1) == 4).all()
    assert (labels[labelled].view(2, 4)[:, -1] == tokenizer.eos_token_id).all()
    before = int(labelled[0].nonzero()[0]) + 1
    assert torch.equal(ids[:, : before + 3], whole[:, : before + 3])


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    ids, _ = ReportTokens(tokenizer)([f"a {tokenizer.bos_token} b"], CPU)
    assert (ids == tokenizer.bos_token_id).sum() == 1


def test_entropy_is_of_the_given_tokens(tokenizer):
    _, labels = ReportTokens(tokenizer)(REPORTS, CPU)
    labelled = labels != IGNORE
    logits = torch.randn(*labels.shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
    expected = -logits[labelled].log_softmax(1).gather(1, labels[labelled][:, None]).mean()
    torch.testing.assert_close(report_entropy(logits, labels), expected)
    logits[~labelled] += 5 * torch.randn_like(logits[~labelled])
    torch.testing.assert_close(report_entropy(logits, labels), expected)


def test_a_tokenizer_without_bos_is_refused():
    with pytest.raises(InputError, match="a BOS and an EOS token"):
        ReportTokens(SimpleNamespace(bos_token_id=None, eos_token_id=1))
