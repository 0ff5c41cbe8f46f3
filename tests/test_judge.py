"The judge as it is used: chains of its own, cut behind the step that is asked about."
import numpy as np
import pytest
from small import PAIRS, TRUTHS, copy_of

from she_nb.learning.judge import Claim, Judge, claims_from_responses, own_scores, step_lengths
from she_nb.task import render, step_texts


@pytest.fixture(scope="module")
def judge_parts(policy, tokenizer): return copy_of(policy, tokenizer).eval(), tokenizer, step_lengths(TRUTHS, tokenizer)


def test_a_cut_chain_says_the_same(judge_parts):
    "What is cut behind step k has the steps 1 to k of the whole chain."
    model, tokenizer, lengths = judge_parts
    judge = Judge(model, tokenizer, 0, new_tokens=lengths)
    whole = judge.write(PAIRS)
    assert any(len(chain.texts) == 5 for (chain,) in whole)
    for last in range(5):
        for (cut,), (chain,) in zip(judge.write(PAIRS, last), whole, strict=True):
            assert [cut.texts.get(step) for step in range(last + 1)] == [chain.texts.get(step) for step in range(last + 1)]


def test_it_values_claims_by_its_own_chains(judge_parts):
    "A true claim is worth the share of own chains that are right, whatever else is asked about the pair."
    model, tokenizer, lengths = judge_parts
    judge = Judge(model, tokenizer, 8, new_tokens=lengths)
    claims = [Claim(pair, 1, step_texts(pair.truth)[1]) for pair in PAIRS]
    values = judge.score(claims)
    assert np.nan_to_num(values).tolist() == own_scores(judge, PAIRS, last=1)[..., 1].mean(1).tolist()
    assert 0 < np.nanmean(values) < 1
    others = claims_from_responses(PAIRS, [[render(truth)] for truth in TRUTHS[1:] + TRUTHS[:1]], steps=(0, 1))
    assert judge.score(claims + others)[:len(claims)] == values
